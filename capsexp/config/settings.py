"""A run's config as flat settings, by which runs are resumed and compared."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from capsexp.errors import is_number

GROUPS = ("device", "trainer", "dataset", "routing", "loss", "optimizer", "model", "experiment")
STORED = "stored"  # option of every group that a saved config holds
# Settings that do not change a run's results, so a resumed run may change them.
NOT_COMPARED = ("run", "resume", "output_root", "data_root", "plugins", "device", "paper")
ROOTS = ("dataset.root", "dataset.source.root")


class Published(NamedTuple):
    """A paper's test error for a recipe, in %."""

    error: float
    sd: float | None
    """Standard deviation over the paper's trials; None where it has none."""


def published(config: Mapping[str, Any]) -> Published | None:
    """Return the test error of a config's `paper`, if it has one.

    Raises:
        ValueError: `paper` is not a test error.
    """
    node = config.get("paper")
    if node is None:
        return None
    entries = dict(node) if isinstance(node, Mapping) else {}
    error, sd = entries.pop("error", None), entries.pop("sd", None)
    if entries or not _is_percent(error) or not (sd is None or _is_percent(sd)):
        raise ValueError(f"paper must be null or {{error: PERCENT, sd: PERCENT or null}}, got {node}")
    return Published(float(error), None if sd is None else float(sd))


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return every setting that can change a run's results, by its dotted key.

    `model.routing` is in it although it is mostly a copy: directories and resumed runs go by this.
    """
    return dict(leaves({key: value for key, value in config.items() if key not in NOT_COMPARED}))


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `comparable` settings without the copy of `routing` in the model."""
    return comparable(without_routing_copy(config))


def without_routing_copy(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config without `model.routing` where that only repeats `routing`.

    `${routing}` in a model's YAML leaves two copies in the resolved config.
    """
    model = config.get("model")
    if not isinstance(model, Mapping) or "routing" not in model or model["routing"] != config.get("routing"):
        return dict(config)
    return {**config, "model": {key: value for key, value in model.items() if key != "routing"}}


def with_setting(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return the config with a new value of one dotted key; the model's copy of `routing` follows."""
    first, _, rest = key.partition(".")
    changed = {**config, first: with_setting(config.get(first, {}), rest, value) if rest else value}
    if first == "routing" and "model" in changed:
        changed["model"] = {**changed["model"], "routing": changed["routing"]}
    return changed


class Change(NamedTuple):
    """A setting that differs between two configs."""

    key: str
    old: Any
    new: Any


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    """Yield the settings in which two `comparable` configs differ, in the order of their keys."""
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield Change(key, old.get(key), new.get(key))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each setting in which two `comparable` configs differ."""
    for change in changes(old, new):
        yield f"{change.key}: was {change.old!r}, is {change.new!r}"


def without(settings: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Return the settings without some keys: runs that then are equal are repetitions of each other."""
    return {key: value for key, value in settings.items() if key not in keys}


def fingerprint(settings: Any) -> str:
    """Return eight hexadecimal digits, the same for equal settings in every process."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:8]


def _is_percent(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 100


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of every setting but the folders of datasets."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" not in ROOTS:
            yield f"{prefix}{key}", value
