"""The least time of a training step: the bytes that it must move, at the speed of a copy."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from capsexp.capsules import Batch, Routed
from capsexp.config.components import Components
from capsexp.layer.routed import RoutedLayer
from capsexp.schedule import Step
from capsexp.training.metrics import autocast

COPIED = 2**28
"""Bytes of a copy: more than the cache of a GPU keeps."""
COPIES = 5
FEW = 8
"""Images whose bytes are counted; those of a batch are in proportion."""


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes per second that a copy in the device's memory reads and writes, the best of some."""
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)  # zeros might be pages that do not exist
    target = torch.zeros_like(source)
    burst = 1 if device.type == "cpu" else 10  # on a GPU one copy is as short as a launch
    seconds = []
    for _ in range(1 + COPIES):
        start = time.perf_counter()
        for _ in range(burst):
            target.copy_(source)
        target[-1].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * COPIED * burst / min(seconds[1:])


def step_bytes(components: Components, model: nn.Module, batch: Batch) -> int:
    """Return the bytes that a training step on a batch must at least move to and from memory.

    Forward, each layer reads its input and its parameters and writes its output. Backward, it reads input,
    parameters and the output's gradient, and writes the gradients of input and parameters. The optimizer
    reads parameters, gradients and its state, and writes parameters and state. Votes, couplings, and what
    one layer computes inside are 0 bytes: a fused layer keeps them on the chip.
    """
    few = batch.take(slice(FEW))
    of_layers = sum(_layer_bytes(components, model, few)) * len(batch.labels) // len(few.labels)
    passes = 6 + 2 * optimizer_states(components)
    return of_layers + passes * _bytes(list(model.parameters()))


def optimizer_states(components: Components) -> int:
    """Return how many numbers the optimizer keeps for a parameter: 2 for Adam."""
    parameter = nn.Parameter(torch.zeros(2))  # its size differs from that of a counter
    optimizer = components.new_optimizer([parameter], lr=components.learning_rate(Step(0, 1)))
    parameter.grad = torch.ones(2)
    optimizer.step()
    state = optimizer.state[parameter].values()
    return sum(isinstance(entry, Tensor) and entry.shape == parameter.shape for entry in state)


def _layer_bytes(components: Components, model: nn.Module, batch: Batch) -> list[int]:
    """Return the bytes of the inputs and outputs of each layer, over all passes."""
    moved: list[int] = []

    def record(_: nn.Module, arguments: tuple[object, ...], output: object) -> None:
        inputs = list(_tensors(arguments))
        with_gradient = [tensor for tensor in inputs if tensor.requires_grad]
        moved.append(2 * _bytes(inputs) + _bytes(with_gradient) + 2 * _bytes(list(_tensors(output))))

    hooks = [layer.register_forward_hook(record) for layer in _layers(model)]
    with autocast(batch.images.device, components.trainer.precision):
        model(batch.images, batch.labels)
    for hook in hooks:
        hook.remove()
    return moved


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield routed layers, and other modules that have parameters of their own."""
    if isinstance(module, RoutedLayer) or any(True for _ in module.parameters(recurse=False)):
        yield module
    else:
        for child in module.children():
            yield from _layers(child)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Routed):  # not the coupling, which the next layer does not read
        yield from value[:2]
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from _tensors(entry)


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
