"""Configs that a run directory stores are plain data: reading one runs no resolver.

`${oc.env:NAME}` in a stranger's config would copy an environment variable into evaluations.jsonl.
"""

import re
from collections.abc import Mapping
from typing import Any

# `${a.b}` refers to another key of the config; the two variables set folders, as in conf/train.yaml.
_ALLOWED = re.compile(r"\$\{(?:[\w.]+|oc\.env:CAPSEXP_(?:DATA|OUTPUTS)(?:,[^${}]*)?)\}")
_MISSING = object()


def without_resolvers(composed: Any, resolved: Any) -> Any:
    """Return a composed config with references between its keys, and no other interpolations.

    Args:
        composed: the config, with interpolations, or a part of it.
        resolved: the same part of the config with their values, from resolved_config.yaml. A value that needs
            a resolver is taken from there; if it is missing, the text of the interpolation is the value.
    """
    if isinstance(composed, Mapping):
        parts = resolved if isinstance(resolved, Mapping) else {}
        return {key: without_resolvers(child, parts.get(key, _MISSING)) for key, child in composed.items()}
    if isinstance(composed, list):
        same = isinstance(resolved, list) and len(resolved) == len(composed)
        items = resolved if same else [_MISSING] * len(composed)
        return [without_resolvers(child, item) for child, item in zip(composed, items, strict=True)]
    if not isinstance(composed, str) or "${" not in _ALLOWED.sub("", composed):
        return composed
    return literal(composed if resolved is _MISSING else resolved)


def literal(value: Any) -> Any:
    """Return a value as OmegaConf's text for it: `${` is no interpolation there."""
    if isinstance(value, Mapping):
        return {key: literal(child) for key, child in value.items()}
    if isinstance(value, list):
        return [literal(child) for child in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"(\\*)\$\{", lambda match: f"{match[1] * 2}\\${{", value)
