"""A table that is printed while its rows are computed."""

from collections.abc import Iterable, Mapping, Sequence

from rich.cells import cell_len

from capsexp.terminal import Table, new_console
from capsexp.text import printable

NARROWEST = 8
"""Width below which a column is not made narrower to fit a terminal."""


class StreamedTable:
    """A table that is printed in parts, so that it needs no memory for all rows.

    On a terminal that is too narrow, cells continue on the next line, those of the first column first. Into a
    file or a pipe, every row is one line.

    Args:
        columns: the headers, each with all cells that its column may have, which fix its width.
    """

    def __init__(self, columns: Mapping[str, Iterable[str]]) -> None:
        self._widths = {
            header: max(cell_len(header), *(cell_len(printable(cell)) for cell in cells))
            for header, cells in columns.items()
        }
        console = new_console()
        frame = 3 * len(self._widths) + 1
        excess = sum(self._widths.values()) + frame - console.width
        if console.is_terminal:
            for header, width in self._widths.items():
                cut = max(0, min(excess, width - NARROWEST))
                self._widths[header] -= cut
                excess -= cut
        self._console = new_console(width=console.width + max(0, excess))
        self._last_line = ""
        self.is_empty = True

    def add_rows(self, rows: Sequence[Sequence[str]]) -> None:
        """Print more rows, below the header if they are the first."""
        table = Table(show_header=self.is_empty)
        for header, width in self._widths.items():
            table.add_column(header, width=width, overflow="fold")
        for row in rows:
            table.add_row(*row)
        with self._console.capture() as capture:
            self._console.print(table)
        lines = capture.get().splitlines(keepends=True)
        self._last_line = lines.pop()
        print("".join(lines if self.is_empty else lines[1:]), end="", flush=True)
        self.is_empty = False

    def end(self) -> None:
        """Print the lower edge."""
        print(self._last_line, end="")
