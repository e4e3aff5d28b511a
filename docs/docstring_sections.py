"""Let the API page show the docstring sections that the Google style takes for admonitions.

These are sections that begin on the line of their name, such as `Returns: poses …`, and `Example:`.
"""

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Args|Returns|Raises|Laws): (\S.*(?:\n[ ]+\S.*)*)", re.MULTILINE)
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


def _as_paragraph(section: re.Match[str]) -> str:
    text = " ".join(section[2].split())
    return f"\n**{section[1]}:** {text}\n"


class DocstringSections(griffe.Extension):
    """Turn short sections into paragraphs, and `Example:` into `Examples:`."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object that griffe has read."""
        if obj.docstring:
            text = SECTION.sub(_as_paragraph, obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub("Examples:", text)
