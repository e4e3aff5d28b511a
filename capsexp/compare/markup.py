"""HTML and SVG from Python, in which nothing is markup that was not made here."""

import html

NEVER_CLOSED = ("img",)


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def element(name: str, *content: str, **attributes: str | int | float | None) -> Html:
    """One element, its content and attributes escaped; content that is `Html` goes in as it is.

    Args:
        name: such as td.
        content: one after the other.
        attributes: `class_` for class, data_value for data-value; None leaves one out.
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"')
    start = f"<{' '.join(words)}>"
    return Html(start if name in NEVER_CLOSED else f"{start}{joined(*content)}</{name}>")


def joined(*content: str) -> Html:
    """Pieces of text or markup as one piece of markup."""
    return Html("".join(one if isinstance(one, Html) else html.escape(one) for one in content))
