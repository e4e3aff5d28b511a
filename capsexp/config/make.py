"""One part of a run by its config name, for use outside a run: `make("routing/em", in_caps=8, ...)`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from capsexp.config.build import build_checked
from capsexp.config.compose import compose, conf_dir
from capsexp.config.settings import GROUPS
from capsexp.errors import UserError, nearest

NOT_MADE = ("experiment", "optimizer")  # a recipe is a whole run; the training loop drives a learning rate


def make(name: str, /, **changes: Any) -> Any:
    """Build a network, routing, loss, dataset, device or trainer with the values of its YAML file.

    The global random state of torch decides the weights of a network, as for any `torch.nn.Module`.

    Args:
        name: `GROUP/OPTION`, the path of a file in conf/ without its ending: `model/em_routing`,
            `routing/em`, `loss/spread`, `dataset/mnist`.
        changes: values that replace those of the YAML file, and the arguments that no config holds: a model
            needs `image_shape` and `classes`, a routing needs `in_caps`, `out_caps` and `pose_dim`. A dict
            changes some keys of a nested part, `routing={"iterations": 2}`. The name of an option chooses
            another part where conf/ has a group for it, `routing="uniform"`. An object is taken as it is.

    Returns:
        The object. Its class is the `_target_` of the YAML file.

    Raises:
        UserError: no such file, an unknown key, a missing or wrong value; one line each.

    Example:
        >>> net = capsexp.make("model/em_routing", image_shape=(1, 28, 28), classes=10)
    """
    group, option = _checked_name(name)
    choices = {key: value for key, value in changes.items() if key in GROUPS and isinstance(value, str)}
    overrides = [f"{group}={option}", *(f"{key}={value}" for key, value in choices.items())]
    composed = compose("train", overrides, config_dir=None)
    node = OmegaConf.to_container(composed[group], resolve=True)
    assert isinstance(node, dict)
    node = _changed(node, {key: value for key, value in changes.items() if key not in choices})
    node.pop("_partial_", None)
    absent = [key for key, value in node.items() if value == "???"]
    if absent:
        raise UserError(*(f"{name}.{key} has no default value: pass {key}=..." for key in absent))
    return build_checked(node, at=name, plugins=())


def _checked_name(name: str) -> tuple[str, str]:
    groups = [group for group in GROUPS if group not in NOT_MADE]
    known = [f"{group}/{path.stem}" for group in groups for path in Path(conf_dir(), group).glob("*.yaml")]
    if name not in known:
        raise UserError(f"no {name!r} in conf/{nearest(name, known)}")
    group, _, option = name.partition("/")
    return group, option


def _changed(node: Mapping[Any, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config node with some values replaced; nested dicts are merged, unless they name another target."""
    merged = {str(key): value for key, value in node.items()}
    for key, value in changes.items():
        before = merged.get(key)
        if isinstance(value, Mapping) and isinstance(before, dict) and "_target_" not in value:
            merged[key] = _changed(before, value)
        else:
            merged[key] = list(value) if isinstance(value, tuple) else value
    return merged
