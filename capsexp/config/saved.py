"""The config of a run directory, made available to Hydra like conf/."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from capsexp.config.compose import FAILURES, GROUPS, REPLACE, to_plain
from capsexp.config.overrides import value
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
    stored = _read(Path(run))
    store_as_primary(stored, extra={"run": None, **extra}, groups=groups or {}, name=f"{command}_run")


def load_saved_config(path: Path) -> dict[str, Any]:
    """Return the plain config of a run, as its own directory has it. Hydra's global state stays as it is.

    Raises:
        UserError: there is no such run, or its config cannot be read.
    """
    groups, root = _divided(_read(path))
    return to_plain(OmegaConf.create({**root, **groups, "run": str(path), "plugins": []}))


def _read(run: Path) -> dict[str, Any]:
    """Return the stored config of a run directory, its interpolations unresolved."""
    path = run / ".hydra" / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is not the directory of a run: there is no {path}")
    try:
        stored = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (*FAILURES, YAMLError, ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(stored, dict):
        raise UserError(f"{path} holds no config")
    return {str(key): value for key, value in stored.items()}


def _divided(stored: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide a stored config into its groups and the other keys, without those that could start code.

    `hydra`, `defaults` and `plugins` of a stored config would let a run directory run its own code; so would
    the `defaults` of a group, which can place another group's keys at `hydra`.
    """
    names = [group for group in GROUPS if isinstance(stored.get(group), dict)]
    groups = {
        name: {key: value for key, value in stored[name].items() if key != "defaults"} for name in names
    }
    root = {
        key: value for key, value in stored.items() if key not in (*names, "hydra", "defaults", "plugins")
    }
    return groups, root


def store_as_primary(
    stored: dict[str, Any], *, extra: dict[str, Any], name: str, groups: Mapping[str, str] | None = None
) -> None:
    """Register a run's own config as the root config `name`, each of its groups as the option `stored`.

    Hydra then treats it like conf/: `capsexp eval run=DIR dataset=fashion_mnist routing.iterations=5` works.
    """
    store = ConfigStore.instance()
    stored_groups, root = _divided(stored)
    for group, node in stored_groups.items():
        store.store(group=group, name=STORED, node=node, **REPLACE)
    logging = [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
    options = {**dict.fromkeys(stored_groups, STORED), **(groups or {})}
    defaults = [*({group: option} for group, option in options.items()), "_self_", *logging]
    quiet = {"run": {"dir": "."}, "output_subdir": None, "job": {"name": name, "chdir": False}}
    node = {"defaults": defaults, **root, **extra, "plugins": [], "hydra": quiet}
    store.store(name=name, node=node, **REPLACE)
