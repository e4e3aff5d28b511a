"""The config of a run directory, made available to Hydra like conf/."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from capsexp.config.compose import FAILURES, GROUPS, REPLACE, compose, to_plain
from capsexp.config.overrides import quoted, value
from capsexp.errors import UserError

STORED = "stored"  # name, in every group, of what a run directory's config holds


def register_saved_config(
    overrides: Sequence[str], *, command: str, groups: Mapping[str, str] | None = None, **extra: Any
) -> None:
    """Make the config of `run=DIR` the root config `COMMAND_run`, with some keys of the command's own.

    Args:
        overrides: as typed.
        command: of capsexp.
        groups: config groups that a run does not have, with their option; `???` for one that must be chosen.
        extra: keys and their values.

    Raises:
        UserError: there is no such run, or its config cannot be read.
    """
    run = value(overrides, "run")
    if not isinstance(run, str):
        raise UserError(f"capsexp {command} needs a run: capsexp {command} run=DIR")
    path = Path(run) / ".hydra" / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is not the directory of a run: there is no {path}")
    try:
        stored = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (*FAILURES, YAMLError, ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(stored, dict):
        raise UserError(f"{path} holds no config")
    keyed = {str(key): value for key, value in stored.items()}
    store_as_primary(keyed, extra={"run": None, **extra}, groups=groups or {}, name=f"{command}_run")


def load_saved_config(path: Path) -> dict[str, Any]:
    """The plain config of a run, as its own directory has it.

    Raises:
        UserError: there is no such run, or its config cannot be read.
    """
    words = [f"run={quoted(path)}"]
    register_saved_config(words, command="other")
    return to_plain(compose("other_run", words, config_dir=None))


def store_as_primary(
    stored: dict[str, Any], *, extra: dict[str, Any], name: str, groups: Mapping[str, str] | None = None
) -> None:
    """Register a run's own config as the root config `name`, each of its groups as the option `stored`.

    Hydra then treats it like conf/: `capsexp eval run=DIR dataset=fashion_mnist routing.iterations=5` works.
    """
    store = ConfigStore.instance()
    own = [group for group in GROUPS if isinstance(stored.get(group), dict)]
    # `hydra`, `defaults` and `plugins` of a stored config would let a run directory start code of its own;
    # the `defaults` of a group too: they can place another group's keys at `hydra`.
    for group in own:
        node = {key: value for key, value in stored[group].items() if key != "defaults"}
        store.store(group=group, name=STORED, node=node, **REPLACE)
    root = {key: value for key, value in stored.items() if key not in (*own, "hydra", "defaults", "plugins")}
    logging = [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
    options = {**dict.fromkeys(own, STORED), **(groups or {})}
    defaults = [*({group: option} for group, option in options.items()), "_self_", *logging]
    quiet = {"run": {"dir": "."}, "output_subdir": None, "job": {"name": name, "chdir": False}}
    node = {"defaults": defaults, **root, **extra, "plugins": [], "hydra": quiet}
    store.store(name=name, node=node, **REPLACE)
