"""Compose a config from a command line, and report every mistake in it at once.

Hydra stops at the first override that it cannot apply. `compose` checks each override by itself, so all
of them are reported together, each with the nearest valid name.
"""

import contextlib
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from capsexp.config import yaml_files
from capsexp.config.diagnosis import diagnose, plugin_hint, sweep_problems
from capsexp.config.naming import job_name
from capsexp.config.overrides import one_line, parse_all, single_values
from capsexp.config.settings import GROUPS, STORED
from capsexp.config.values import ROOT
from capsexp.errors import UserError, nearest

VERSION_BASE = "1.3"  # the version of Hydra whose defaults apply

OmegaConf.register_new_resolver("capsexp.job_name", job_name, replace=True)
yaml_files.register()


def conf_dir() -> str:
    """Return the folder conf/: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(
        f"conf/train.yaml is neither in {package} nor beside it: the installation is broken"
    )


def option_names(group: str) -> list[str]:
    """Return the options of a config group in conf/, sorted."""
    return sorted(path.stem for path in Path(conf_dir(), group).glob("*.yaml"))


def compose(
    config_name: str, overrides: Sequence[str], *, config_dir: str | None, sweep: bool = False
) -> DictConfig:
    """Compose the config that Hydra will pass to a job, with its `hydra` node.

    In a sweep, an override of several values (`key=a,b`) counts with its first; see
    `capsexp.config.sweeps.swept_variants` for the others.

    Args:
        config_name: root config, such as `train`.
        overrides: as typed after the command.
        config_dir: the user's own folder of configs (`-cd`), searched after conf/.
        sweep: whether overrides may have several values (`-m`).

    Raises:
        UserError: one line for every override that does not fit.
    """
    with searching(config_dir):
        parsed, problems = parse_all(overrides)
        problems += [] if sweep else [line for override in parsed for line in sweep_problems(override)]
        try:
            composed = _compose(config_name, [single_values(override)[0] for override in parsed])
        except UserError as error:
            diagnosis = diagnose(parsed, lambda overrides: _compose(config_name, overrides))
            raise UserError(*problems, *(diagnosis or error.problems)) from None
        problems += table_problems(composed)
        added = {override.key_or_group for override in parsed if override.is_add()}  # by +KEY=VALUE
        problems += _recipe_problems(composed, added)
        if problems:
            raise UserError(*problems)
        return composed


def table_problems(composed: DictConfig) -> Iterator[str]:
    """Yield a line if the config is a table of recipes (see capsexp/cli/sweep/tables.py), which is no run."""
    rows = composed.get("table")
    if rows is None:
        return
    if not isinstance(rows, ListConfig) or not rows or not all(isinstance(row, str) for row in rows):
        yield f"table: must be a list of recipes, got {rows!r}"
    else:
        table = f"experiment={composed.hydra.runtime.choices.experiment} is a table of {len(rows)} recipes"
        yield f"{table}: `capsexp train -m` trains them all, experiment={rows[0]} is the first of them"


def _recipe_problems(composed: DictConfig, added: Collection[str]) -> Iterator[str]:
    """Yield a line for each key that a recipe adds at the root in place of a known one.

    Args:
        composed: the config.
        added: keys that the command line adds.
    """
    recipe = composed.hydra.runtime.choices.get("experiment")
    known = {*GROUPS, *ROOT, *added, "hydra", "table", "study"}
    for key in sorted(set(map(str, composed)) - known) if recipe not in (None, STORED) else ():
        hint = nearest(key, known)
        if hint.startswith(":") or isinstance(composed._get_node(key), DictConfig):
            yield f"experiment={recipe}: unknown key {key!r}{hint}"


def to_plain(config: DictConfig) -> dict[str, Any]:
    """Return the config as plain dicts, lists and values, interpolations resolved, without the `hydra` node.

    Raises:
        UserError: a value that must be set is not, or an interpolation names a missing key.
    """
    config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
        if missing:
            raise UserError(*(f"{key} has no value yet: set {key}=…" for key in missing))
        resolved = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(_with_key(error)) from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


@contextlib.contextmanager
def searching(config_dir: str | None) -> Iterator[None]:
    """Let Hydra search conf/ and, as its `-cd` does, the user's own folder."""
    if config_dir is not None and not os.path.isdir(config_dir):
        raise UserError(f"-cd {config_dir}: there is no such folder")
    with hydra.initialize_config_dir(conf_dir(), version_base=VERSION_BASE):
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
        raise UserError(one_line(error) + plugin_hint(missing, [])) from None
    except UserError:
        raise
    except RecursionError:
        raise UserError("a defaults list names its own config, maybe through others") from None
    except Exception as error:  # only Hydra works here, on what the user has typed and written
        raise UserError(_with_key(error)) from error


def _with_key(error: Exception) -> str:
    """Return the message of an error of Hydra or OmegaConf, and the key that it is about."""
    key = getattr(error, "full_key", None)
    return f"{key}: {one_line(error)}" if key else one_line(error)
