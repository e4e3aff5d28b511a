"""`capsexp eval`: metrics of a trained run on a split."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capsexp.analysis.trained_run import TrainedRun
from capsexp.config.components import Components
from capsexp.terminal import Table, new_console
from capsexp.text import printable


def evaluate_run(components: Components, config: Mapping[str, Any]) -> dict[str, float]:
    """Print a trained run's metrics on a split, and append them to its evaluations.jsonl.

    Args:
        components: what `capsexp.config.build.build_components` returned.
        config: the plain config: `run`, `weights`, `split`.

    Returns:
        See `TrainedRun.evaluate`.

    Raises:
        UserError: an unknown or empty split; weights that cannot be loaded.
    """
    split = config["split"]
    components.device.prepare()
    run = TrainedRun.restore(components, Path(config["run"]), weights=config["weights"], config=dict(config))
    batches = run.evaluation_batches(split)
    metrics = run.evaluate_batches(batches)
    weights = f"{config['weights']} weights, step {run.step.number}"
    table = Table(f"{split}, {batches.visited} images", weights)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.6g}")
    for caveat in components.caveats():
        print(printable(caveat))
    new_console().print(table)
    with open(run.path / "evaluations.jsonl", "a") as file:
        line = {"split": split, "step": run.step.number, "config": config, **metrics}
        file.write(json.dumps(line) + "\n")
    return metrics
