"""Text from users and files as it is shown: control characters escaped, for terminals without UTF-8 too."""

import codecs
import sys
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JOINERS = "\u200c\u200d"  # invisible, but part of words in many scripts
SUBSTITUTES = str.maketrans(
    {"─": "-", "━": "-", "│": "|", "–": "-", "…": "~", "±": "+-", "→": "->", "↑": "^", "↓": "v"}  # noqa: RUF001
)
"""Signs of our own output for terminals that cannot show them."""


def printable(content: object) -> str:
    r"""Return a value as one line that is safe to print: control characters are escaped, as \x1b or \n.

    A terminal obeys escape sequences, and characters that change the direction of writing hide what
    follows. Lone surrogates, which stand for bytes of file names that are not UTF-8, cannot be encoded.
    """
    string = str(content)
    return string if string.isprintable() else "".join(map(_shown, string))


def printable_lines(content: str) -> str:
    """Return a text that is safe to print, and that keeps its line breaks."""
    return "\n".join(map(printable, content.split("\n")))


def show_as_typed(figure: "Figure") -> None:
    """Let the texts of a figure be shown as typed: `$` begins no formula, control characters are escaped."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        content = text.get_text()
        text.set_text(printable_lines(content))
        if "$" in content and "mathdefault" not in content:  # matplotlib's own label of a logarithmic axis
            text.set_parse_math(False)


def a_few(names: Sequence[str], *, most: int = 3, separator: str = ", ") -> str:
    """Return names for a message of one line: the first ones, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(map(printable, names[:most])) + more


def prepare_streams() -> None:
    """Let stdout and stderr replace characters that their encoding lacks, instead of failing."""
    codecs.register_error("capsexp.substitute", _substitute)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="capsexp.substitute")


def _shown(letter: str) -> str:
    if letter.isprintable() or letter in JOINERS or unicodedata.category(letter) == "Zs":
        return letter
    return letter.encode("unicode_escape", "surrogatepass").decode()


def _substitute(error: UnicodeError) -> tuple[str, int]:
    """Return similar signs, or question marks, for characters that cannot be encoded."""
    assert isinstance(error, UnicodeEncodeError)
    signs = error.object[error.start : error.end].translate(SUBSTITUTES)
    return "".join(sign if sign.isascii() else "?" for sign in signs), error.end
