"""Tables of recipes: one name for all the rows of a paper's table.

`conf/experiment/NAME.yaml` is a table if it has a list `table` of other recipes;
`capsexp train -m experiment=NAME` is then the sweep over them.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from capsexp.cli.jobs import validate
from capsexp.config.compose import compose, searching
from capsexp.config.overrides import override_values, parse_all, value
from capsexp.config.sweeps import swept_variants
from capsexp.errors import UserError

COMPARED = ("model", "routing", "loss")
"""What the rows of a table are about: where they differ in it, one override would make them the same."""


def with_rows(overrides: Sequence[str], *, config_dir: str | None) -> tuple[list[str], list[str]]:
    """The overrides of a sweep with a table's rows in its place, and these rows; none without a table."""
    with searching(config_dir):
        for one in parse_all(overrides)[0]:
            if one.key_or_group == "experiment" and not one.is_delete():
                names = [str(name) for name in override_values(one)]
                rows = list(dict.fromkeys(row for name in names for row in _rows(name) or [name]))
                if rows != names:
                    text = f"{one.get_key_element()}={','.join(rows)}"
                    return [text if word == one.input_line else word for word in overrides], rows
    return list(overrides), []


def checked_sweep(
    name: str, overrides: Sequence[str], *, rows: Sequence[str], config_dir: str | None
) -> tuple[DictConfig, Any]:
    """Compose and check every job of a sweep, as far as varying one value at a time goes.

    Args:
        name: of the root config.
        overrides: as `with_rows` returns them.
        rows: its other result.
        config_dir: see `compose`.

    Returns:
        Config and parts of the first job.

    Raises:
        UserError: overrides of what the rows of a table differ in; else every mistake in any job, once.
    """
    if problems := list(_made_the_same(name, overrides, rows, config_dir)):
        raise UserError(*problems)
    told: dict[str, list[str]] = {}
    first: list[Any] = []

    def check(words: Sequence[str], row: str, *, sweep: bool) -> None:
        try:
            composed = compose(name, words, config_dir=config_dir, sweep=sweep)
            first.append((composed, validate(composed, overrides)))
        except UserError as error:
            for line in error.problems:
                told.setdefault(line, []).append(row)

    check(overrides, rows[0] if rows else "", sweep=True)
    for words in swept_variants(overrides, config_dir=config_dir):
        check(words, str(value(words, "experiment")), sweep=False)
    if told:
        raise UserError(
            *(_of_rows(line, [row for row in rows if row in who], rows) for line, who in told.items())
        )
    return first[0]


def _rows(name: str) -> list[str]:
    """The rows of an experiment that is a table."""
    loader = GlobalHydra.instance().config_loader()
    assert isinstance(loader, ConfigLoaderImpl)
    found = loader.repository.load_config(f"experiment/{name}")
    node = None if found is None else found.config
    return [str(row) for row in node.get("table") or []] if isinstance(node, DictConfig) else []


def _of_rows(line: str, having: Sequence[str], rows: Sequence[str]) -> str:
    """A mistake, with the rows that have it if others have not."""
    named = line.startswith("experiment=") or len(having) == len(rows)
    return line if named else f"experiment={','.join(having)}: {line}"


def _made_the_same(
    name: str, overrides: Sequence[str], rows: Sequence[str], config_dir: str | None
) -> Iterator[str]:
    """Overrides of what the rows differ in: all would be one network, under the names of several."""
    with searching(config_dir):
        keys = {one.input_line: one.key_or_group for one in parse_all(overrides)[0]}
    judged = {text: key for text, key in keys.items() if re.split(r"[./]", key)[0] in COMPARED}
    if not judged or not rows:
        return
    try:
        alone = [compose(name, [f"experiment={row}"], config_dir=config_dir) for row in rows]
    except UserError:  # told when the jobs are checked
        return
    for text, key in judged.items():
        found = [_setting(composed, key) for composed in alone]
        if len({*found}) > 1:
            ((common, _),) = Counter(one for one in found if one != "None").most_common(1)
            alike = ",".join(row for row, one in zip(rows, found, strict=True) if one == common)
            told = f"{text}: the rows of the table differ in {key}, and all would have this one"
            yield f"{told}; those that have {common} are experiment={alike}"


def _setting(composed: DictConfig, key: str) -> str:
    choices = composed.hydra.runtime.choices
    return str(choices[key] if key in choices else OmegaConf.select(composed, key))
