"""Time and memory of a network's steps, each measured in a new process.

The C allocator is set up once per process, and the peak memory of a process never goes down.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from capsexp.capsules import Capsules
from capsexp.child import python_command
from capsexp.config.build import build_components
from capsexp.config.components import Components
from capsexp.config.settings import with_setting
from capsexp.data.batches import Batches
from capsexp.data.split import Split
from capsexp.errors import UserError
from capsexp.schedule import Step
from capsexp.training.evaluate import inference
from capsexp.training.gradients import accumulate_gradients, gradient_norm
from capsexp.training.memory import is_out_of_memory, peak_resident
from capsexp.training.metrics import autocast

WARM_UP, REPEATS = 2, 9
MEMORY_STEPS = 3
STEP = Step(0, 1)
OUT_OF_MEMORY = "out of memory"
"""Key under which a process returns the allocator's message."""


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


def in_process(kind: str, variants: Mapping[str, Variant], *, plugins: Sequence[str]) -> dict[str, Any]:
    """Measure in a new process.

    Args:
        kind: "speed", "layers" or "peak", the functions below.
        variants: by name; "peak" takes one.
        plugins: see `capsexp.config.build.build_components`.
    """
    task = {
        "kind": kind,
        "variants": {name: tuple(variant) for name, variant in variants.items()},
        "plugins": list(plugins),
    }
    command = python_command("from capsexp.analysis.speed.measure import answer; answer()")
    # In its own session: Ctrl-C ends it only through this process.
    child = subprocess.run(
        command, input=json.dumps(task), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    if child.returncode != 0:
        raise UserError(f"a measurement failed with code {child.returncode}")
    result = dict(json.loads(child.stdout.splitlines()[-1]))
    if OUT_OF_MEMORY in result:
        raise MemoryError(result[OUT_OF_MEMORY])
    return result


def answer() -> None:
    """Do the task that stdin holds, and print the result: the work of the new process."""
    try:
        result = measure(json.load(sys.stdin))
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        result = {OUT_OF_MEMORY: str(error)}
    print(json.dumps(result))


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Do a task of `in_process` in this process."""
    variants = {name: Variant(*variant) for name, variant in task["variants"].items()}
    components = {
        name: build_components(variant.config, plugins=task["plugins"]) for name, variant in variants.items()
    }
    first = next(iter(components.values()))
    first.device.prepare()
    torch.manual_seed(first.seed)
    measures: dict[str, Callable[..., dict[str, Any]]] = {"speed": speed, "layers": layers, "peak": peak}
    return measures[task["kind"]](variants, components)


def speed(variants: Mapping[str, Variant], components: Mapping[str, Components]) -> dict[str, Any]:
    """Return seconds of training and inference steps of networks that take turns, and of fetching a batch."""
    first = next(iter(components.values()))
    batches = random_batches(first)
    models = {name: _network(variants[name], components[name]) for name in variants}
    training_steps = {name: training_step(components[name], model, batches) for name, model in models.items()}
    inference_steps = {name: _inference_step(first, model, batches) for name, model in models.items()}
    return {
        "batch": first.trainer.batch_size,
        "training": in_turns(training_steps, first),
        "inference": in_turns(inference_steps, first),
        "data": statistics.median(in_turns({"data": _fetch(batches)}, first)["data"]),
    }


def layers(variants: Mapping[str, Variant], components: Mapping[str, Components]) -> dict[str, Any]:
    """Return seconds of each routed layer alone, forward and backward, on its input in a first step."""
    first = next(iter(components.values()))
    batch = next(random_batches(first).training(0))
    steps: dict[str, dict[str, Callable[[], object]]] = {}
    for name in variants:
        model = _network(variants[name], components[name])
        for layer, capsules in _inputs_of_routed_layers(model, batch.images).items():
            steps.setdefault(layer, {})[name] = _layer_step(model.get_submodule(layer), capsules)
    return {
        "batch": len(batch.images),
        **{layer: in_turns(actions, first) for layer, actions in steps.items()},
    }


def peak(variants: Mapping[str, Variant], components: Mapping[str, Components]) -> dict[str, Any]:
    """Return the peak bytes of training above those of the process before it, and seconds of a step."""
    import torch._dynamo  # the first optimizer imports it: 150 MiB that are not the network's

    ((name, variant),) = variants.items()
    batches = random_batches(components[name])
    cuda = components[name].device.torch_device.type == "cuda"
    idle = torch.cuda.memory_allocated() if cuda else _resident()
    step = training_step(components[name], _network(variant, components[name]), batches)
    seconds = []
    for _ in range(MEMORY_STEPS):
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    highest = torch.cuda.max_memory_allocated() if cuda else peak_resident()
    return {"bytes": highest - idle, "seconds": min(seconds)}


def in_turns(actions: Mapping[str, Callable[[], object]], components: Components) -> dict[str, list[float]]:
    """Return seconds of each action, repeated in turns, so that a noisy machine slows all of them equally."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(WARM_UP + REPEATS):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if components.device.torch_device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def training_step(components: Components, model: nn.Module, batches: Batches) -> Callable[[], object]:
    """Return a step of the training loop on a fixed batch, without logging."""
    optimizer = components.new_optimizer(model.parameters(), lr=components.learning_rate(STEP))
    batch = next(batches.training(0))

    def step() -> None:
        accumulate_gradients(model, components.loss, batch, STEP, components.trainer, layers=False)
        gradient_norm(model, components.trainer.grad_clip)
        optimizer.step()

    return step


def random_batches(components: Components) -> Batches:
    """Return random bytes in the shape of the dataset's images, so that its files are not needed."""
    count = components.trainer.batch_size * (WARM_UP + REPEATS + 1)
    images = torch.randint(0, 256, (count, *components.dataset.raw_shape), dtype=torch.uint8)
    split = Split(images, torch.arange(count) % len(components.dataset.classes))
    return components.batches(split, limit=None)


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


def _network(variant: Variant, components: Components) -> nn.Module:
    torch.manual_seed(components.seed)
    model = components.new_model()
    model = (model if variant.routed else without_routing(model)).to(components.device.torch_device)
    model = model.to(memory_format=components.device.memory_format).train()
    return torch.compile(model) if variant.compiled else model  # type: ignore[return-value]


def _inputs_of_routed_layers(model: nn.Module, images: Tensor) -> dict[str, Capsules]:
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


def _layer_step(layer: nn.Module, capsules: Capsules) -> Callable[[], object]:
    inputs = [tensor.clone().requires_grad_() for tensor in capsules]
    differentiated = [*inputs, *layer.parameters()]

    def step() -> None:
        routed = layer(Capsules(*inputs))
        total = routed.poses.sum() + routed.activations.sum()
        # allow_unused: an input that a routing does not read, such as the activations, has no gradient.
        torch.autograd.grad(total, differentiated, allow_unused=True)

    return step


def _inference_step(components: Components, model: nn.Module, batches: Batches) -> Callable[[], object]:
    batch = next(batches.in_order())

    def step() -> None:
        with inference(model), autocast(batch.images.device, components.trainer.precision):
            model(batch.images)

    return step


def _fetch(batches: Batches) -> Callable[[], object]:
    epoch = batches.training(0)

    def fetch() -> object:
        return next(epoch)

    return fetch


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
