"""Let the API page show parts of our docstrings that are not in the Google style.

These are sections that begin on the line of their name, such as `Returns: poses …`; `Example:`; and arguments
that share a description, such as `kernel, stride: of the convolution`.
"""

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Args|Returns|Raises|Laws): (\S.*(?:\n[ ]+\S.*)*)", re.MULTILINE)
SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (\S.*(?:\n\1 +\S.*)*)", re.MULTILINE)
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


def _as_paragraph(section: re.Match[str]) -> str:
    text = " ".join(section[2].split())
    return f"\n**{section[1]}:** {text}\n"


def _separate(arguments: re.Match[str]) -> str:
    indent, names, text = arguments.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))


class DocstringSections(griffe.Extension):
    """Turn short sections into paragraphs, list every argument by itself, write `Examples:`."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object that griffe has read."""
        if obj.docstring:
            text = SHARED.sub(_separate, SECTION.sub(_as_paragraph, obj.docstring.value))
            obj.docstring.value = EXAMPLE.sub("Examples:", text)
