"""Paths in a config: a run stores them absolute, so that they name the same folder from everywhere."""

import os
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from capsexp.config.settings import comparable

PATHS = ("path", "root", "data_root")
"""Settings that are paths, at any depth."""


def with_absolute_paths(node: Any) -> Any:
    """Return a config with its paths absolute and `~` expanded; interpolations stay as they are.

    A `path` beside a `root` is below that root, so it stays relative.
    """
    if isinstance(node, list):
        return [with_absolute_paths(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    return {key: _absolute(node, key) for key in node}


def absolute_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `comparable` settings with absolute paths; earlier versions stored paths as typed."""
    return comparable(with_absolute_paths(config))


def stored_form(composed: DictConfig, resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a composed config for its run directory: absolute paths, and the data root as a value.

    Args:
        composed: with its interpolations.
        resolved: the same config with every value.
    """
    content = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(content, dict)
    if "data_root" in content:
        content["data_root"] = resolved["data_root"]
    return dict(with_absolute_paths(content))


def _absolute(node: Mapping[str, Any], key: str) -> Any:
    value = node[key]
    is_path = key in PATHS and isinstance(value, str) and value != "" and "${" not in value
    if not is_path or (key == "path" and "root" in node):
        return with_absolute_paths(value)
    return os.path.abspath(os.path.expanduser(value))
