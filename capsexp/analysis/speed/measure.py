"""Time and memory of a network's steps, each measured in a new process.

The C allocator is set up once per process, and the peak memory of a process never goes down.
"""

import functools
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from capsexp.analysis.speed.floor import copy_bandwidth, step_bytes
from capsexp.analysis.speed.variants import Variant, inputs_of_routed_layers, network_of
from capsexp.capsules import Capsules
from capsexp.child import python_command
from capsexp.config.build import build_components
from capsexp.config.components import Components
from capsexp.data.batches import Batches
from capsexp.data.split import Split
from capsexp.errors import UserError, first_line
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
FAILED = "failed"
"""Key under which a process returns the message of another error."""


def in_process(
    kind: str,
    variants: Mapping[str, Variant],
    *,
    plugins: Sequence[str],
    limit: float = math.inf,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Measure in a new process.

    Args:
        kind: "speed", "training", "layers" or "peak", the functions below.
        variants: by name; "peak" takes one.
        plugins: see `capsexp.config.build.build_components`.
        limit: seconds after which "training" begins no more turns.
        timeout: seconds after which the process is killed; None for no limit.

    Raises:
        MemoryError: the process had too little memory.
        TimeoutError: it took longer than `timeout`.
        UserError: it failed in another way.
    """
    task = {
        "kind": kind,
        "limit": limit,
        "variants": {name: tuple(variant) for name, variant in variants.items()},
        "plugins": list(plugins),
    }
    command = python_command("from capsexp.analysis.speed.measure import answer; answer()")
    # In its own session: Ctrl-C ends it only through this process.
    try:
        child = subprocess.run(
            command,
            input=json.dumps(task),
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"a measurement took longer than {timeout:.0f} s") from None
    result = _last_line(child.stdout)
    if child.returncode != 0:
        reason = f": {result[FAILED]}" if FAILED in result else ""
        raise UserError(f"a measurement failed with code {child.returncode}{reason}")
    if OUT_OF_MEMORY in result:
        raise MemoryError(result[OUT_OF_MEMORY])
    return result


def _last_line(output: str) -> dict[str, Any]:
    """Return the result that a process printed; {} if it ended before."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    return dict(json.loads(lines[-1])) if lines else {}


def answer() -> None:
    """Do the task that stdin holds, and print the result: the work of the new process."""
    try:
        result = measure(json.load(sys.stdin))
    except Exception as error:
        if not is_out_of_memory(error):
            print(json.dumps({FAILED: f"{type(error).__name__}: {first_line(error)}"}))
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
    measures: dict[str, Callable[..., dict[str, Any]]] = {
        "speed": speed,
        "training": functools.partial(training, limit=task.get("limit", math.inf)),
        "layers": layers,
        "peak": peak,
    }
    return measures[task["kind"]](variants, components)


def speed(variants: Mapping[str, Variant], components: Mapping[str, Components]) -> dict[str, Any]:
    """Return what `training` returns, and seconds of inference steps and of fetching a batch."""
    first = next(iter(components.values()))
    batches = random_batches(first)
    models = {name: network_of(variants[name], components[name]) for name in variants}
    trained = _training(models, components, batches, limit=math.inf)
    inference_steps = {name: _inference_step(first, model, batches) for name, model in models.items()}
    return {
        **trained,
        "inference": in_turns(inference_steps, first),
        "data": statistics.median(in_turns({"data": _fetch(batches)}, first)["data"]),
    }


def training(
    variants: Mapping[str, Variant], components: Mapping[str, Components], *, limit: float
) -> dict[str, Any]:
    """Return seconds of training steps of networks that take turns, and the first network's floor.

    The floor is the seconds of a step that only moves the `step_bytes`, at the speed of a copy.
    """
    batches = random_batches(next(iter(components.values())))
    models = {name: network_of(variants[name], components[name]) for name in variants}
    return _training(models, components, batches, limit=limit)


def _training(
    models: Mapping[str, nn.Module], components: Mapping[str, Components], batches: Batches, *, limit: float
) -> dict[str, Any]:
    (name, first), *_ = components.items()
    plain = getattr(models[name], "_orig_mod", models[name])  # not under torch.compile
    moved = step_bytes(first, plain, next(batches.training(0)))
    bandwidth = copy_bandwidth(first.device.torch_device)
    steps = {name: training_step(components[name], model, batches) for name, model in models.items()}
    return {
        "batch": first.trainer.batch_size,
        "training": in_turns(steps, first, limit=limit),
        "bytes": moved,
        "bandwidth": bandwidth,
        "floor": moved / bandwidth,
    }


def layers(variants: Mapping[str, Variant], components: Mapping[str, Components]) -> dict[str, Any]:
    """Return seconds of each routed layer alone, forward and backward, on its input in a first step."""
    first = next(iter(components.values()))
    batch = next(random_batches(first).training(0))
    steps: dict[str, dict[str, Callable[[], object]]] = {}
    for name in variants:
        model = network_of(variants[name], components[name])
        for layer, capsules in inputs_of_routed_layers(model, batch.images).items():
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
    step = training_step(components[name], network_of(variant, components[name]), batches)
    seconds = []
    for _ in range(MEMORY_STEPS):
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    highest = torch.cuda.max_memory_allocated() if cuda else peak_resident()
    return {"bytes": highest - idle, "seconds": min(seconds)}


def in_turns(
    actions: Mapping[str, Callable[[], object]], components: Components, *, limit: float = math.inf
) -> dict[str, list[float]]:
    """Return seconds of each action, repeated in turns, so that a noisy machine slows all of them equally.

    Args:
        actions: by name.
        components: their device.
        limit: seconds after which no turn begins, except the warm-up and the first one that counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(WARM_UP + REPEATS):
        if sum(map(sum, seconds.values())) >= limit:
            break
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
