"""Explain the overrides that Hydra refuses: one line each, with the nearest valid name."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from capsexp.config.overrides import group_options, override_values, single_values
from capsexp.config.settings import GROUPS
from capsexp.errors import UserError, nearest

EXTRAS = {"submitit": "slurm", "ray": "ray", "optuna": "optuna"}  # start of a Hydra option: extra of capsexp


def diagnose(overrides: Sequence[Override], compose: Callable[[list[str]], DictConfig]) -> list[str]:
    """Return the problems of each override, checked by itself.

    Args:
        overrides: of a config that cannot be composed.
        compose: composes the same root config with other overrides.
    """
    groups = [override for override in overrides if group_options(override.key_or_group)]
    problems = [line for override in groups for line in _choice_problems(override)]
    fitting = [single_values(override)[0] for override in groups if not list(_choice_problems(override))]
    try:
        base = compose(fitting)
    except UserError as error:
        return problems or list(error.problems)
    others = [override for override in overrides if override not in groups]
    return problems + [line for override in others for line in _key_problems(override, base)]


def sweep_problems(override: Override) -> Iterator[str]:
    """Yield a line if the override has several values and so needs -m."""
    if override.is_sweep_override():
        text = override.input_line
        yield f"{text}: several values make a sweep, which -m starts; a list is written in brackets"


def plugin_hint(name: str, options: Sequence[str]) -> str:
    """Return which extra installs the Hydra plugin of an option; empty if it is installed or unknown."""
    for start, extra in EXTRAS.items():
        if name.startswith(start) and not any(option.startswith(start) for option in options):
            return f": it comes with capsexp's extra [{extra}]"
    return ""


def _choice_problems(override: Override) -> Iterator[str]:
    options = group_options(override.key_or_group)
    for choice in [] if override.is_delete() else override_values(override):
        if not isinstance(choice, list) and choice not in options:
            name = "null" if choice is None else str(choice)
            hint = plugin_hint(name, options) or nearest(name, options)
            yield f"{override.key_or_group}={name}: no such option{hint}"


def _key_problems(override: Override, base: DictConfig) -> Iterator[str]:
    if override.is_add() or override.is_force_add():
        return
    keys = set(_dotted_keys(OmegaConf.to_container(base, resolve=False)))
    if override.key_or_group not in keys:
        known = {key for key in keys if not key.startswith("hydra")} | set(GROUPS)
        yield f"unknown key {override.key_or_group!r}{nearest(override.key_or_group, known)}"


def _dotted_keys(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from _dotted_keys(value, f"{prefix}{key}.")
