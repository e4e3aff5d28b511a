"""The saved config of a run directory: read it, and make it available to Hydra like conf/."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from capsexp.config.compose import to_plain
from capsexp.config.overrides import value
from capsexp.config.settings import GROUPS, STORED
from capsexp.config.stored import without_resolvers
from capsexp.config.values import root_problems
from capsexp.config.yaml_files import LARGEST_CONFIG, Loader
from capsexp.documents import damage
from capsexp.errors import UserError
from capsexp.files import read_regular

LARGEST_EXPANSION = 20_000  # values
LARGEST_INTEGER = 256  # bits
DEEPEST = 64  # levels
PLAIN = (str, int, float, type(None))  # True and False are ints

# Names that runs of earlier versions have in their config.
RENAMED_TARGETS = {
    "capsexp.device.": "capsexp.training.device.",
    "capsexp.preprocess.": "capsexp.data.preprocess.",
    "capsexp.trainer.": "capsexp.training.trainer.",
}
RENAMED_KEYS = {
    "model.mask": "model.decode",
    "model.identity": "model.init_identity",
    "model.noise": "model.init_noise",
    "loss.average": "loss.mean_over_classes",
    "dataset.preprocess.light": "dataset.preprocess.contrast_mean",
    "dataset.source.preprocess.light": "dataset.source.preprocess.contrast_mean",
}
RENAMED_VALUES = {  # by the new name of the key
    "dataset.preprocess.contrast_mean": {"picture": "image"},
    "dataset.source.preprocess.contrast_mean": {"picture": "image"},
}
# By class: keys that configs of earlier versions lack, with the values of conf/.
ADDED_KEYS: dict[str, dict[str, Any]] = {
    "capsexp.data.preprocess.Preprocess": {
        "shift_fill": "zeros",
        "rotation": 0,
        "scale": None,
        "shear": 0,
        "elastic": 0,
        "mixup": 0,
    },
    "capsexp.loss.cross_entropy.CrossEntropy": {"label_smoothing": 0.0},
    "capsexp.dataset.image_folder.ImageFolder": {"background": "auto", "white_level": None},
    "capsexp.model.dynamic_routing.CapsNet": {"transformation": "matrix"},
    "capsexp.training.trainer.Trainer": {"max_seconds": None, "best_by": None, "patience": None},
    "capsexp.model.em_routing.MatrixCapsNet": {
        "initialisation": "identity",
        "vote_bias": False,
        "norm": "none",
        "conv_norm": "none",
        "loss_input": "scores",
        "score_gain": None,
        "primary_kernel": 1,
        "primary_stride": 1,
        "share_positions": True,
    },
}


def read_saved(path: Path) -> dict[str, Any]:
    """Read a config that a run saved; see `parse_saved`.

    Raises:
        OSError: no such file, not a regular file, or too large.
        ValueError: it is not a config.
    """
    return parse_saved(read_regular(path, limit=LARGEST_CONFIG))


def parse_saved(text: bytes) -> dict[str, Any]:
    """Parse a config that a run saved, under the names of this version; interpolations stay as they are.

    Raises:
        ValueError: this is not the YAML of a config, or it is too large, too deep, or holds other values than
            a config can.
    """
    config = _construct(text)
    if not isinstance(config, dict):
        raise ValueError("it holds no keys")
    config = _with_renamed_keys(_with_renamed_targets({str(key): value for key, value in config.items()}))
    model = config.get("model")
    if isinstance(model, dict) and str(model.get("_target_")).startswith("capsexp.model."):
        model.setdefault("init_from", None)  # runs of earlier versions lack it
    return config


def parse_overrides(text: bytes) -> list[str]:
    """Parse the list of overrides that a run saved.

    Raises:
        ValueError: this is not the YAML of a list.
    """
    overrides = _construct(text)
    if not isinstance(overrides, list):
        raise ValueError("it holds no list")
    return [str(override) for override in overrides]


def _construct(text: bytes) -> Any:
    """Return the content of a YAML text.

    Raises:
        ValueError: it is no YAML, is too large, or its aliases make it much larger than the text.
    """
    if len(text) > LARGEST_CONFIG:
        raise ValueError(f"it is larger than {LARGEST_CONFIG} bytes")
    try:
        return _load(text)
    # The constructors of PyYAML let errors of Python out: `!!bool x` is a KeyError.
    except (yaml.YAMLError, RecursionError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def _load(text: bytes) -> Any:
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if b"&" in text and _expanded_size(node, {}) > LARGEST_EXPANSION:
            raise ValueError(f"its aliases (*NAME) stand for more than {LARGEST_EXPANSION} values")
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _expanded_size(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Return the number of values below a YAML node when every alias is replaced by what it stands for.

    Args:
        node: the node; an alias is the node that it stands for.
        sizes: by the identity of nodes seen before; None while a node is being counted.

    Raises:
        ValueError: an alias stands for a value that contains it.
    """
    if id(node) in sizes:
        size = sizes[id(node)]
        if size is None:
            raise ValueError("an alias (*NAME) stands for a value that contains it")
        return size
    sizes[id(node)] = None
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    pairs = (child if isinstance(child, tuple) else (child,) for child in children)
    size = 1 + sum(_expanded_size(child, sizes) for pair in pairs for child in pair)
    sizes[id(node)] = size
    return size


def _with_renamed_targets(node: Any, depth: int = 0) -> Any:
    if depth > DEEPEST:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    if isinstance(node, list):
        return [_with_renamed_targets(item, depth + 1) for item in node]
    if not isinstance(node, dict):
        return _plain(node)
    node = {_plain(key): _with_renamed_targets(value, depth + 1) for key, value in node.items()}
    target = node.get("_target_")
    for old, new in RENAMED_TARGETS.items():
        if isinstance(target, str) and target.startswith(old):
            node["_target_"] = new + target.removeprefix(old)
    for key, added in ADDED_KEYS.get(str(node.get("_target_")), {}).items():
        node.setdefault(key, added)
    return node


def _plain(value: Any) -> Any:
    """Return a value that a config can hold.

    Raises:
        ValueError: a date, a set or bytes, which YAML has too, or an integer of thousands of digits.
    """
    if not isinstance(value, PLAIN):
        raise ValueError(f"it holds a value of the type {type(value).__name__}")
    if isinstance(value, int) and value.bit_length() > LARGEST_INTEGER:
        raise ValueError(f"it holds an integer of more than {LARGEST_INTEGER} bits")
    return value


def _with_renamed_keys(node: Any, prefix: str = "") -> Any:
    """Return the node with its renamed keys, in their old order; the class of a plugin keeps its keys."""
    if not isinstance(node, dict):
        return node
    is_own = str(node.get("_target_")).startswith("capsexp.")
    renamed = {}
    for key, child in node.items():
        old = f"{prefix}{key}"
        new = RENAMED_KEYS.get(old, old) if is_own else old
        if isinstance(child, str) and is_own:
            child = RENAMED_VALUES.get(new, {}).get(child, child)
        renamed[new.removeprefix(prefix)] = _with_renamed_keys(child, f"{old}.")
    return renamed


def register_saved_config(
    overrides: Sequence[str], *, command: str, groups: Mapping[str, str] | None = None, **extra: Any
) -> None:
    """Make the config of `run=DIR` the root config `COMMAND_run`, with more keys of the command.

    Args:
        overrides: as typed.
        command: name of the capsexp command.
        groups: config groups that a run does not have, with their option; `???` for one that must be chosen.
        extra: keys of the command and their values.

    Raises:
        UserError: there is no such run, or its config cannot be read.
    """
    run = value(overrides, "run")
    if problems := list(root_problems({"run": run})):
        raise UserError(*problems)
    if run is None:
        raise UserError(f"capsexp {command} needs a run: capsexp {command} run=DIR")
    store_as_primary(
        _read(Path(run)), extra={"run": None, **extra}, groups=groups or {}, name=f"{command}_run"
    )


def load_saved_config(path: Path) -> dict[str, Any]:
    """Load the plain config of a run from its directory. Hydra's global state does not change.

    Raises:
        UserError: there is no such run, or its config cannot be read.
    """
    groups, root = _divide(_read(path))
    return to_plain(OmegaConf.create({**root, **groups, "run": str(path), "plugins": []}))


def store_as_primary(
    saved: dict[str, Any], *, extra: dict[str, Any], name: str, groups: Mapping[str, str] | None = None
) -> None:
    """Register a run's config as the root config `name`, each of its groups as the option `stored`.

    Hydra then treats it like conf/: `capsexp eval run=DIR dataset=fashion_mnist routing.iterations=5` works.
    """
    store = ConfigStore.instance()
    own, root = _divide(saved)
    for group, node in own.items():
        store.store(group=group, name=STORED, node=node)
    logging = [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
    options = {**dict.fromkeys(own, STORED), **(groups or {})}
    defaults = [*({group: option} for group, option in options.items()), "_self_", *logging]
    quiet = {"run": {"dir": "."}, "output_subdir": None, "job": {"name": name, "chdir": False}}
    node = {"defaults": defaults, **root, **extra, "plugins": [], "hydra": quiet}
    store.store(name=name, node=node)


def _read(run: Path) -> dict[str, Any]:
    """Read the saved config of a run directory; references between its keys stay as they are."""
    path = run / ".hydra" / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is not a run directory: there is no {path}")
    try:
        composed = read_saved(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {damage(error)}") from None
    return _with_present_data_root(without_resolvers(composed, _read_resolved(run)))


def _read_resolved(run: Path) -> dict[str, Any]:
    try:
        return read_saved(run / "resolved_config.yaml")
    except (OSError, ValueError):  # an old run may have none
        return {}


def _with_present_data_root(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with CAPSEXP_DATA for a data root that does not exist, as on another machine."""
    stored, here = config.get("data_root"), os.environ.get("CAPSEXP_DATA")
    is_here = not isinstance(stored, str) or "${" in stored or os.path.isdir(stored)
    return config if is_here or not here else {**config, "data_root": here}


def _divide(saved: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide a saved config into its groups and its other keys, without the keys that could run code.

    That is `hydra`, `defaults` and `plugins`, and also the `defaults` of a group: they can place another
    group's keys at `hydra`.
    """
    own = [group for group in GROUPS if isinstance(saved.get(group), dict)]
    groups = {group: {key: saved[group][key] for key in saved[group] if key != "defaults"} for group in own}
    excluded = (*own, "hydra", "defaults", "plugins")
    return groups, {key: content for key, content in saved.items() if key not in excluded}
