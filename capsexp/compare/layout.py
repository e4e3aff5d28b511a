"""Print a table of text, each row on one line however long: a tenth of the time that rich's own takes."""

import sys
from collections.abc import Sequence

from rich.cells import cell_len
from rich.color import ColorSystem
from rich.style import Style

from capsexp.terminal import new_console
from capsexp.text import printable

LONGEST_CELL = 500  # characters
GAP = "  "
STATUS_COLOURS = {
    "finished": "green",
    "running": "cyan",
    "failed": "red",
    "died": "red",
    "interrupted": "yellow",
    "unknown": "yellow",
}


def print_table(
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[bool],
    status: int,
    below: Sequence[str] = (),
) -> None:
    """Print a table.

    Args:
        titles: the heads of the columns.
        rows: the cells of each row, as `single_line` returns them.
        right: for each column, whether its cells are aligned right.
        status: number of the column that holds statuses, which are colored on a terminal.
        below: a remark to print below each row; empty for none.
    """
    widths = [max(map(_width, column)) for column in zip(titles, *rows, strict=True)]
    write_stdout(f"{_line(titles, widths, right)}\n {'─' * (sum(widths) + len(GAP) * (len(widths) - 1))}\n")
    is_coloured = new_console().color_system is not None
    for row, remark in zip(rows, below or [""] * len(rows), strict=True):
        line = _line(row, widths, right, coloured=status if is_coloured else None)
        write_stdout(f"{line}\n" + f"    {remark}\n" * bool(remark))


def single_line(content: str) -> str:
    """Return a text as one line that is safe to print, shortened if it is long."""
    shown = printable(content[: LONGEST_CELL + 1])
    return shown if len(shown) <= LONGEST_CELL else f"{shown[:LONGEST_CELL]}…"


def write_stdout(content: str) -> None:
    """Write to stdout and flush, so that a closed pipe raises here and not at exit."""
    sys.stdout.write(content)
    sys.stdout.flush()


def _line(
    cells: Sequence[str], widths: Sequence[int], right: Sequence[bool], coloured: int | None = None
) -> str:
    padded = []
    for index, (cell, width, is_right) in enumerate(zip(cells, widths, right, strict=True)):
        space = " " * (width - _width(cell))
        text = _painted(cell) if index == coloured else cell
        padded.append(space + text if is_right else text + space)
    return f" {GAP.join(padded)}".rstrip()


def _painted(status: str) -> str:
    colour = STATUS_COLOURS.get(status)
    return Style(color=colour).render(status, color_system=ColorSystem.STANDARD) if colour else status


def _width(cell: str) -> int:
    return len(cell) if cell.isascii() else cell_len(cell)
