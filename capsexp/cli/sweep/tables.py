"""Tables of recipes: one name for all rows of a paper's table.

`conf/experiment/NAME.yaml` is a table if it has a list `table` of other recipes.
`capsexp train -m experiment=NAME` then sweeps over them.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from capsexp.cli.jobs import compose_checked
from capsexp.config.compose import compose, searching
from capsexp.config.overrides import override_values, parse_all, value
from capsexp.config.sweeps import swept_variants
from capsexp.errors import UserError

if TYPE_CHECKING:
    from capsexp.config.components import Components

COMPARED_GROUPS = ("model", "routing", "loss")
"""What the rows of a table compare. An override of a differing setting would make rows equal."""


def expand_tables(overrides: Sequence[str], *, config_dir: str | None) -> tuple[list[str], list[str]]:
    """Replace tables by their rows in the overrides of a sweep.

    Returns:
        The overrides, and all recipes that the sweep runs; no recipes without a table.
    """
    with searching(config_dir):
        for override in parse_all(overrides)[0]:
            if override.key_or_group == "experiment" and not override.is_delete():
                names = [str(name) for name in override_values(override)]
                rows = list(dict.fromkeys(row for name in names for row in _table_rows(name) or [name]))
                if rows != names:
                    expanded = f"{override.get_key_element()}={','.join(rows)}"
                    return [expanded if text == override.input_line else text for text in overrides], rows
    return list(overrides), []


def check_sweep(
    name: str, overrides: Sequence[str], *, rows: Sequence[str], config_dir: str | None
) -> "tuple[DictConfig, Components]":
    """Compose and check the jobs of a sweep, varying one value at a time.

    Args:
        name: of the root config.
        overrides: as `expand_tables` returns them.
        rows: the recipes that `expand_tables` returns.
        config_dir: see `compose`.

    Returns:
        Config and components of the first job.

    Raises:
        UserError: overrides of settings in which the rows of a table differ; else every error in any job.
    """
    if problems := list(_conflicts(name, overrides, rows, config_dir)):
        raise UserError(*problems)
    rows_with: dict[str, list[str]] = {}  # by error
    checked: list[tuple[DictConfig, Components]] = []

    def check(arguments: Sequence[str], row: str, *, sweep: bool) -> None:
        try:
            checked.append(compose_checked(name, arguments, config_dir=config_dir, sweep=sweep))
        except UserError as error:
            for problem in error.problems:
                rows_with.setdefault(problem, []).append(row)

    check(overrides, rows[0] if rows else "", sweep=True)
    for variant in swept_variants(overrides, config_dir=config_dir):
        check(variant, str(value(variant, "experiment")), sweep=False)
    if rows_with:
        raise UserError(*(_name_rows(problem, affected, rows) for problem, affected in rows_with.items()))
    return checked[0]


def _table_rows(name: str) -> list[str]:
    """Return the rows of an experiment that is a table; empty for any other experiment."""
    loader = GlobalHydra.instance().config_loader()
    assert isinstance(loader, ConfigLoaderImpl)
    result = loader.repository.load_config(f"experiment/{name}")
    node = None if result is None else result.config
    return [str(row) for row in node.get("table") or []] if isinstance(node, DictConfig) else []


def _name_rows(problem: str, affected: Sequence[str], rows: Sequence[str]) -> str:
    """Prefix an error with the rows that have it, unless all rows do."""
    names = [row for row in rows if row in affected]
    if problem.startswith("experiment=") or len(names) == len(rows):
        return problem
    return f"experiment={','.join(names)}: {problem}"


def _conflicts(
    name: str, overrides: Sequence[str], rows: Sequence[str], config_dir: str | None
) -> Iterator[str]:
    """Yield an error for each override of a setting in which the rows of a table differ."""
    with searching(config_dir):
        keys = {override.input_line: override.key_or_group for override in parse_all(overrides)[0]}
    compared = {text: key for text, key in keys.items() if re.split(r"[./]", key)[0] in COMPARED_GROUPS}
    if not compared or not rows:
        return
    try:
        configs = [compose(name, [f"experiment={row}"], config_dir=config_dir) for row in rows]
    except UserError:  # `check_sweep` reports it
        return
    for text, key in compared.items():
        settings = [_setting(composed, key) for composed in configs]
        if len({*settings}) > 1:
            ((common, _),) = Counter(setting for setting in settings if setting != "None").most_common(1)
            names = ",".join(row for row, setting in zip(rows, settings, strict=True) if setting == common)
            hint = f"the rows with {common} are experiment={names}"
            yield f"{text}: the rows of the table differ in {key}, and this would make them equal; {hint}"


def _setting(composed: DictConfig, key: str) -> str:
    choices = composed.hydra.runtime.choices
    return str(choices[key] if key in choices else OmegaConf.select(composed, key))
