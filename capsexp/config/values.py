"""Rules for the values of every setting, whatever its component: sizes of numbers, texts, paths, root keys.

`capsexp.config.signature` checks types, and constructors check the ranges that only they know.
"""

import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from capsexp.config.settings import published
from capsexp.errors import is_integer, is_number

LARGEST_FLOAT = 1e18
"""The square of a larger number is no float32."""

LARGEST_INT = 2**63 - 1
"""Torch and the files of a run hold integers of 64 bits."""

PATH_KEYS = ("run", "output_root", "data_root", "root", "path", "folder", "file", "source", "dir", "growth")
"""Last words of the keys whose value is a path. A list of paths is in `PATH_LISTS`."""

PATH_LISTS = ("study.others",)
LONGEST_NAME, LONGEST_PATH = 255, 3500  # bytes; the system allows 4096, and a run adds names of its own


def leaf_problems(value: Any, at: str) -> Iterator[str]:
    """Yield the problems of a value that no setting can have; lists and plain dicts are searched.

    Args:
        value: of the setting; a node with a `_target_` is left out, because it has its own settings.
        at: the setting's key.
    """
    if isinstance(value, Mapping):
        if "_target_" not in value:
            for key, child in value.items():
                yield from leaf_problems(child, f"{at}.{key}")
    elif isinstance(value, list):
        for place, child in enumerate(value):
            yield from leaf_problems(child, f"{at}[{place}]")
    elif is_number(value):
        yield from _number_problems(value, at)
    elif isinstance(value, str):
        is_path = at.rpartition(".")[2] in PATH_KEYS or at.partition("[")[0] in PATH_LISTS
        yield from path_problems(value, at) if is_path else _text_problems(value, at)


def path_problems(value: str, at: str) -> Iterator[str]:
    """Yield a line if no file or folder can have this path."""
    path = os.fsencode(os.path.abspath(value))
    if problems := list(_text_problems(value, at)):
        yield from problems
    elif len(path) > LONGEST_PATH or max(map(len, path.split(b"/"))) > LONGEST_NAME:
        limit = f"at most {LONGEST_NAME} bytes for each name and {LONGEST_PATH} in all"
        yield f"{at}: is too long for a path ({limit}), got {value[:40]}… of {len(path)} bytes"
    elif value.startswith("~") and os.path.expanduser(value) == value:
        user = value[1:].partition("/")[0]
        yield f"{at}: there is no user {user!r}, got {value}; for a folder of that name write ./{value}"


def root_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems of the settings that belong to no component."""
    for key, check in ROOT.items():
        if key in config:
            yield from check(config[key], key)


def _number_problems(value: int | float, at: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{at}: must be finite, got {value}"
    elif isinstance(value, float) and abs(value) > LARGEST_FLOAT:
        yield f"{at}: must be from -{LARGEST_FLOAT:g} to {LARGEST_FLOAT:g}, got {value:g}"
    elif isinstance(value, int) and abs(value) > LARGEST_INT:
        yield f"{at}: must be an integer of at most 64 bits, got {str(value)[:40]}"


def _text_problems(value: str, at: str) -> Iterator[str]:
    if not value.strip():
        yield f"{at}: must not be empty"
    elif re.search(r"[\x00-\x1f\x7f]", value):
        yield f"{at}: must not have control characters, got {value!r}"
    elif any("\ud800" <= sign <= "\udfff" for sign in value):
        yield f"{at}: must be text in UTF-8, got {value!r}"


def _path(value: Any, at: str) -> Iterator[str]:
    if isinstance(value, str):
        yield from path_problems(value, at)
    else:
        yield f"{at}: must be a path, got {value!r}; for a folder of that name write ./ before it"


def _path_or_null(value: Any, at: str) -> Iterator[str]:
    if value is not None:
        yield from _path(value, at)


def _seed(value: Any, at: str) -> Iterator[str]:
    if not is_integer(value) or value < 0:
        yield f"{at}: must be an integer >= 0, got {value!r}"
    else:
        yield from _number_problems(value, at)


def _resume(value: Any, at: str) -> Iterator[str]:
    if value not in ("auto", "force"):
        yield f"{at}: must be 'auto' or 'force', got {value!r}"


def _paper(value: Any, at: str) -> Iterator[str]:
    try:
        published({at: value})
    except ValueError as error:
        yield str(error)


def _plugins(value: Any, at: str) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"{at}: must be a list of packages, such as {at}=[my_package], got {value!r}"
        return
    for name in value:
        if not isinstance(name, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
            yield f"{at}: {name!r} is not the name of a package"
        elif (top := name.partition(".")[0]) in sys.stdlib_module_names:
            yield f"{at}: {name} belongs to Python, and is no package of classes for a config"
        elif top not in sys.modules and importlib.util.find_spec(top) is None:
            yield f"{at}: there is no package {top}; Python searches its installed packages and PYTHONPATH"


def _limit(value: Any, at: str) -> Iterator[str]:
    if value is not None and not _is_count(value):
        yield f"{at}: must be an integer >= 1 or null, got {value!r}"


def _top(value: Any, at: str) -> Iterator[str]:
    if not _is_count(value):
        yield f"{at}: must be an integer >= 1, got {value!r}"


def _weights(value: Any, at: str) -> Iterator[str]:
    is_step = _is_count(value) or (isinstance(value, str) and value.isdecimal()) or value == 0
    if value not in ("best", "last") and (isinstance(value, bool) or not is_step):
        yield f"{at}: must be best, last or the step of a checkpoint, got {value!r}"


def _switch(value: Any, at: str) -> Iterator[str]:
    if not isinstance(value, bool):
        yield f"{at}: must be true or false, got {value!r}"


def _is_count(value: Any) -> bool:
    return is_integer(value) and 1 <= value <= LARGEST_INT


ROOT: dict[str, Callable[[Any, str], Iterator[str]]] = {
    "resume": _resume,
    "paper": _paper,
    "seed": _seed,
    "run": _path_or_null,
    "output_root": _path,
    "data_root": _path,
    "plugins": _plugins,
    "limit": _limit,
    "top": _top,
    "weights": _weights,
    "reconstructions": _switch,
}
"""Settings of a run, and of single commands, by their key."""
