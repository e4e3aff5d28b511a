"""What takes memory in a run: parameters, layer outputs, votes, images; and the settings that change it.

The sizes are computed with fake tensors, which have shapes and no memory.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from capsexp.config.components import Components
from capsexp.ops.votes import images_per_chunk

MIB = 2**20


class Part(NamedTuple):
    """Something that takes memory."""

    name: str
    size: int | float
    """In bytes; infinite if it is known to be too large."""
    settings: tuple[str, ...]
    """Overrides that make it smaller."""

    def __str__(self) -> str:
        return self.name if math.isinf(self.size) else f"{self.name}, {self.size / MIB:,.0f} MiB"


def memory_parts(
    components: Components, config: Mapping[str, Any], *, training: bool, reading: bool
) -> list[Part]:
    """Return what takes memory, in no order.

    Args:
        components: of the run.
        config: the plain config that they are built from.
        training: whether there are gradients and an optimizer.
        reading: whether memory ran out while the dataset was read.
    """
    settings = _Settings(config, components)
    if reading:
        name = f"the images of dataset {components.dataset.name}, which are kept in memory"
        return [Part(name, math.inf, settings.of_images())]
    with FakeTensorMode():
        model = components.new_model()
        copies = _copies(components, model) if training else 1
        parts = [*_parameters(model, copies, settings), *_votes(components, model, settings)]
        return [*parts, *_outputs(components, model, settings, training=training)]


class _Settings:
    """Overrides that a run's config has, each with a value that takes about half of the memory."""

    def __init__(self, config: Mapping[str, Any], components: Components) -> None:
        self.config, self.raw_shape = config, components.dataset.raw_shape

    def of_images(self) -> tuple[str, ...]:
        """Overrides for fewer pixels."""
        preprocess = self.config["dataset"].get("preprocess", {})
        if "resize" not in preprocess:
            return ()
        height, width = (max(1, side // 2) for side in self.raw_shape[1:])
        size = str(height) if height == width else f"[{height},{width}]"
        crop = preprocess.get("crop")
        smaller = () if crop is None else (f"dataset.preprocess.crop={max(1, crop // 2)}",)
        return (f"dataset.preprocess.resize={size}", *smaller)

    def of_weights(self) -> tuple[str, ...]:
        """Overrides for fewer capsules or units below a layer that is connected to all of them."""
        strides = (*self._multiplied("model.primary_stride", 2), *self._multiplied("model.conv_stride", 2))
        return (*self.of_images(), *strides, *self.halved("model.primary_types", "model.hidden"))

    def of_decoder(self) -> tuple[str, ...]:
        """Overrides for no decoder, or a smaller one."""
        return ("model.decoder=null", *self.of_images())

    def of_kernels(self) -> tuple[str, ...]:
        """Overrides for narrower convolutions."""
        return self.halved("model.conv_channels", "model.primary_types", "model.conv_types")

    def of_batch(self, *, training: bool) -> tuple[str, ...]:
        """Overrides for fewer images at a time; none for a single image."""
        trainer = self.config["trainer"]
        split = trainer["batch_size"] > trainer["accumulate"] if training else False
        accumulate = self._multiplied("trainer.accumulate", 2) if split else ()
        return (*self.halved("trainer.batch_size"), *accumulate)

    def halved(self, *keys: str) -> tuple[str, ...]:
        """Overrides with half of each value, for those keys that the config has."""
        return tuple(
            override for key in keys for override in self._override(key, lambda value: max(1, value // 2))
        )

    def _multiplied(self, key: str, factor: int) -> tuple[str, ...]:
        return tuple(self._override(key, lambda value: factor * value))

    def _override(self, key: str, change: Any) -> Iterator[str]:
        group, name = key.split(".")
        value = self.config[group].get(name)
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(number, int) for number in values):
            return
        changed = [change(number) for number in values]
        if changed != values:
            text = f"[{','.join(map(str, changed))}]" if isinstance(value, list) else str(changed[0])
            yield f"{key}={text}"


def _copies(components: Components, model: nn.Module) -> int:
    """Return how many times each parameter is stored in training: with gradient, optimizer and average."""
    optimizer = components.new_optimizer(model.parameters(), lr=0.001)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    stored = [value for state in optimizer.state.values() for value in state.values()]
    states = sum(value.numel() for value in stored if isinstance(value, Tensor))
    own = sum(parameter.numel() for parameter in model.parameters())
    return 2 + round(states / max(1, own)) + (components.trainer.ema_decay is not None)


def _parameters(model: nn.Module, copies: int, settings: _Settings) -> Iterator[Part]:
    """Yield the parameters of each layer."""
    kept = " with gradients and optimizer" if copies > 1 else ""
    for name, layer in model.named_children():
        parameters = list(layer.parameters())
        if not parameters:
            continue
        count = sum(parameter.numel() for parameter in parameters)
        size = copies * sum(parameter.nbytes for parameter in parameters)
        if name == "decoder":
            helpful = settings.of_decoder()
        else:
            helpful = settings.of_kernels() if _is_convolution(layer) else settings.of_weights()
        yield Part(f"{count:,} parameters of {name}{kept}", size, helpful)


def _is_convolution(layer: nn.Module) -> bool:
    """Whether most parameters are kernels, whose size does not depend on that of the image."""
    convolutions = [module for module in layer.modules() if isinstance(module, nn.Conv2d)]
    kernels = sum(parameter.numel() for module in convolutions for parameter in module.parameters())
    return 2 * kernels > sum(parameter.numel() for parameter in layer.parameters())


def _votes(components: Components, model: nn.Module, settings: _Settings) -> Iterator[Part]:
    """Yield the votes of each layer that stores them, for as many images as it routes at a time."""
    device, batch = components.device.torch_device, components.trainer.batch_size
    for name, layer in model.named_modules():
        numbers, budget = getattr(layer, "votes_per_image", None), getattr(layer, "votes_bytes", None)
        if not isinstance(numbers, int):
            continue
        size = 4 * numbers
        images = min(batch, images_per_chunk(size, budget=budget, device=device))
        fewer = (f"model.votes_mib={max(1, images * size // 2 // MIB)}",) if images > 1 else ()
        fewer = (*fewer, *settings.halved("trainer.batch_size")) if images == batch else fewer
        text = f"the votes of {name} for {images} image{'s' * (images > 1)}"
        yield Part(text, images * size, (*fewer, *settings.of_weights()))


def _outputs(
    components: Components, model: nn.Module, settings: _Settings, *, training: bool
) -> Iterator[Part]:
    """Yield the outputs of all layers for a batch: in training all of them, otherwise the largest two."""
    trainer, dataset = components.trainer, components.dataset
    images = math.ceil(trainer.batch_size / (trainer.accumulate if training else 1))
    several = (dataset.labels_per_image,) if dataset.labels_per_image > 1 else ()
    stored: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        stored[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(images, *dataset.image_shape), torch.zeros(images, *several, dtype=torch.int64))
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    sizes = sorted(tensor.untyped_storage().nbytes() for key, tensor in stored.items() if key not in own)
    size = sum(sizes) if training else sum(sizes[-2:])
    name = f"the outputs of the layers for a batch of {images} image{'s' * (images > 1)}"
    yield Part(name, size, (*settings.of_batch(training=training), *settings.of_images()))
