"""Paths as typed: signs that have a meaning in Hydra's grammar are quoted, and `~` is expanded."""

import os
import re
from collections.abc import Iterator
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Quote, QuotedString
from hydra.errors import HydraException

from capsexp.config.values import PATH_KEYS, PATH_LISTS

_UNREADABLE = object()


def with_typed_path(override: str, *, sweep: bool) -> str:
    """Return an override of a path so that Hydra reads the path that was typed; others are unchanged.

    Args:
        override: as typed, `KEY=VALUE`.
        sweep: whether a comma separates several values (`-m`).
    """
    key, _, text = override.partition("=")
    name = key.lstrip("+~")
    if not text or "@" in name or "/" in name:
        return override
    if name in PATH_LISTS:
        return f"{key}={_as_list(text)}"
    if name.rpartition(".")[2] not in PATH_KEYS:
        return override
    return f"{key}={_as_sweep(text) if sweep else _as_path(text)}"


def quoted(text: object) -> str:
    """Return a text or a path as a value in Hydra's grammar, read by Hydra and OmegaConf as it is."""
    return QuotedString(str(text).replace("${", "\\${"), Quote.single).with_quotes()


def expanded(path: str) -> str:
    """Return a path with `~` and `~USER` expanded; an unknown user's stays as it is."""
    return os.path.expanduser(path)


def _as_path(text: str) -> str:
    """Return one path, quoted where Hydra would not read it as typed."""
    value = _read(text)
    if value is _UNREADABLE or (isinstance(value, ChoiceSweep) and value.simple_form):
        return _quote(expanded(text))
    if isinstance(value, str) and value.startswith("~"):
        return _quote(expanded(value))
    return text


def _as_sweep(text: str) -> str:
    """Return the paths of a sweep, each quoted where that is needed."""
    if re.match(r"\w+\(", text):  # choice(…), glob(…)
        return text
    return ",".join(_as_path(part.strip()) for part in _parts(text))


def _as_list(text: str) -> str:
    """Return a list of paths, each quoted where that is needed."""
    if not (text.startswith("[") and text.endswith("]")):
        return text
    return f"[{','.join(_as_path(part.strip()) for part in _parts(text[1:-1]))}]"


def _parts(text: str) -> Iterator[str]:
    """Yield the parts between the commas that are not inside quotes."""
    for match in re.finditer(r"""((?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^,])+)""", text):
        yield match.group(0)


def _quote(path: str) -> str:
    """Quote a path; interpolations in it keep their meaning."""
    return QuotedString(path, Quote.single).with_quotes()


def _read(text: str) -> Any:
    try:
        return OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return _UNREADABLE
