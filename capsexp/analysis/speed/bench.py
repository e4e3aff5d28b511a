"""`capsexp bench`: speed and memory of a network, compared with reference routing and with none."""

import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from torch import nn

from capsexp.analysis.speed.measure import in_process
from capsexp.analysis.speed.variants import Variant, changed, is_routed
from capsexp.config.build import build_components
from capsexp.config.components import Components
from capsexp.layer.routed import RoutedLayer
from capsexp.terminal import Table, new_console
from capsexp.training.device import has_tunable_allocator

NETWORK = "routing"
"""The network as configured. The others are compared with it."""


def bench(config: dict[str, Any], *, plugins: Sequence[str], compiled: bool = False) -> None:
    """Measure and print. Images are random bytes in the dataset's shape, so no dataset files are needed.

    Args:
        config: the plain config.
        plugins: see `capsexp.config.build.build_components`.
        compiled: also measure the networks under torch.compile, which takes a minute to start.
    """
    components = build_components(config, plugins=plugins)
    model = components.new_model()
    console = new_console(soft_wrap=True)
    _print_setup(console, components, model)
    steps = Table(
        "allocator", "network", "training images/s", "inference images/s", "peak memory, MiB", "data share"
    )
    layers = Table("allocator", "layer", "network", "forward and backward, ms/image", "speed of routing")
    for allocator in _allocators(components.device.torch_device.type):
        with_allocator = changed(config, "device", allocator=allocator)
        variants = variants_of(with_allocator, routed=is_routed(model), compiled=compiled)
        speed = in_process("speed", variants, plugins=plugins)
        peaks = {
            name: in_process("peak", {name: variant}, plugins=plugins)["bytes"]
            for name, variant in variants.items()
        }
        for name in variants:
            steps.add_row(*_step_row(allocator, name, speed, peaks[name]))
        for name in list(variants)[1:]:
            steps.add_row(*ratio_row(allocator, name, speed, peaks))
        steps.add_row(allocator, "memory floor", f"{speed['batch'] / speed['floor']:.1f}", "", "", "")
        steps.add_section()
        routed = {
            name: variant for name, variant in variants.items() if variant.routed and not variant.compiled
        }
        for row in layer_rows(allocator, in_process("layers", routed, plugins=plugins)):
            layers.add_row(*row)
    console.print(steps)
    if layers.rows:
        console.print(layers)
    console.print(
        "images/s, ms/image: medians; the networks take turns, step by step. ratios: medians over neighboring"
        " steps. memory: above the idle process. data share: time to get a batch / time of a training step."
        " memory floor: a step that only moves what goes into and out of its layers, at the speed of a copy;"
        " data that stay in a cache can be faster"
    )


def _print_setup(console: Console, components: Components, model: nn.Module) -> None:
    """Print what is measured, and which path the routing of each layer takes."""
    shape = "x".join(map(str, components.dataset.image_shape))
    count = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{type(model).__name__}, {count:,} parameters, {shape}, batch {components.trainer.batch_size}, "
        f"{str(components.trainer.precision).removeprefix('torch.')}, {components.device}, {processor()}"
    )
    for name, layer in model.named_modules():
        if isinstance(layer, RoutedLayer):
            reason = layer.fused_reason()
            path = "the fused path" if reason is None else f"the reference path: {reason}"
            console.print(f"{name}.routing takes {path}")


def variants_of(config: dict[str, Any], *, routed: bool, compiled: bool) -> dict[str, Variant]:
    """Return the network as configured and those to compare it with, by name."""
    variants = {NETWORK: Variant(config)}
    routing = config.get("routing")
    if isinstance(routing, dict) and routing.get("implementation", "reference") != "reference":
        plain = changed(config, "routing", implementation="reference")
        variants["reference"] = Variant(plain)
        if compiled:
            variants["reference, compiled"] = Variant(plain, compiled=True)
    if compiled:
        variants["routing, compiled"] = Variant(config, compiled=True)
    if routed:
        variants["no routing"] = Variant(config, routed=False)
    return variants


def _allocators(device: str) -> list[str]:
    return ["tuned", "default"] if device == "cpu" and has_tunable_allocator() else ["default"]


def _step_row(allocator: str, name: str, speed: Mapping[str, Any], peak: int) -> list[str]:
    size = speed["batch"]
    training, inference = (statistics.median(speed[phase][name]) for phase in ("training", "inference"))
    share = f"{speed['data'] / training:.2%}" if name == NETWORK else ""
    return [
        allocator,
        name,
        f"{size / training:.1f}",
        f"{size / inference:.1f}",
        f"{peak / 2**20:.0f}",
        share,
    ]


def ratio_row(allocator: str, name: str, speed: Mapping[str, Any], peaks: Mapping[str, int]) -> list[str]:
    """Return cells with the network's speed as a multiple of another's, and its memory likewise.

    Args:
        allocator: for the first cell.
        name: of the other network.
        speed: as `measure.speed` returns it.
        peaks: bytes by network.
    """
    cells = [f"{_times_as_fast(speed[phase], name):.3g}" for phase in ("training", "inference")]
    return [allocator, f"ratio to {name}", *cells, f"{peaks[NETWORK] / peaks[name]:.3f}", ""]


def layer_rows(allocator: str, measured: Mapping[str, Any]) -> list[list[str]]:
    """Return a row of cells for each layer and network, from the result of `measure.layers`."""
    rows = []
    for layer, seconds in measured.items():
        if layer == "batch":
            continue
        for name in seconds:
            milliseconds = 1000 * statistics.median(seconds[name]) / measured["batch"]
            times = "" if name == NETWORK else f"{_times_as_fast(seconds, name):.3g} times that of {name}"
            rows.append([allocator, layer, name, f"{milliseconds:.3f}", times])
    return rows


def _times_as_fast(seconds: Mapping[str, Sequence[float]], other: str) -> float:
    """Return the network's speed as a multiple of another's: the median over neighboring steps."""
    return statistics.median(b / a for a, b in zip(seconds[NETWORK], seconds[other], strict=True))


def processor() -> str:
    """Return the name of the CPU, or its architecture if the system does not report the name."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
