"""The check that stops a run at a loss or gradient that is not finite."""

import math

from capsexp.capsules import Batch
from capsexp.errors import RunStopped
from capsexp.training import checkpoint
from capsexp.training.run_dir import RunDir


def refuse_non_finite(metrics: dict[str, float], batch: Batch, step: int, run: RunDir) -> None:
    """Stop the run before a loss or gradient that is not finite changes the weights.

    Raises:
        RunStopped: one of the metrics is not finite; non_finite.json lists the images of the batch.
    """
    wrong = {name: str(value) for name, value in metrics.items() if not math.isfinite(value)}
    if not wrong:
        return
    run.report("non_finite", {"step": step, "values": wrong, "indices": batch.indices.tolist()})
    good = checkpoint.list_saved(run.checkpoints)
    last = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
    names = ", ".join(f"{name} is {value}" for name, value in wrong.items())
    first = ", ".join(str(index).replace(", ", " + ").strip("[]") for index in batch.indices[:8].tolist())
    images = f"training images {first}, … (all in non_finite.json)"
    raise RunStopped(f"step {step}: {names}, with {images}; {last}", exit_code=1)
