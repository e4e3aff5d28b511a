"""docs/results/runs.json: the headline rows of the papers, and the records of runs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capsexp.documents import read_json
from capsexp.errors import UserError, nearest
from capsexp.files import write_atomic

Record = dict[str, Any]
"""A run; see results_page.record."""
Data = dict[str, list[Record]]
"""`headlines`, and `runs` in their order."""


def load(file: Path) -> Data:
    """Read the data."""
    return read_json(file)


def save(data: Data, file: Path) -> None:
    """Write the data: a line for each field."""
    parts = ",\n".join(f' "{name}": [\n{_lines(entries)}\n ]' for name, entries in data.items())
    write_atomic(file, lambda opened: opened.write(f"{{\n{parts}\n}}\n".encode()))


def _lines(entries: Sequence[Mapping[str, Any]]) -> str:
    texts = (
        ",\n".join(f'   "{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in entry.items())
        for entry in entries
    )
    return ",\n".join(f"  {{\n{text}\n  }}" for text in texts)


def add(data: Data, record: Record, *, row: str | None = None) -> None:
    """Add a record, or replace that with the same recipe, settings and seed.

    Args:
        data: changed in place.
        record: of a run.
        row: the headline row beside which the runs of this recipe and these settings stand; None for the row
            of those in the data, or of the recipe.

    Raises:
        UserError: there is no such row.
    """
    rows = [headline["row"] for headline in data["headlines"]]
    if row is not None and row not in rows:
        raise UserError(f"--row: there is no row {row!r}{nearest(row, rows)}")
    same = [run for run in data["runs"] if settings(run) == settings(record)]
    chosen = row or next((run["row"] for run in same), None) or row_of(data, record["recipe"])
    others = [run for run in data["runs"] if run not in same]
    same = [run for run in same if run["seed"] != record["seed"]]
    runs = [*others, *({**run, "row": chosen} for run in (*same, record))]
    data["runs"] = sorted(runs, key=lambda run: _order(run, rows))


def settings(record: Record) -> tuple[str, tuple[str, ...]]:
    """Return what runs share that differ only in their seed."""
    return record["recipe"], tuple(sorted(record["overrides"]))


def row_of(data: Data, recipe: str) -> str | None:
    """Return the headline row beside which a recipe stands by default; None without one."""
    return next((line["row"] for line in data["headlines"] if recipe in line["recipes"]), None)


def _order(record: Record, rows: Sequence[str]) -> tuple[Any, ...]:
    """Return the place of a record: by row, those without one at the end; equal settings side by side."""
    place = rows.index(record["row"]) if record["row"] in rows else len(rows)
    return not record["kept"], place, settings(record), record["seed"]
