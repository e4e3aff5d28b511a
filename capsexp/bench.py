"""`capsexp bench`: how fast a network trains and infers, beside the same network without its routing.

Every measurement is a process of its own, because the C allocator is set up once per process and the
peak of the memory never goes down. Speed is a ratio: the two networks take turns step by step, so a noisy
machine slows both alike.
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from capsexp.build import Parts, components
from capsexp.data import Batches, Split
from capsexp.device import has_tunable_allocator
from capsexp.errors import UserError
from capsexp.evaluate import autocast, inference
from capsexp.schedule import Step
from capsexp.train import gradient_norm, gradients

WARM_UP, REPEATS, MEMORY_STEPS = 2, 9, 3
STEP = Step(0, 1)


def bench(config: dict[str, Any], *, plugins: Sequence[str]) -> None:
    """Measure and print; pictures are random bytes in the shape of the data set's, so none is needed.

    Args:
        config: the plain config.
        plugins: as for `components`.
    """
    parts = components(config, plugins=plugins)
    model = parts.new_model()
    names = ["routing", "no routing"] if _routed(model) else ["routing"]
    console = Console(soft_wrap=True)
    shape = "x".join(map(str, parts.dataset.image_shape))
    count = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{type(model).__name__}, {count:,} parameters, {shape}, batch {parts.trainer.batch_size}, "
        f"{str(parts.trainer.precision).removeprefix('torch.')}, {parts.device}, {_processor()}"
    )
    on_cpu = parts.device.torch_device.type == "cpu"
    allocators = ["tuned", "default"] if on_cpu and has_tunable_allocator() else ["default"]
    table = Table(
        "allocator", "network", "training images/s", "inference images/s", "peak memory, MiB", "data share"
    )
    for allocator in allocators:
        config = {**config, "device": {**config["device"], "allocator": allocator}}
        speed = _in_process({"measure": "speed", "config": config, "plugins": list(plugins)})
        memory = {
            name: _in_process(
                {"measure": "memory", "config": config, "plugins": list(plugins), "network": name}
            )
            for name in names
        }
        for name in names:
            table.add_row(*_row(allocator, name, speed, memory[name]["bytes"]))
        if len(names) == 2:
            table.add_row(*_ratios(allocator, speed, memory), end_section=True)
    console.print(table)
    console.print(
        "images/s: medians of steps taken in turns; memory: over the idle process; "
        "data share: of a training step"
    )


def _row(allocator: str, name: str, speed: dict[str, Any], peak: int) -> list[str]:
    size = speed["batch"]
    training, guessing = (
        statistics.median(speed["training"][name]),
        statistics.median(speed["inference"][name]),
    )
    share = f"{speed['data'] / training:.2%}" if name == "routing" else ""
    return [allocator, name, f"{size / training:.1f}", f"{size / guessing:.1f}", f"{peak / 2**20:.0f}", share]


def _ratios(allocator: str, speed: dict[str, Any], memory: dict[str, Any]) -> list[str]:
    """Speed with routing as a share of the speed without, from neighbouring steps; memory likewise."""
    cells = []
    for phase in ("training", "inference"):
        pairs = zip(speed[phase]["no routing"], speed[phase]["routing"], strict=True)
        cells.append(f"{statistics.median(without / routed for without, routed in pairs):.3f}")
    peak = memory["routing"]["bytes"] / memory["no routing"]["bytes"]
    return [allocator, "ratio", *cells, f"{peak:.2f}", ""]


def _in_process(task: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "capsexp.bench"]
    child = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True)
    if child.returncode != 0:
        raise UserError(f"a measurement failed with code {child.returncode}:\n{child.stderr}")
    return dict(json.loads(child.stdout.splitlines()[-1]))


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in this process."""
    parts = components(task["config"], plugins=task["plugins"])
    parts.device.prepare()
    torch.manual_seed(parts.seed)
    if task["measure"] == "memory":
        return {"bytes": _peak_memory(parts, routed=task["network"] == "routing")}
    return _speed(parts)


def _speed(parts: Parts) -> dict[str, Any]:
    batches = _random_batches(parts)
    models = {"routing": _on_device(parts, parts.new_model())}
    if _routed(models["routing"]):
        models["no routing"] = _on_device(parts, _without_routing(parts.new_model()))
    training = {name: _training_step(parts, model, batches) for name, model in models.items()}
    return {
        "batch": parts.trainer.batch_size,
        "training": _in_turns(training, parts),
        "inference": _in_turns(
            {name: _guess(parts, model, batches) for name, model in models.items()}, parts
        ),
        "data": statistics.median(_in_turns({"data": _fetch(batches)}, parts)["data"]),
    }


def _in_turns(actions: dict[str, Callable[[], object]], parts: Parts) -> dict[str, list[float]]:
    """Seconds of each action, each repeated, one after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(WARM_UP + REPEATS):
        for name, action in actions.items():
            begun = time.perf_counter()
            action()
            if parts.device.torch_device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= WARM_UP:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def _peak_memory(parts: Parts, *, routed: bool) -> int:
    """Bytes that training takes at its peak, over those of the process before it."""
    import torch._dynamo  # the first optimiser brings it: 150 MiB that are not the network's

    batches = _random_batches(parts)
    cuda = parts.device.torch_device.type == "cuda"
    idle = torch.cuda.memory_allocated() if cuda else _resident()
    model = parts.new_model()
    step = _training_step(parts, _on_device(parts, model if routed else _without_routing(model)), batches)
    for _ in range(MEMORY_STEPS):
        step()
    return (torch.cuda.max_memory_allocated() if cuda else _peak_resident()) - idle


def _training_step(parts: Parts, model: nn.Module, batches: Batches) -> Callable[[], object]:
    optimizer = parts.new_optimizer(model.parameters(), lr=parts.learning_rate(STEP))
    batch = next(batches.training(0))
    forward: nn.Module = torch.compile(model) if parts.trainer.compile else model  # type: ignore[assignment]

    def step() -> None:
        gradients(forward, parts.loss, batch, STEP, parts.trainer)
        gradient_norm(model, parts.trainer.grad_clip)
        optimizer.step()

    return step


def _guess(parts: Parts, model: nn.Module, batches: Batches) -> Callable[[], object]:
    batch = next(batches.in_order())

    def guess() -> None:
        with inference(model), autocast(batch.images.device, parts.trainer.precision):
            model(batch.images)

    return guess


def _fetch(batches: Batches) -> Callable[[], object]:
    epoch = batches.training(0)

    def fetch() -> object:
        return next(epoch)

    return fetch


def _random_batches(parts: Parts) -> Batches:
    count = parts.trainer.batch_size * (WARM_UP + REPEATS + 1)
    images = torch.randint(0, 256, (count, *parts.dataset.raw_shape), dtype=torch.uint8)
    batches: Batches = parts.batches(
        Split(images, torch.arange(count) % len(parts.dataset.classes)), limit=None
    )
    return batches


def _on_device(parts: Parts, model: nn.Module) -> nn.Module:
    on_device = model.to(parts.device.torch_device)
    return on_device.to(memory_format=parts.device.memory_format).train()


def _routed(model: nn.Module) -> bool:
    return any(hasattr(module, "without_routing") for module in model.modules())


def _without_routing(model: nn.Module) -> nn.Module:
    """The network itself, each capsule layer's `without_routing()` in the layer's place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "without_routing"):
                setattr(parent, name, child.without_routing())  # type: ignore[operator]
    return model


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _peak_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    print(json.dumps(measure(json.load(sys.stdin))))
