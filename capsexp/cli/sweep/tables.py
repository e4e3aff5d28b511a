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

from capsexp.cli.jobs import compose_checked, validate
from capsexp.config.compose import compose, searching
from capsexp.config.overrides import override_values, parse_all, value
from capsexp.config.sweeps import (
    data_variants,
    intervals,
    list_problems,
    require_feasible,
    swept_variants,
)
from capsexp.errors import UserError

if TYPE_CHECKING:
    from capsexp.config.components import Components

TAKES = "a sweep takes values, A,B,C or range(A,B); hydra/sweeper=search takes intervals"
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
                if len({*names}) < len(names):  # `check_sweep` reports it
                    break
                rows = list(dict.fromkeys(row for name in names for row in _table_rows(name) or [name]))
                if rows != names:
                    expanded = f"{override.get_key_element()}={','.join(rows)}"
                    return [expanded if text == override.input_line else text for text in overrides], rows
    return list(overrides), []


def check_sweep(
    name: str, overrides: Sequence[str], *, rows: Sequence[str], config_dir: str | None
) -> "list[tuple[DictConfig, Components]]":
    """Compose and check the jobs of a sweep, varying one value at a time.

    Args:
        name: of the root config.
        overrides: as `expand_tables` returns them.
        rows: the recipes that `expand_tables` returns.
        config_dir: see `compose`.

    Returns:
        Config and components of each job that was checked; the first job comes first.

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

    for_search = intervals(overrides, config_dir=config_dir)
    usable, first_row = [text for text in overrides if text not in for_search], rows[0] if rows else ""
    check(usable, first_row, sweep=True)
    problems = list(list_problems(overrides, config_dir=config_dir))
    if not _searches(checked, overrides):
        require_feasible(usable, config_dir=config_dir)
        problems += [f"{text}: {TAKES}" for text in for_search]
    elif for_search:
        usable = list(overrides)
        check(usable, first_row, sweep=True)
    for variant in swept_variants(usable, config_dir=config_dir):
        check(variant, str(value(variant, "experiment")), sweep=False)
    problems += [_name_rows(problem, affected, rows) for problem, affected in rows_with.items()]
    if problems:
        raise UserError(*problems)
    return checked


def searches(composed: DictConfig) -> bool:
    """Return whether a search, such as optuna's, chooses the values of the jobs."""
    return bool(composed.hydra.runtime.choices["hydra/sweeper"] != "basic")


def require_data(
    checked: "Sequence[tuple[DictConfig, Components]]",
    name: str,
    overrides: Sequence[str],
    *,
    config_dir: str | None,
) -> None:
    """Look for the data of all jobs.

    Args:
        checked: as `check_sweep` returns it.
        name: of the root config.
        overrides: as `expand_tables` returns them.
        config_dir: see `compose`.

    Raises:
        UserError: all data that are missing, each with what helps.
    """
    datasets = [components.dataset for _, components in checked]
    for variant in data_variants(overrides, config_dir=config_dir):
        composed = compose(name, variant, config_dir=config_dir)
        datasets.append(validate(composed, overrides).dataset)
    problems: dict[str, None] = {}
    for dataset in datasets:
        try:
            dataset.require_files()
        except UserError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise UserError(*problems)


def _searches(checked: "Sequence[tuple[DictConfig, Components]]", overrides: Sequence[str]) -> bool:
    """Return `searches` of the first job, or as far as the command line shows if there is none."""
    return searches(checked[0][0]) if checked else value(overrides, "hydra/sweeper") not in (None, "basic")


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
