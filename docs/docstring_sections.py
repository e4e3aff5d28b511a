"""Let the API page show docstring sections that begin on the line of their name, such as `Returns: poses …`.

The Google style wants such text on the lines below the name, and takes the short form for an admonition.
"""

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Args|Returns|Raises|Laws): (\S.*(?:\n[ ]+\S.*)*)", re.MULTILINE)


def _as_paragraph(section: re.Match[str]) -> str:
    text = " ".join(section[2].split())
    return f"\n**{section[1]}:** {text}\n"


class DocstringSections(griffe.Extension):
    """Turn short sections into paragraphs."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object that griffe has read."""
        if obj.docstring:
            obj.docstring.value = SECTION.sub(_as_paragraph, obj.docstring.value)
