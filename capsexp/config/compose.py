"""From a command line to a composed config, with every mistake in it found at once.

Hydra stops at the first override that it cannot apply. `compose` judges each override by itself, so all
of them are reported together, each with the nearest right name.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from capsexp.config.naming import job_name
from capsexp.errors import UserError, nearest

GROUPS = ("device", "trainer", "dataset", "routing", "loss", "optimizer", "model", "experiment")
EXTRAS = {"submitit": "slurm", "ray": "ray", "optuna": "optuna"}  # by what Hydra's plugins call themselves
HYDRA_1_3 = hydra.__version__ < "1.4"
VERSION_BASE: dict[str, str] = {"version_base": "1.3"} if HYDRA_1_3 else {}
REPLACE: dict[str, Any] = {} if HYDRA_1_3 else {"replace": True}  # 1.3 replaces without a word
FAILURES = (HydraException, OmegaConfBaseException)

# Newer versions have another name for it, which in older ones belongs to something else.
getattr(OmegaConf, "register_new_resolver" if HYDRA_1_3 else "register_resolver")(
    "capsexp.job_name", job_name, replace=True
)


def conf_dir() -> str:
    """The folder conf/: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(
        f"conf/train.yaml is neither in {package} nor beside it: the installation is broken"
    )


def compose(
    config_name: str, overrides: Sequence[str], *, config_dir: str | None, sweep: bool = False
) -> DictConfig:
    """The config that Hydra will hand over, its `hydra` node included.

    In a sweep, an override of several values (`key=a,b`) stands with its first; `swept_variants` gives
    the others.

    Args:
        config_name: root config, such as `train`.
        overrides: as typed after the subcommand.
        config_dir: the user's own folder of configs (`-cd`), searched after conf/.
        sweep: whether overrides may hold several values (`-m`).

    Raises:
        UserError: one line for every override that does not fit.
    """
    with searching(config_dir):
        parsed, problems = parse_all(overrides)
        problems += [] if sweep else [line for one in parsed for line in _sweep_problems(one)]
        try:
            composed = _compose(config_name, [_texts(one)[0] for one in parsed])
        except UserError as error:
            raise UserError(*problems, *(_diagnosis(config_name, parsed) or error.problems)) from None
        problems += table_problems(composed)
        if problems:
            raise UserError(*problems)
        return composed


def table_problems(composed: DictConfig) -> Iterator[str]:
    """A table of recipes (see capsexp/cli/sweep/tables.py) is no run."""
    if rows := composed.get("table"):
        told = f"experiment={composed.hydra.runtime.choices.experiment} is a table of {len(rows)} recipes"
        yield f"{told}: `capsexp train -m` trains them all, experiment={rows[0]} is the first of them"


def swept_variants(overrides: Sequence[str], *, config_dir: str | None) -> list[list[str]]:
    """Overrides of single jobs that between them use every swept value once.

    One value is varied at a time: the cost of checking a sweep grows with its values, not their product.
    """
    with searching(config_dir):
        parsed, _ = parse_all(overrides)
        first = [_texts(one)[0] for one in parsed]
        return [
            [*first[:place], text, *first[place + 1 :]]
            for place, one in enumerate(parsed)
            for text in _texts(one)[1:]
        ]


def constants_and_swept(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides with one value, and the keys of those with several."""
    with searching(None):
        parsed, _ = parse_all(overrides)
        constants = [str(one.input_line) for one in parsed if not one.is_sweep_override()]
        return constants, [one.key_or_group for one in parsed if one.is_sweep_override()]


def with_constants_swept(overrides: Sequence[str], *, config_dir: str | None) -> list[str]:
    """The overrides of a sweep over groups, each constant made a sweep of its one value; others as they are.

    Before its first job Hydra composes a config without anything swept, and would refuse a key that only a
    swept choice has: `experiment=a,b dataset.cameras=left`.
    """
    with searching(config_dir):
        parsed, _ = parse_all(overrides)
        if not any(one.is_sweep_override() and _options(one.key_or_group) for one in parsed):
            return list(overrides)
        # For another sweeper, such as a search, a choice of one would be one more thing to search for.
        if any(one.key_or_group == "hydra/sweeper" for one in parsed):
            return list(overrides)
        return [_as_sweep(one) for one in parsed]


def to_plain(config: DictConfig) -> dict[str, Any]:
    """The config as plain dicts, lists and values, interpolations resolved, without the `hydra` node.

    Raises:
        UserError: a value that must be set is not, or an interpolation leads nowhere.
    """
    config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
        if missing:
            raise UserError(*(f"{key} has no value yet: set {key}=…" for key in missing))
        resolved = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def one_line(error: BaseException) -> str:
    """Hydra's message without its hints for developers; often the cause says what is wrong."""
    texts = [str(error), str(error.__cause__ or "")]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    noise = ("full_key", "object_type", "provider=", "Config search path")
    return " ".join(dict.fromkeys(line for line in lines if line and not line.startswith(noise)))


@contextlib.contextmanager
def searching(config_dir: str | None) -> Iterator[None]:
    """Hydra looking into conf/, and into the user's own folder as its `-cd` does."""
    if config_dir is not None and not os.path.isdir(config_dir):
        raise UserError(f"-cd {config_dir}: there is no such folder")
    with hydra.initialize_config_dir(conf_dir(), **VERSION_BASE):
        if config_dir is not None:
            loader = GlobalHydra.instance().config_loader()
            assert isinstance(loader, ConfigLoaderImpl)
            folder = f"file://{os.path.abspath(config_dir)}"
            loader.config_search_path.append("command-line", folder, anchor=SearchPathQuery(provider="main"))
            loader.repository.initialize_sources(loader.config_search_path)
        yield


def _compose(config_name: str, overrides: list[str]) -> DictConfig:
    try:
        return hydra.compose(config_name, overrides, return_hydra_config=True)
    except MissingConfigException as error:
        missing = str(error.missing_cfg_file).rpartition("/")[2]
        raise UserError(one_line(error) + _installation(missing, [])) from None
    except (*FAILURES, ValueError) as error:  # ValueError: a group given something that is no name
        raise UserError(one_line(error)) from None


def _diagnosis(config_name: str, overrides: list[Override]) -> list[str]:
    """What is wrong with each override by itself."""
    groups = [one for one in overrides if _options(one.key_or_group)]
    problems = [line for one in groups for line in _choice_problems(one)]
    fitting = [_texts(one)[0] for one in groups if not list(_choice_problems(one))]
    try:
        base = _compose(config_name, fitting)
    except UserError as error:
        return problems or list(error.problems)
    others = [one for one in overrides if one not in groups]
    return problems + [line for one in others for line in _key_problems(one, base)]


def parse_all(overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
    """The overrides that can be read, and a line for each that cannot; while `searching`."""
    parser, parsed, problems = OverridesParser.create(), [], []
    for text in overrides:
        try:
            one = parser.parse_override(text)
            one.config_loader = GlobalHydra.instance().config_loader()  # for glob(…)
            if not one.key_or_group:
                raise HydraException("no key")
            parsed.append(one)
        except FAILURES as error:
            problems.append(f"cannot read {text!r}: {one_line(error)}; an override reads KEY=VALUE")
    return parsed, problems


def _sweep_problems(override: Override) -> Iterator[str]:
    if override.is_sweep_override():
        text = override.input_line
        yield f"{text}: several values make a sweep, which -m starts; a list is written in brackets"


def _options(group: str) -> list[str]:
    return GlobalHydra.instance().config_loader().get_group_options(group)


def override_values(override: Override) -> list[Any]:
    """What the override sets: one value, or all of a sweep; of an interval its ends."""
    if not override.is_sweep_override():
        return [override.value()]
    return list(override.sweep_iterator()) if override.is_discrete_sweep() else _ends(override)


def _texts(override: Override) -> list[str]:
    """The same, as overrides of a single job."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    choices = override.sweep_string_iterator() if override.is_discrete_sweep() else _ends(override)
    return [f"{override.get_key_element()}={choice}" for choice in choices]


def _as_sweep(override: Override) -> str:
    """A constant as a sweep of one value, where that can be."""
    text = str(override.input_line)
    key, _, value = text.partition("=")
    if override.is_sweep_override() or override.is_delete() or override.key_or_group.startswith("hydra"):
        return text
    if override.value() is None:  # no choice of Hydra's; added, it asks for no key
        return f"++{key.lstrip('+')}=null"
    return f"{key}=choice({value})" if value else text


def _ends(override: Override) -> list[Any]:
    """The ends of an interval, in which only a search such as optuna's can choose."""
    interval = override.value()
    assert isinstance(interval, IntervalSweep)
    return [interval.start, interval.end]


def _choice_problems(override: Override) -> Iterator[str]:
    options = _options(override.key_or_group)
    for choice in [] if override.is_delete() else override_values(override):
        if not isinstance(choice, list) and choice not in options:
            name = "null" if choice is None else str(choice)
            hint = _installation(name, options) or nearest(name, options)
            yield f"{override.key_or_group}={name}: no such option{hint}"


def _installation(name: str, options: Sequence[str]) -> str:
    """How to get the plugin that an option of Hydra's belongs to; empty if it is there, or not known."""
    for start, extra in EXTRAS.items():
        if name.startswith(start) and not any(option.startswith(start) for option in options):
            return f": it comes with capsexp's extra [{extra}]"
    return ""


def _key_problems(override: Override, base: DictConfig) -> Iterator[str]:
    if override.is_add() or override.is_force_add():
        return
    keys = set(_flat(OmegaConf.to_container(base, resolve=False)))
    if override.key_or_group not in keys:
        known = {key for key in keys if not key.startswith("hydra")} | set(GROUPS)
        yield f"unknown key {override.key_or_group!r}{nearest(override.key_or_group, known)}"


def _flat(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from _flat(value, f"{prefix}{key}.")
