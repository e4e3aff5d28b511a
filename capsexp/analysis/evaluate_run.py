"""`capsexp eval`: metrics of a trained run on a split."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from capsexp.analysis.trained_run import load_model
from capsexp.config.components import Components
from capsexp.data.dataset import Dataset
from capsexp.data.split import Split
from capsexp.errors import UserError
from capsexp.training.evaluate import evaluate


def evaluate_run(components: Components, config: Mapping[str, Any]) -> dict[str, float]:
    """Print a trained run's metrics on a split, and append them to its evaluations.jsonl."""
    path, split_name = Path(config["run"]), config["split"]
    if split_name not in ("test", "familiar", "validation", "train"):
        raise UserError(f"split: must be 'test', 'familiar', 'validation' or 'train', got {split_name!r}")
    model, step = load_model(components, path, weights=str(config["weights"]))
    split = _split(components.dataset, split_name)
    if split.size == 0:
        raise UserError(f"split={split_name}: this run has no {split_name} images")
    batches = components.batches(split, limit=components.trainer.limit_eval_batches)
    values = evaluate(model, batches, components.loss, step, precision=components.trainer.precision)
    table = Table(
        f"{split_name}, {batches.visited} images", f"{config['weights']} weights, step {step.number}"
    )
    for name, value in values.items():
        table.add_row(name, f"{value:.6g}")
    for caveat in components.dataset.caveats():
        print(caveat)
    Console().print(table)
    with open(path / "evaluations.jsonl", "a") as file:
        file.write(json.dumps({"split": split_name, "step": step.number, "config": config, **values}) + "\n")
    return values


def _split(dataset: Dataset, name: str) -> Split:
    """Read a split.

    Raises:
        UserError: there are no familiar test images beside the test split.
    """
    if name in ("train", "validation"):
        return dataset.read_training()[name == "validation"]
    split = dataset.read("test") if name == "test" else dataset.familiar()
    if split is None:
        raise UserError(f"split=familiar: {dataset.name} has no familiar test images beside its test split")
    return split
