"""One component by its config name, for use outside a run: `make("routing/em", in_caps=8, ...)`."""

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from capsexp.config.build import INIT_FROM, build_checked
from capsexp.config.compose import compose, option_names
from capsexp.config.settings import GROUPS
from capsexp.errors import UserError, nearest

# A recipe is a whole run. The training loop sets the learning rate of an optimizer.
EXCLUDED_GROUPS = ("experiment", "optimizer")


def make(name: str, /, **changes: Any) -> Any:
    """Build a network, routing, loss, dataset, device or trainer with the values of its YAML file.

    A routing is part of a layer, which knows its sizes. Without `in_caps`, `out_caps` and `pose_dim` you get
    a factory to pass to a layer; with them, the module itself. The weights of a network come from the global
    random state of torch, as for any `torch.nn.Module`.

    Args:
        name: `GROUP/OPTION`, a file in conf/ without its ending: `model/em_routing`, `routing/em`,
            `loss/spread`, `dataset/mnist`.
        changes: values that replace those in the YAML file, and arguments that are not in it: a model needs
            `image_shape` and `classes`. A dict changes keys of a nested component,
            `routing={"iterations": 2}`. The name of an option chooses another one if conf/ has a group for
            it, `routing="uniform"`.

    Returns:
        An instance of the class that the YAML file names as `_target_`.

    Raises:
        UserError: no such file, an unknown key, a missing or wrong value; one line for each.

    Example:
        >>> net = capsexp.make("model/em_routing", image_shape=(1, 28, 28), classes=10)
    """
    group = _group_of(name)
    choices = {key: value for key, value in changes.items() if key in GROUPS and isinstance(value, str)}
    options = {group: name.partition("/")[2], **choices}
    composed = compose("train", [f"{key}={option}" for key, option in options.items()], config_dir=None)
    defaults = OmegaConf.to_container(composed[group], resolve=True)
    assert isinstance(defaults, dict)
    defaults.pop(INIT_FROM, None)  # of a run, not of the network
    node = _merged(defaults, {key: value for key, value in changes.items() if key not in choices}, name)
    if set(node) != set(defaults):  # completed here, and not by a layer
        node.pop("_partial_", None)
    if missing := [key for key, value in node.items() if value == "???"]:
        raise UserError(*(f"{name}.{key} has no default value: pass {key}=..." for key in missing))
    return build_checked(node, at=name, plugins=())


def _group_of(name: str) -> str:
    groups = [group for group in GROUPS if group not in EXCLUDED_GROUPS]
    names = [f"{group}/{option}" for group in groups for option in option_names(group)]
    if name not in names:
        hint = nearest(name, names) or "; a name has the form GROUP/OPTION, such as routing/em"
        raise UserError(f"no {name!r} in conf/{hint}")
    return name.partition("/")[0]


def _merged(node: Mapping[Any, Any], changes: Mapping[str, Any], at: str) -> dict[str, Any]:
    """Return a config node with changed values. Nested dicts are merged, unless they name another target."""
    from torch.nn import Module

    merged = {str(key): value for key, value in node.items()}
    for key, value in changes.items():
        before = merged.get(key)
        if isinstance(value, Mapping) and isinstance(before, dict) and "_target_" not in value:
            value = _merged(before, value, f"{at}.{key}")
        elif isinstance(value, Module) and isinstance(before, dict) and before.get("_partial_"):
            raise UserError(
                f"{at}.{key}: expected a factory, such as make('{key}/...') without its sizes, or a dict of "
                f"changes, got a finished {type(value).__name__}"
            )
        merged[key] = list(value) if isinstance(value, tuple) else value
    return merged
