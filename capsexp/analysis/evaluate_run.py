"""`capsexp eval`: metrics of a trained run on a split."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capsexp.analysis.trained_run import TrainedRun
from capsexp.config.components import Components
from capsexp.files import WriteError, append_line
from capsexp.terminal import Table, new_console
from capsexp.text import printable
from capsexp.training.run_dir import RunDir
from capsexp.training.tally import complete_test, content, new_tally

EVALUATIONS = "evaluations.jsonl"


def evaluate_run(components: Components, config: Mapping[str, Any]) -> dict[str, float]:
    """Print a trained run's metrics on a split, and append them to its evaluations.jsonl.

    The line also has the `errors` by class and by group: see `Tally.content`.

    Args:
        components: what `capsexp.config.build.build_components` returned.
        config: the plain config: `run`, `weights`, `split`.

    Returns:
        See `TrainedRun.evaluate`.

    Raises:
        UserError: an unknown or empty split; weights that cannot be loaded; evaluations.jsonl is a link.
    """
    split, directory = config["split"], RunDir(Path(config["run"]))
    directory.require_own(EVALUATIONS)
    components.device.prepare()
    run = TrainedRun.restore(components, directory.path, weights=config["weights"], config=dict(config))
    batches = run.evaluation_batches(split)
    tally = new_tally(components, split)
    metrics = run.evaluate_batches(batches, tally)
    weights = f"{config['weights']} weights, step {run.step.number}"
    table = Table(f"{split}, {batches.visited} images", weights)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.6g}")
    caveats = components.caveats()
    for caveat in caveats:
        print(printable(caveat))
    new_console().print(table)
    line = {"split": split, "step": run.step.number, "config": config, "remarks": caveats, **metrics}
    if tally is not None:
        line["errors"] = content(tally, split, run.step, components, weights=config["weights"])
    try:
        append_line(run.path / EVALUATIONS, json.dumps(line))
        if tally is not None and split == "test":
            complete_test(directory, line["errors"])
    except WriteError as error:  # the metrics are printed above
        print(f"capsexp: not stored: {printable(str(error))}", file=sys.stderr)
    return metrics
