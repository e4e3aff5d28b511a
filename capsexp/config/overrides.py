"""Overrides (`KEY=VALUE`) as typed after a command: parse them, and read the values that they set."""

import itertools
import math
import re
import shlex
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from capsexp.config.typed_paths import expanded, with_typed_path
from capsexp.errors import UserError, first_line

MOST_VALUES = 10_000
"""Values in one list of a sweep, at most: each is a job of seconds or more."""
FAILURES = (HydraException, OmegaConfBaseException)


def parse(arguments: Sequence[str]) -> tuple[Namespace, list[str], list[str]]:
    """Divide the arguments after a command into Hydra's options and overrides, in any order.

    Hydra itself takes overrides from one place only: either before its options or after them.

    Returns:
        Hydra's options as an object, the same as typed, and the overrides.

    Raises:
        UserError: an option that does not exist or has no or a wrong value.
    """
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign] # argparse would print Hydra's usage
    parser.allow_abbrev = False
    options = parser.parse_intermixed_args(list(arguments))
    if problems := list(_option_problems(options)):
        raise UserError(*problems)
    flags = list(arguments)
    for text in options.overrides:
        flags.remove(text)
    if options.config_dir is not None:
        folder = expanded(options.config_dir)
        flags = [re.sub(f"{re.escape(options.config_dir)}$", lambda _: folder, text) for text in flags]
        options.config_dir = folder
    return options, flags, [with_typed_path(text, sweep=options.multirun) for text in options.overrides]


def _option_problems(options: Namespace) -> Iterator[str]:
    if options.experimental_rerun is not None:
        yield "--experimental-rerun is switched off: it loads a pickle; use run=DIR"
    if options.multirun and (options.cfg or options.info):
        yield "--cfg and --info show one run: leave -m out"
    if options.config_path is not None:
        yield "-cp is switched off: capsexp has its own conf/; -cd DIR adds a folder of your own to it"
    if options.shell_completion:
        yield "-sc follows capsexp itself: capsexp -sc install=bash"
    if options.multirun and options.run:
        yield "-r and -m exclude each other"
    if (options.package or options.resolve) and not options.cfg:
        yield "-p and --resolve are for --cfg: capsexp train --cfg job -p model"


def plugins(overrides: Sequence[str]) -> list[str]:
    """Return `plugins=[…]` of this command line; a saved config cannot set it."""
    plugins = value(overrides, "plugins")
    return [str(name) for name in plugins] if isinstance(plugins, list) else []


def value(overrides: Sequence[str], key: str) -> Any:
    """Return what the last override of a key sets it to; None without one."""
    texts = [text for text in overrides if text.partition("=")[0] == key]
    try:
        return OverridesParser.create().parse_override(texts[-1]).value() if texts else None
    except HydraException as error:
        raise UserError(_unreadable(texts[-1], error)) from None


def parse_all(overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Parse overrides; needs `capsexp.config.compose.searching`.

    Returns:
        The overrides that can be read, and one line for each that cannot.
    """
    parser, parsed, problems = OverridesParser.create(), [], []
    for text in overrides:
        try:
            override = parser.parse_override(text)
            override.config_loader = GlobalHydra.instance().config_loader()  # for glob(…)
            if not override.key_or_group:
                raise HydraException("no key")
            if problem := unusable_values(override):
                problems.append(f"{text}: {problem}")
            else:
                parsed.append(override)
        except FAILURES as error:
            problems.append(_unreadable(text, error))
    return parsed, problems


def unusable_values(override: Override) -> str:
    """Return why no job can be made of the values that a sweep lists; empty if there is no reason."""
    if not override.is_sweep_override():
        return ""
    if not override.is_discrete_sweep():
        low, high = _ends(override)
        return "" if -math.inf < low <= high < math.inf else "an interval goes from a number to a larger one"
    try:
        values = list(itertools.islice(override.sweep_string_iterator(), MOST_VALUES + 1))
    except (ValueError, ArithmeticError) as error:
        return first_line(error) if isinstance(error, ValueError) else "a range takes finite numbers"
    if not values:
        options = ", ".join(group_options(override.key_or_group))
        return f"no option fits; choose from {options}" if options else "the list of values is empty"
    return f"more than {MOST_VALUES:,} values" if len(values) > MOST_VALUES else ""


def override_values(override: Override) -> list[Any]:
    """Return what the override sets: one value, or all of a sweep; of an interval its ends."""
    if not override.is_sweep_override():
        return [override.value()]
    return list(override.sweep_iterator()) if override.is_discrete_sweep() else _ends(override)


def single_values(override: Override) -> list[str]:
    """Return `override_values` as overrides of a single job."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    choices = override.sweep_string_iterator() if override.is_discrete_sweep() else _ends(override)
    return [f"{override.get_key_element()}={choice}" for choice in choices]


def group_options(group: str) -> list[str]:
    """Return the options of a config group; none if there is no such group."""
    return GlobalHydra.instance().config_loader().get_group_options(group)


def one_line(error: BaseException) -> str:
    """Return Hydra's message without its hints for developers; often the cause has the reason."""
    texts = [str(error), str(error.__cause__ or "")]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    noise = ("full_key", "object_type", "provider=", "Config search path", "LexerNoViable", "InputMismatch")
    return " ".join(dict.fromkeys(line for line in lines if line and not line.startswith(noise)))


def _unreadable(text: str, error: BaseException) -> str:
    """Return the line about an override that cannot be read, with the quoting that helps."""
    key, _, typed = text.partition("=")
    hint = "; an override has the form KEY=VALUE"
    if key and typed:
        as_text = QuotedString(typed, Quote.double).with_quotes()
        hint = f"; as a text it is written {shlex.quote(f'{key}={as_text}')}"
    return f"cannot read {text!r}: {one_line(error)}{hint}"


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message} (--hydra-help lists the options)")


def _ends(override: Override) -> list[Any]:
    """Return the ends of an interval. Only a search, such as optuna's, can choose a value inside."""
    interval = override.value()
    assert isinstance(interval, IntervalSweep)
    return [interval.start, interval.end]
