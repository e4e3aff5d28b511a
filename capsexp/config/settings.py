"""A run's config as flat settings: what a resumed run is held to, and what runs are compared by."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# What does not change a run's results, so a resumed run may have it otherwise.
NOT_COMPARED = ("run", "resume", "output_root", "data_root", "plugins", "device", "paper")
ROOTS = ("dataset.root", "dataset.source.root")


class Published(NamedTuple):
    """A paper's test error for a recipe, in %."""

    error: float
    sd: float | None
    """Standard deviation over the paper's trials; None where it has none."""


def published(config: Mapping[str, Any]) -> Published | None:
    """What a config's `paper` says, if anything.

    Raises:
        ValueError: it says something else than a test error.
    """
    node = config.get("paper")
    if node is None:
        return None
    figures = dict(node) if isinstance(node, Mapping) else {}
    error, sd = figures.pop("error", None), figures.pop("sd", None)
    if figures or not _is_percent(error) or not (sd is None or _is_percent(sd)):
        raise ValueError(f"paper must be null or {{error: PERCENT, sd: PERCENT or null}}, got {node}")
    return Published(float(error), None if sd is None else float(sd))


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting that can change a run's results, by its dotted key."""
    return dict(_leaves({key: value for key, value in config.items() if key not in NOT_COMPARED}))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """One line for each setting that two `comparable` configs do not share."""
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield f"{key}: was {old.get(key)!r}, is {new.get(key)!r}"


def without(settings: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """The settings but for some: runs that then are equal belong together."""
    return {key: value for key, value in settings.items() if key not in keys}


def fingerprint(settings: Any) -> str:
    """Eight hexadecimal digits that are the same for equal settings, in every process."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:8]


def _is_percent(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 100


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" not in ROOTS:
            yield f"{prefix}{key}", value
