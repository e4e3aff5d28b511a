"""Part 2: the Triton kernels of EM and of dynamic routing against plain PyTorch in float64.

Each routed layer of a network gets its input of a first step. Compared are poses, activations and coupling,
and the gradients of a random linear function of them. The rules are those of the tests in tests/ops/kernels:
in float32 the kernels' error may be `FACTOR` times that of plain PyTorch in float32 plus `SLACK`, but at most
`LARGEST`; in float64 it may be `EXACT`. An error is the norm of the difference, divided by the norm of the
float64 result.
"""

import copy
import functools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from capsexp.capsules import Capsules, Routed
from capsexp.child import python_command
from capsexp.layer.routed import RoutedLayer
from scripts.on_a_gpu.child import run_child, stop_children
from scripts.on_a_gpu.parts import Outcome, Plan

FACTOR = 10
SLACK = 8 * torch.finfo(torch.float32).eps  # a few roundings: the error of plain PyTorch may be 0
EXACT = 1e-10
LARGEST = 0.1
WORST = 1e30  # JSON has no infinity
INTERPRETER = {"TRITON_INTERPRET": "1"}


class Case(NamedTuple):
    """A network, and the images that it gets."""

    batch: int
    overrides: tuple[str, ...]


_EM = ("model=em_routing", "dataset=smallnorb")
_ODD = (*_EM, "model.primary_types=3", "model.conv_types=[5,7]", "model.conv_kernels=[4,2]")
_CAPSNET = ("model=dynamic_routing", "dataset=mnist")
CASES = {
    "68K": Case(8, _EM),
    "310K": Case(2, ("model=em_routing_310k", "dataset=smallnorb")),
    "CapsNet": Case(8, _CAPSNET),
    "odd sizes": Case(3, (*_ODD, "routing.mean_smoothing=0.3", "routing.normalisation=types")),
    "odd sizes, 3x3 poses": Case(5, (*_ODD, "model.pose_dim=9", "routing.normalisation=official_v1")),
    "odd sizes, vectors": Case(2, (*_ODD, "model.pose=vector", "routing.iterations=2")),
    "odd CapsNet": Case(
        7,
        (
            *(*_CAPSNET, "model.conv_channels=24", "model.primary_types=3", "model.class_dim=13"),
            *("routing.prior=learned", "routing.bias=true", "routing.leaky=true"),
        ),
    ),
}
_TINY = ("model=em_routing", "dataset=digits", "model.padding=same", "model.conv_channels=4")
_ONE_LAYER = ("model.conv_types=[3]", "model.conv_kernels=[3]", "model.conv_strides=[2]")
DRY_CASES = {
    "tiny EM": Case(1, (*_TINY, "model.primary_types=2", *_ONE_LAYER, "routing.iterations=2")),
    "tiny CapsNet": Case(2, ("model=dynamic_routing_small", "dataset=digits", "model.primary_types=2")),
}


def run(plan: Plan, end: float) -> Outcome:
    """Compare every case in a process of its own, several at a time: most of it is Triton's compiler."""
    cases = DRY_CASES if plan.cpu else CASES
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        try:
            found = list(pool.map(lambda case: _in_process(case, plan, end), cases.values()))
        except BaseException:
            stop_children()
            raise
    return judge(dict(zip(cases, found, strict=True)))


def judge(found: dict[str, dict[str, Any]]) -> Outcome:
    """Return the outcome of the answers of the cases' processes, by case."""
    errors = [f"{case}: {answer['error']}" for case, answer in found.items() if "error" in answer]
    tensors = [(case, tensor) for case, answer in found.items() for tensor in answer.get("tensors", [])]
    beyond = [(case, tensor) for case, tensor in tensors if not tensor["ok"]]
    message = f"{len(tensors) - len(beyond)} of {len(tensors)} tensors within their tolerance"
    if beyond:
        case, tensor = beyond[0]
        message += (
            f"; {case}, {tensor['layer']}, {tensor['tensor']}: {tensor['kernels']:.1e} in float32, "
            f"allowed {tensor['allowed']:.1e}; {tensor['kernels64']:.1e} in float64, allowed {EXACT:.0e}"
        )
    message = "; ".join([message, *errors])
    result = {"factor": FACTOR, "slack": SLACK, "largest": LARGEST, "exact": EXACT, "cases": found}
    if any(answer.get("late") for answer in found.values()):
        return Outcome("out of time", message, result)
    return Outcome("failed" if beyond or errors or not tensors else "ok", message, result)


def _in_process(case: Case, plan: Plan, end: float) -> dict[str, Any]:
    task = json.dumps({"batch": case.batch, "overrides": case.overrides, "cpu": plan.cpu})
    command = python_command("from scripts.on_a_gpu.parity import answer; answer()")
    try:
        child = run_child(command, end=end, text=task, environment=INTERPRETER if plan.cpu else {})
    except TimeoutError as error:
        return {"error": str(error), "late": True}
    if not child.in_time:
        return {"error": "stopped: no time was left", "late": True}
    if child.code != 0:
        return {"error": child.last_line()}
    return {"tensors": json.loads(child.out.splitlines()[-1])}


def answer() -> None:
    """Compare the case that stdin holds, and print its tensors: the work of a process of its own."""
    task = json.load(sys.stdin)
    print(json.dumps(compare(Case(task["batch"], tuple(task["overrides"])), cpu=task["cpu"])))


def compare(case: Case, *, cpu: bool) -> list[dict[str, Any]]:
    """Return an entry for each tensor of each routed layer: layer, tensor, errors, tolerance, ok."""
    from capsexp.analysis.speed.measure import random_batches
    from capsexp.analysis.speed.variants import Variant, inputs_of_routed_layers, network_of
    from capsexp.config.build import build_components
    from capsexp.config.compose import compose, to_plain

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if cpu:
        interpret()
    overrides = [*case.overrides, f"trainer.batch_size={case.batch}", f"device={'cpu' if cpu else 'cuda'}"]
    config = to_plain(compose("train", overrides, config_dir=None))
    components = build_components(config, plugins=[])
    model = network_of(Variant(config), components)
    images = next(random_batches(components).training(0)).images
    plain = reference(model)
    if hasattr(plain, "calibrate"):
        plain.calibrate(images)  # half of the capsules are active: no gradient vanishes
        model.load_state_dict(plain.state_dict())
    found = []
    for name, capsules in inputs_of_routed_layers(plain, images).items():
        found += _compare_layer(name, model.get_submodule(name), capsules)
    return found


def reference(module: nn.Module) -> Any:
    """Return a copy whose layers route by plain PyTorch."""
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, RoutedLayer):
            layer.routing.implementation = "reference"  # type: ignore[assignment]
    return module


def _compare_layer(name: str, layer: Any, capsules: Capsules) -> list[dict[str, Any]]:
    plain, double = reference(layer), Capsules(*(tensor.double() for tensor in capsules))
    truth = values_and_gradients(reference(layer).double(), double, plain=True)
    results = {
        "kernels": values_and_gradients(layer, capsules, plain=False),
        "plain": values_and_gradients(plain, capsules, plain=True),
        "kernels64": values_and_gradients(copy.deepcopy(layer).double(), double, plain=False),
    }
    return [
        entry(name, tensor, {way: relative_error(got[tensor], exact) for way, got in results.items()})
        for tensor, exact in truth.items()
    ]


def entry(layer: str, tensor: str, errors: dict[str, float]) -> dict[str, Any]:
    """Return the entry of a tensor, with its tolerance."""
    allowed = min(FACTOR * errors["plain"] + SLACK, LARGEST)
    ok = errors["kernels"] <= allowed and errors["kernels64"] <= EXACT
    return {"layer": layer, "tensor": tensor, **errors, "allowed": allowed, "ok": ok}


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference, divided by that of the exact tensor; at most `WORST`, as for NaN."""
    error = ((got.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()
    return error if error < WORST else WORST


def values_and_gradients(layer: Any, capsules: Capsules, *, plain: bool) -> dict[str, Tensor]:
    """Return what a layer computes, and the gradients of a random linear function of it."""
    inputs = Capsules(*(tensor.detach().clone().requires_grad_() for tensor in capsules))
    route = layer if plain else functools.partial(by_kernels, layer)
    routed = route(inputs)
    values = {"poses": routed.poses, "activations": routed.activations, "coupling": routed.coupling}
    loss = torch.stack([(value * _weights_like(value)).sum() for value in values.values()]).sum()
    with torch.no_grad():  # the kernels then keep less
        values["poses in evaluation"] = route(inputs).poses
    wanted = {"children's poses": inputs.poses, "children's activations": inputs.activations}
    wanted |= dict(layer.named_parameters())
    # Dynamic routing does not read the children's activations.
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    named = {f"gradient of {name}": got for name, got in zip(wanted, gradients, strict=True)}
    return {
        **{name: value.detach() for name, value in values.items()},
        **{name: gradient for name, gradient in named.items() if gradient is not None},
    }


def by_kernels(layer: Any, capsules: Capsules) -> Routed:
    """Route by the Triton kernels: on CUDA as everywhere, on a CPU in Triton's interpreter.

    Raises:
        RuntimeError: the layer would take another path on CUDA.
    """
    from capsexp.ops.dynamic_passes import has_kernels
    from capsexp.ops.votes import MatrixVotes

    fused = layer.lazy_type is MatrixVotes
    if not capsules.poses.is_cuda:
        if fused:
            return layer.routing.route_fused(layer.lazy_votes(capsules.poses), capsules.activations)
        return layer.routing(layer.votes(capsules.poses), capsules.activations)
    reason = layer.fused_reason() if fused else None
    if reason is not None or not has_kernels(capsules.poses):
        raise RuntimeError(f"{type(layer).__name__} does not take its Triton kernels: {reason}")
    return layer(capsules)


def interpret() -> None:
    """Let the Triton kernels take the place of C++ and PyTorch on the CPU, for the rest of this process."""
    from capsexp.ops import dynamic_passes
    from capsexp.ops.kernels import em, em_triton

    em.em_routing_op.register_kernel("cpu")(em_triton.em_forward)
    em.em_routing_backward_op.register_kernel("cpu")(em_triton.em_backward)
    dynamic_passes.has_kernels = lambda votes: True


def _weights_like(value: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(value.shape, dtype=torch.float64, generator=generator).to(value)
