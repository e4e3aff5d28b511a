"""A run's config as flat settings: what a resumed run is held to, and what runs are compared by."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

# What does not change a run's results, so a resumed run may have it otherwise.
NOT_COMPARED = ("run", "resume", "output_root", "data_root", "plugins", "device")
ROOTS = ("dataset.root", "dataset.source.root")


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


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" not in ROOTS:
            yield f"{prefix}{key}", value
