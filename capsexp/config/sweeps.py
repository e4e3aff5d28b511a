"""Overrides with several values (`KEY=A,B`), which make a sweep."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from hydra.core.override_parser.types import Override

from capsexp.config.compose import searching
from capsexp.config.overrides import MOST_VALUES, group_options, parse_all, single_values
from capsexp.errors import UserError

DATA_KEYS = ("dataset", "experiment", "data_root")
MOST_COMBINATIONS = 100


def intervals(overrides: Sequence[str], *, config_dir: str | None) -> list[str]:
    """Return the overrides that name an interval, in which only a search can choose values."""
    with searching(config_dir):
        parsed, _ = parse_all(overrides)
        return [
            str(override.input_line)
            for override in parsed
            if override.is_sweep_override() and not override.is_discrete_sweep()
        ]


def list_problems(overrides: Sequence[str], *, config_dir: str | None) -> Iterator[str]:
    """Yield one line for each override whose values cannot make the jobs of a sweep."""
    with searching(config_dir):
        parsed = [override for override in parse_all(overrides)[0] if override.is_sweep_override()]
        for override in parsed:
            text = override.input_line
            if override.key_or_group.startswith(("hydra.", "hydra/")):
                yield f"{text}: the settings of the sweep itself have one value"
            elif override.is_discrete_sweep():
                counts = Counter(override.sweep_string_iterator())
                if repeated := [value for value, count in counts.items() if count > 1]:
                    yield f"{text}: {', '.join(repeated)} is there more than once"


def require_feasible(overrides: Sequence[str], *, config_dir: str | None) -> None:
    """Check the number of jobs of a plain sweep.

    Raises:
        UserError: more than anybody can run; checking their values alone would take hours.
    """
    with searching(config_dir):
        jobs = math.prod(len(single_values(override)) for override in parse_all(overrides)[0])
    if jobs > MOST_VALUES:
        raise UserError(f"this sweep has {jobs:,} jobs; the most are {MOST_VALUES:,}")


def data_variants(overrides: Sequence[str], *, config_dir: str | None) -> list[list[str]]:
    """Return overrides of single jobs that between them use every combination of the datasets' settings.

    `swept_variants` has all of them if only one of these settings is swept. Of very many combinations
    none is returned.
    """
    with searching(config_dir):
        parsed, _ = parse_all(overrides)
        values = [
            single_values(override)
            if re.split(r"[./@]", override.key_or_group)[0] in DATA_KEYS
            else single_values(override)[:1]
            for override in parsed
        ]
        several = [len(options) for options in values if len(options) > 1]
        if len(several) < 2 or math.prod(several) > MOST_COMBINATIONS:
            return []
        return [list(variant) for variant in itertools.product(*values)]


def swept_variants(overrides: Sequence[str], *, config_dir: str | None) -> list[list[str]]:
    """Return overrides of single jobs that between them use every swept value once.

    One value is varied at a time: the cost of checking a sweep grows with its values, not their product.
    The job of all first values, which `compose` checks, is left out.
    """
    with searching(config_dir):
        parsed, _ = parse_all(overrides)
        first = [single_values(override)[0] for override in parsed]
        return [
            [*first[:place], text, *first[place + 1 :]]
            for place, override in enumerate(parsed)
            for text in single_values(override)[1:]
        ]


def constants_and_swept(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the overrides with one value, and the keys of those with several."""
    with searching(None):
        parsed, _ = parse_all(overrides)
        constants = [str(override.input_line) for override in parsed if not override.is_sweep_override()]
        return constants, [override.key_or_group for override in parsed if override.is_sweep_override()]


def with_constants_swept(overrides: Sequence[str], *, config_dir: str | None) -> list[str]:
    """Return the overrides of a sweep over groups, each constant made a sweep of its one value.

    Before its first job Hydra composes a config without anything swept, and would refuse a key that only a
    swept choice has: `experiment=a,b dataset.cameras=left`. Other sweeps are returned as they are.
    """
    with searching(config_dir):
        parsed, _ = parse_all(overrides)
        if not any(
            override.is_sweep_override() and group_options(override.key_or_group) for override in parsed
        ):
            return list(overrides)
        # For another sweeper, such as a search, each choice of one would be one more dimension.
        if any(override.key_or_group == "hydra/sweeper" for override in parsed):
            return list(overrides)
        return [_as_sweep(override) for override in parsed]


def _as_sweep(override: Override) -> str:
    """Return a constant as a sweep of one value, where Hydra allows it."""
    text = str(override.input_line)
    key, _, value = text.partition("=")
    if override.is_sweep_override() or override.is_delete() or override.key_or_group.startswith("hydra"):
        return text
    if override.value() is None:  # Hydra cannot sweep over null; `++` adds the key if it is not there
        return f"++{key.lstrip('+')}=null"
    return f"{key}=choice({value})" if value else text
