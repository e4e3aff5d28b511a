"""Check config values against the signature of their target, before anything is built."""

import collections.abc
import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any

from capsexp.config.values import leaf_problems
from capsexp.errors import is_integer, is_number, nearest

_SEQUENCES = (list, tuple, collections.abc.Sequence)


def signature_problems(
    target: Any, arguments: dict[str, Any], at: str, *, run_time: set[str], partial: bool
) -> Iterator[str]:
    """Yield the problems of the keys and values that a config gives to a target.

    Args:
        target: a class or function.
        arguments: its arguments as the config has them; nested components are still nodes.
        at: the node's key, for messages.
        run_time: arguments that the config must not give, because only a run knows them.
        partial: whether more arguments follow, so that none is missing yet.
    """
    parameters = inspect.signature(target).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    annotations = _annotations(target)
    for key, value in arguments.items():
        if (key not in parameters and not takes_all) or key in run_time:
            yield f"{at}.{key}: {target.__name__} takes no {key!r}{nearest(key, set(parameters) - run_time)}"
        elif not fits(value, annotations.get(key, Any)):
            yield f"{at}.{key}: must be {_describe(annotations[key])}, got {value!r}"
        else:
            yield from leaf_problems(value, f"{at}.{key}")
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = {
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind in kinds
    }
    for name in sorted(required - set(arguments) - run_time) if not partial else ():
        yield f"{at}.{name}: {target.__name__} needs a value"


def _annotations(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except NameError:  # an annotation that exists only for type checkers
        return {}


def fits(value: Any, annotation: Any) -> bool:
    """Return whether a config value can stand for an annotation; unknown annotations accept everything."""
    if annotation is Any:
        return True
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, member) for member in typing.get_args(annotation))
    if isinstance(value, dict):  # `capsexp.config.build` checks what a node builds
        return not _is_plain(annotation) and ("_target_" in value or not _needs_node(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if annotation is int:
        return is_integer(value)
    if annotation is float:
        return is_number(value)
    if annotation in _SEQUENCES or origin in _SEQUENCES:
        if not isinstance(value, list) or len(value) != (_fixed_length(annotation) or len(value)):
            return False
        members = [member for member in typing.get_args(annotation) if member is not ...] or [Any]
        return all(any(fits(item, member) for member in members) for item in value)
    if collections.abc.Mapping in (annotation, origin) or dict in (annotation, origin):
        return False
    if annotation in (bool, str, type(None)):
        return isinstance(value, annotation)
    # Objects come from `capsexp.make`, never from a YAML file.
    return callable(value) or not _needs_node(annotation) or _is_instance(value, annotation)


def _is_plain(annotation: Any) -> bool:
    """Return whether only a number, a text, a switch or a list of them can be the value."""
    origin = typing.get_origin(annotation)
    plain = annotation in (int, float, str, bool, type(None)) or origin is typing.Literal
    return plain or annotation in _SEQUENCES or origin in _SEQUENCES


def _fixed_length(annotation: Any) -> int | None:
    """Return the length of a tuple that has one, such as `tuple[float, float]`."""
    members = typing.get_args(annotation)
    return len(members) if typing.get_origin(annotation) is tuple and ... not in members else None


def object_problems(target: Any, nodes: dict[str, Any], at: str) -> Iterator[str]:
    """Yield a line for each node that has built something else than its target takes, such as a layer.

    Args:
        target: a class or function.
        nodes: those of its arguments that were nodes, built.
        at: the node's key, for messages.
    """
    annotations = _annotations(target)
    for key, built in nodes.items():
        if not _is_built_for(built, annotations.get(key, Any)):
            yield f"{at}.{key}: must be {_describe(annotations[key])}, got a {type(built).__name__}"


def _is_built_for(built: Any, annotation: Any) -> bool:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(_is_built_for(built, member) for member in typing.get_args(annotation))
    if typing.get_origin(annotation) is collections.abc.Callable:
        return callable(built)
    return not inspect.isclass(annotation) or not _needs_node(annotation) or isinstance(built, annotation)


def _is_instance(value: Any, annotation: Any) -> bool:
    return inspect.isclass(annotation) and isinstance(value, annotation)


def _needs_node(annotation: Any) -> bool:
    """Return whether only a node can describe the value: a callable, or a class of capsexp or torch."""
    if typing.get_origin(annotation) is collections.abc.Callable:
        return True
    return inspect.isclass(annotation) and annotation.__module__.partition(".")[0] in ("capsexp", "torch")


def _is_tensor(annotation: Any) -> bool:
    """Return whether an annotation is `torch.Tensor`, which no YAML file can give."""
    return getattr(annotation, "__module__", "") == "torch" and annotation.__name__ == "Tensor"


def _describe(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(repr(option) for option in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(annotation) if not _is_tensor(member)]
        return " or ".join(_describe(member) for member in members)
    if annotation in _SEQUENCES or typing.get_origin(annotation) in _SEQUENCES:
        members = [_describe(member) for member in typing.get_args(annotation) if member is not ...]
        length = f"{_fixed_length(annotation)} values, each " if _fixed_length(annotation) else ""
        return f"a list of {length}{' or '.join(dict.fromkeys(members))}" if members else "a list"
    if inspect.isclass(annotation) and _needs_node(annotation):
        return f"a node with a _target_ that is a {annotation.__name__}"
    if _needs_node(annotation):
        return "a node with a _target_"
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
