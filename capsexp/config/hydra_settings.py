"""Checks of Hydra's own settings (`hydra.KEY=VALUE`) that Hydra does not make."""

import importlib.util
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf

from capsexp.config.values import path_problems

PATHS = ("run.dir", "sweep.dir", "sweep.subdir")
FREE = ("launcher", "sweeper", "callbacks", "hydra_logging", "job_logging", "env", "verbose")
"""Settings whose keys are not Hydra's."""


def hydra_problems(composed: DictConfig) -> Iterator[str]:
    """Yield the problems of a config's `hydra` node."""
    node = OmegaConf.to_container(composed.hydra, resolve=False)
    known = OmegaConf.to_container(OmegaConf.structured(HydraConf), resolve=False)
    assert isinstance(node, dict)
    assert isinstance(known, dict)
    yield from _unknown_keys(node, known, "hydra")
    for key in PATHS:
        section, _, name = key.partition(".")
        value = node[section][name]
        if not isinstance(value, str):
            yield f"hydra.{key}: must be a path, got {value!r}"
        elif "${" not in value:
            yield from path_problems(value, f"hydra.{key}")
    for key in ("launcher", "sweeper"):
        if not isinstance(node[key], dict):
            yield f"hydra.{key}: must be a node with a _target_, got {node[key]!r}"
    verbose = node["verbose"]
    names = [verbose] if isinstance(verbose, str) else verbose
    if not isinstance(verbose, bool) and not (isinstance(names, list) and all(map(_is_logger, names))):
        yield f"hydra.verbose: must be true, false or names of packages that write a log, got {verbose!r}"


def _unknown_keys(node: Mapping[Any, Any], known: Mapping[Any, Any], at: str) -> Iterator[str]:
    for key, value in node.items():
        if key not in known and key not in FREE:
            yield f"{at}.{key}: Hydra has no such setting"
        elif at == "hydra" and key not in FREE and isinstance(value, dict) and known[key]:
            yield from _unknown_keys(value, known[key], f"{at}.{key}")


def _is_logger(name: Any) -> bool:
    """Return whether a name is that of a logger, or of an installed package, which may have one."""
    if not isinstance(name, str) or not re.fullmatch(r"\w+(\.\w+)*", name):
        return False
    is_known = name in logging.root.manager.loggerDict
    return is_known or importlib.util.find_spec(name.partition(".")[0]) is not None
