"""Part 3: training steps, fused, in plain and in compiled PyTorch, and their memory floor."""

import math
import statistics
import time
from collections.abc import Mapping
from typing import Any

from scripts.on_a_gpu.parts import Outcome, Plan

NETWORKS = {
    "68K": ("model=em_routing", "dataset=smallnorb"),
    "310K": ("model=em_routing_310k", "dataset=smallnorb"),
    "CapsNet": ("model=dynamic_routing", "dataset=mnist"),
}
BATCHES, DRY_BATCHES = (64, 256, 1024), (2,)
MEASURED, DRY_MEASURED = 5.0, 0.5
"""Seconds of steps that count, of all networks of a measurement together."""
LONGEST = {False: 60.0, True: 150.0}
"""Seconds of a measurement on a card with its start, without and with torch.compile."""
COMPILED = "reference, compiled"  # as `capsexp bench compiled=true` calls it
OUT_OF_MEMORY, NO_TIME, MORE_THAN, FAILED = "out of memory", "no time left", "more than", "failed"
NOT_DRY = "not in a dry run"


def run(plan: Plan, end: float) -> Outcome:
    """Measure every network at every batch size, first all of them without torch.compile."""
    rows: list[dict[str, Any]] = [
        {"network": network, "batch": batch, "images/s": {}, "ratio": {}}
        for batch in (DRY_BATCHES if plan.cpu else BATCHES)
        for network in NETWORKS
    ]
    for compiled in (False, True):
        for row in rows:
            if compiled and plan.cpu:  # it takes minutes on a CPU
                row["images/s"][COMPILED] = NOT_DRY
            else:
                _measure(row, compiled, plan, end)
    return judge(rows)


def judge(rows: list[dict[str, Any]]) -> Outcome:
    """Return the outcome of rows with speeds. torch.compile may lack time: it takes what the others leave."""
    found = {
        (row["network"], row["batch"], name): speed for row in rows for name, speed in row["images/s"].items()
    }
    said = {key: speed for key, speed in found.items() if isinstance(speed, str)}
    late = [key for key, speed in said.items() if speed == NO_TIME or speed.startswith(MORE_THAN)]
    failures = [f"{' '.join(map(str, key))} {text}" for key, text in said.items() if text.startswith(FAILED)]
    full = sum(speed == OUT_OF_MEMORY for speed in said.values())
    message = f"{len(found) - len(said)} of {len(found)} speeds measured"
    message += f", {full} out of memory" * (full > 0)
    message += f", {len(late)} without the time (--minutes gives more)" * (len(late) > 0)
    message = "; ".join([message, *failures])
    if failures or len(found) == len(said):
        return Outcome("failed", message, {"rows": rows})
    in_time = all(name == COMPILED for _, _, name in late)
    return Outcome("ok" if in_time else "out of time", message, {"rows": rows})


def _measure(row: dict[str, Any], compiled: bool, plan: Plan, end: float) -> None:
    """Add a measurement to a row: the network as configured takes turns with the one it is compared with."""
    from capsexp.analysis.speed.bench import NETWORK, variants_of
    from capsexp.config.compose import compose, to_plain

    overrides = [*NETWORKS[row["network"]], f"trainer.batch_size={row['batch']}"]
    overrides.append(f"device={'cpu' if plan.cpu else 'cuda'}")
    variants = variants_of(
        to_plain(compose("train", overrides, config_dir=None)), routed=False, compiled=compiled
    )
    other = COMPILED if compiled else "reference"
    found = measured({name: variants[name] for name in (NETWORK, other)}, compiled, plan, end)
    if compiled:  # the measurement before has the speed as configured
        found["images/s"].pop(NETWORK)
    for key, value in found.items():
        row[key] = row[key] | value if isinstance(value, dict) else value


def measured(variants: Mapping[str, Any], compiled: bool, plan: Plan, end: float) -> dict[str, Any]:
    """Return `images/s` of each network, a number or why there is none, and what else `figures` returns.

    Networks that do not fit into the memory together are measured alone. If all of them together take too
    long, only the first is.
    """
    from capsexp.analysis.speed.measure import in_process
    from capsexp.errors import UserError

    longest = math.inf if plan.cpu else LONGEST[compiled]
    left = min(end - time.monotonic(), longest)
    if left <= 0:
        return {"images/s": dict.fromkeys(variants, NO_TIME)}
    limit = DRY_MEASURED if plan.cpu else MEASURED
    try:
        return figures(in_process("training", variants, plugins=[], limit=limit, timeout=left))
    except MemoryError:
        reason = OUT_OF_MEMORY
    except TimeoutError:
        reason = NO_TIME if left < longest else f"{MORE_THAN} {left:.0f} s"
    except UserError as error:
        reason = f"{FAILED}: {error}"
    found: dict[str, Any] = {"images/s": dict.fromkeys(variants, reason)}
    if len(variants) == 1:
        return found
    again = list(variants)[:1] if reason.startswith((NO_TIME, MORE_THAN)) else list(variants)
    for name in again:
        alone = measured({name: variants[name]}, compiled, plan, end)
        found = {**found, **alone, "images/s": found["images/s"] | alone["images/s"]}
    return found


def figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return images per second, the network's speed as a multiple of another's, and the memory floor.

    Args:
        found: what `capsexp.analysis.speed.measure.training` returns.
    """
    seconds, size = found["training"], found["batch"]
    first, *others = seconds
    return {
        "images/s": {name: size / statistics.median(times) for name, times in seconds.items()},
        "ratio": {
            name: statistics.median(b / a for a, b in zip(seconds[first], seconds[name], strict=True))
            for name in others
        },
        "floor, images/s": size / found["floor"],
        "floor, share": found["floor"] / statistics.median(seconds[first]),
        "bytes": found["bytes"],
        "bandwidth": found["bandwidth"],
    }
