"""Config values held to the signature of the target that gets them, before anything is built."""

import collections.abc
import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any

from capsexp.errors import nearest

_SEQUENCES = (list, tuple, collections.abc.Sequence)


def signature_problems(
    target: Any, given: dict[str, Any], at: str, *, run_time: set[str], partial: bool
) -> Iterator[str]:
    """What is wrong with the keys and values that a config gives to a target.

    Args:
        target: a class or function.
        given: its arguments as the config has them, nested parts still as nodes.
        at: the node's key, for messages.
        run_time: arguments that the config must not give, because only a run knows them.
        partial: whether more arguments follow, so that none is missing yet.
    """
    parameters = inspect.signature(target).parameters
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    for key, value in given.items():
        if (key not in parameters and not takes_all) or key in run_time:
            yield f"{at}.{key}: {target.__name__} takes no {key!r}{nearest(key, set(parameters) - run_time)}"
        elif not fits(value, _annotations(target).get(key, Any)):
            wanted = _describe(_annotations(target)[key])
            yield f"{at}.{key}: must be {wanted}, got {value!r}"
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = {name for name, one in parameters.items() if one.default is one.empty and one.kind in kinds}
    for name in sorted(required - set(given) - run_time) if not partial else ():
        yield f"{at}.{name}: {target.__name__} needs a value for it"


def _annotations(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except NameError:  # an annotation that exists only for type checkers: nothing to hold values to
        return {}


def fits(value: Any, wanted: Any) -> bool:
    """Whether a config value can stand for an annotation; unknown annotations accept everything."""
    if isinstance(value, dict):  # a node to be built: the object has to show for itself
        return True
    origin = typing.get_origin(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in typing.get_args(wanted))
    if origin is typing.Literal:
        return value in typing.get_args(wanted)
    if wanted in (int, float):
        numbers = (int,) if wanted is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool)
    if wanted in _SEQUENCES or origin in _SEQUENCES:
        items = [one for one in typing.get_args(wanted) if one is not ...] or [Any]
        return isinstance(value, list) and all(any(fits(item, one) for one in items) for item in value)
    if wanted in (bool, str, type(None)):
        return isinstance(value, wanted)
    return not _is_part(wanted)


def _is_part(wanted: Any) -> bool:
    """Whether an annotation asks for what only a node can describe: a callable, or one of these classes."""
    if typing.get_origin(wanted) is collections.abc.Callable:
        return True
    return inspect.isclass(wanted) and wanted.__module__.partition(".")[0] in ("capsexp", "torch")


def _describe(wanted: Any) -> str:
    if typing.get_origin(wanted) is typing.Literal:
        return " or ".join(repr(one) for one in typing.get_args(wanted))
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return " or ".join(_describe(one) for one in typing.get_args(wanted))
    if wanted in _SEQUENCES or typing.get_origin(wanted) in _SEQUENCES:
        items = [_describe(one) for one in typing.get_args(wanted) if one is not ...]
        return f"a list of {' or '.join(dict.fromkeys(items))}" if items else "a list"
    if _is_part(wanted):
        return "a node with a _target_"
    return "null" if wanted is type(None) else getattr(wanted, "__name__", str(wanted))
