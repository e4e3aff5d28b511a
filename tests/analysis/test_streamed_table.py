"""A table in parts looks like one table."""

import re

import pytest

from capsexp.analysis.streamed_table import StreamedTable
from capsexp.terminal import Table, new_console

NAMES = [f"a/long/name/of/an/image/{number}.png" for number in range(7)]
ROWS = [[name, "cat 0.5", "[bold] 0.4"] for name in NAMES]
COLUMNS = {"image": NAMES, "1.": ["cat 0.0", "[bold] 0.0"], "2.": ["cat 0.0", "[bold] 0.0"]}


def printed(capsys, *parts):
    table = StreamedTable(COLUMNS)
    for part in parts:
        table.add_rows(part)
    table.end()
    return capsys.readouterr().out


@pytest.fixture
def narrow(monkeypatch):
    """A terminal that is narrower than the table."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")


def test_parts_are_printed_like_the_whole(capsys):
    whole = printed(capsys, ROWS)
    assert printed(capsys, ROWS[:3], ROWS[3:4], ROWS[4:]) == whole
    table = Table()
    for header in COLUMNS:
        table.add_column(header, min_width=10)
    for row in ROWS:
        table.add_row(*row)
    console = new_console(width=200)
    with console.capture() as capture:
        console.print(table)
    assert whole == capture.get()


@pytest.mark.parametrize("columns", ["40", "20", "1"])
def test_a_pipe_gets_whole_rows(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    lines = printed(capsys, ROWS).splitlines()
    for name in NAMES:
        assert any(name in line and "[bold] 0.4" in line for line in lines)


def test_on_a_narrow_terminal_cells_are_divided_and_nothing_is_lost(narrow, capsys):
    assert new_console().is_terminal
    whole = printed(capsys, ROWS)
    assert printed(capsys, ROWS[:3], ROWS[3:]) == whole
    whole = re.sub(r"\x1b\[[\d;]*m", "", whole)  # styles
    assert max(map(len, whole.splitlines())) <= 40
    cells = [line.split("│")[1].strip() for line in whole.splitlines() if "│" in line]
    assert "".join(cells) == "".join(NAMES)
