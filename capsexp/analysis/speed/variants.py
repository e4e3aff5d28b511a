"""The networks that are compared, and the inputs of their layers."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from capsexp.capsules import Capsules
from capsexp.config.components import Components
from capsexp.config.settings import with_setting


class Variant(NamedTuple):
    """One of the compared networks."""

    config: dict[str, Any]
    """As `build_components` takes it."""
    routed: bool = True
    """False: each capsule layer is replaced by its `without_routing()`, if it has one."""
    compiled: bool = False
    """Under torch.compile."""


def changed(config: dict[str, Any], group: str, **values: Any) -> dict[str, Any]:
    """Return the config with other values in a group."""
    for key, value in values.items():
        config = with_setting(config, f"{group}.{key}", value)
    return config


def is_routed(model: nn.Module) -> bool:
    """Return whether some layer has a form without routing."""
    return any(hasattr(module, "without_routing") for module in model.modules())


def without_routing(model: nn.Module) -> nn.Module:
    """Replace each capsule layer by its `without_routing()`, in place; return the network."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "without_routing"):
                setattr(parent, name, child.without_routing())  # type: ignore[operator]
    return model


def network_of(variant: Variant, components: Components) -> nn.Module:
    """Return the network of a variant on its device, for training."""
    torch.manual_seed(components.seed)
    model = components.new_model()
    model = (model if variant.routed else without_routing(model)).to(components.device.torch_device)
    model = model.to(memory_format=components.device.memory_format).train()
    return torch.compile(model) if variant.compiled else model  # type: ignore[return-value]


def inputs_of_routed_layers(model: nn.Module, images: Tensor) -> dict[str, Capsules]:
    """Return the capsules that each routed layer gets for these images, by its name."""
    inputs: dict[str, Capsules] = {}
    hooks = []
    for name, module in model.named_modules():
        if hasattr(module, "routing") and hasattr(module, "weight"):

            def record(_: nn.Module, arguments: tuple[Any, ...], name: str = name) -> None:
                inputs[name] = Capsules(*(tensor.detach() for tensor in arguments[0]))

            hooks.append(module.register_forward_pre_hook(record))
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return inputs
