"""The words after a subcommand: Hydra's options, overrides, and a few overrides that count by themselves."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from capsexp.errors import UserError


def parse(arguments: Sequence[str]) -> tuple[Namespace, list[str], list[str]]:
    """Hydra's options as an object and as words, and the overrides, which may stand among them.

    Hydra itself takes overrides from one place only: either before its options or after them.
    """
    options = get_args_parser().parse_intermixed_args(list(arguments))
    if options.experimental_rerun is not None:
        raise UserError("--experimental-rerun is switched off: it loads a pickle; use run=DIR")
    if options.multirun and (options.cfg or options.info):
        raise UserError("--cfg and --info show one run: leave -m out")
    flags = list(arguments)
    for text in options.overrides:
        flags.remove(text)
    return options, flags, list(options.overrides)


def plugins(overrides: Sequence[str]) -> list[str]:
    """`plugins=[…]` as it stands on this command line; from a stored config it would not count."""
    plugins = value(overrides, "plugins")
    return [str(name) for name in plugins] if isinstance(plugins, list) else []


def value(overrides: Sequence[str], key: str) -> Any:
    """What the last override of a key sets it to; None without one."""
    texts = [text for text in overrides if text.partition("=")[0] == key]
    try:
        return OverridesParser.create().parse_override(texts[-1]).value() if texts else None
    except HydraException as error:
        raise UserError(f"cannot read {texts[-1]!r}: {' '.join(str(error).split())}") from None


def quoted(path: Path) -> str:
    """A path as a value in Hydra's grammar, in which `=`, `,` and blanks mean something."""
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"
