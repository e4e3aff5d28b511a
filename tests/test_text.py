"""Names are text: no markup, no escape sequences, and other signs where an encoding lacks them."""

import ast
import io
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.figure import Figure
from rich.text import Text

import capsexp as package
from capsexp.errors import UserError, print_error
from capsexp.terminal import Table, as_markup, new_console
from capsexp.text import prepare_streams, printable, printable_lines, show_as_typed

ESCAPED = {
    "a\x1b[31mb": r"a\x1b[31mb",
    "\x9b2J": r"\x9b2J",
    "\x07\x08\x00": r"\x07\x08\x00",
    "a\r\n\tb": r"a\r\n\tb",
    "\u202egnp": r"\u202egnp",
    "\u2028\x85": r"\u2028\x85",
    "\ufeff\u200b": r"\ufeff\u200b",
    "\udcff": r"\udcff",
}
AS_TYPED = (
    "größe",
    "[bold]x[/bold]",
    "[/x]",
    "[link=file:///x]y",
    ":smile:",
    "a[b",
    "\xa0\u3000",
    "👩\u200d🔬",
    "",
)


@pytest.mark.parametrize("content", ESCAPED)
def test_control_characters_are_shown_escaped(content):
    assert printable(content) == ESCAPED[content]
    assert printable(content).isprintable()
    assert printable_lines(f"a\n{content.replace(chr(10), '')}\n").count("\n") == 2


@pytest.mark.parametrize("content", AS_TYPED)
def test_other_text_is_shown_as_typed(content):
    assert printable(content) == content


def shown(renderable) -> str:
    console = new_console(file=io.StringIO(), width=200, force_terminal=False)
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize("content", [*AS_TYPED, *ESCAPED])
def test_cells_and_heads_of_tables_are_text(content):
    table = Table(content, "other")
    table.add_row(content, Text("\x1b[1m", "green"))
    assert shown(table).count(printable(content)) >= 2
    assert "\x1b" not in shown(table)
    assert shown(printable(content)).rstrip("\n") == printable(content)
    labelled = new_console(file=io.StringIO(), markup=True, width=200)
    labelled.print(as_markup(content))
    assert labelled.file.getvalue().rstrip("\n") == printable(content)


def test_errors_are_printed_without_escape_sequences(capsys):
    print_error(UserError("run=\x1b]0;title\x07 is no directory"))
    assert capsys.readouterr().err == "capsexp: run=\\x1b]0;title\\x07 is no directory\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_streams_replace_what_their_encoding_lacks(encoding, monkeypatch):
    files = [io.BytesIO(), io.BytesIO()]
    streams = [io.TextIOWrapper(file, encoding=encoding, errors="strict") for file in files]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    prepare_streams()
    for stream in streams:
        stream.write("größe \u2013 0.5 ± 0.1 → 犬 \udcff")
        stream.flush()
    expected = {"ascii": "gr??e - 0.5 +- 0.1 -> ? ?", "latin-1": "größe - 0.5 ± 0.1 -> ? ?"}
    for file in files:
        text = file.getvalue().decode(encoding)
        assert text == expected.get(encoding, text)
        assert "犬" in text or "?" in text


def test_all_tables_and_consoles_are_those_of_capsexp_terminal():
    """A string in a table of rich's own is markup: a class called [bold] would vanish."""
    for path in Path(package.__file__).parent.rglob("*.py"):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "rich.table":
                assert "Table" not in {alias.name for alias in node.names}, path
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Console"):
                pytest.fail(f"{path}: {ast.unparse(node)}")


@pytest.mark.parametrize("content", ["$x$", "US$5 to US$6", r"$\\frac{$", "a\x1b[2J", "_x", "größe", "<b>&"])
def test_texts_of_figures_are_shown_as_typed(content):
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 10])
    axes.set(title=content, xlabel=content, yscale="log")
    show_as_typed(figure)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg")
    elements = ElementTree.fromstring(file.getvalue()).iter()
    texts = ["".join(element.itertext()) for element in elements if element.tag.endswith("}text")]
    assert texts.count(printable(content)) == 2
