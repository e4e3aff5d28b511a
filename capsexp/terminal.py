"""Print on a terminal with rich: names are text, never markup."""

from typing import Any

import rich.table
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.text import Text

from capsexp.text import printable


class Table(rich.table.Table):
    """A table that shows its cells as typed, also `[bold]`, with control characters escaped.

    Use it instead of rich's own, which reads every string as markup. A `Text` keeps its style.
    """

    def add_column(self, header: RenderableType = "", *arguments: Any, **options: Any) -> None:
        """Add a column; see rich."""
        super().add_column(_as_text(header), *arguments, **options)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row; see rich."""
        super().add_row(*map(_as_text, cells), **options)


def new_console(**options: Any) -> Console:
    """Return a console that prints strings as typed; for options see rich."""
    return Console(**{"markup": False, "emoji": False, "highlight": False, **options})


def as_markup(content: object) -> str:
    """Return a value for the parts of rich that always read markup, such as labels of progress bars."""
    return escape(printable(content))


def _as_text(cell: RenderableType | None) -> Any:
    if isinstance(cell, Text):
        return Text(printable(cell.plain), cell.style)
    return Text(printable(cell)) if isinstance(cell, str) else cell
