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
    """`capsexp eval`: print a trained run's figures on a part of its data; evaluations.jsonl keeps them."""
    path, part = Path(config["run"]), config["part"]
    if part not in ("test", "familiar", "validation", "train"):
        raise UserError(f"part: must be 'test', 'familiar', 'validation' or 'train', got {part!r}")
    model, step = load_model(components, path, weights=str(config["weights"]))
    split = _split(components.dataset, part)
    if split.size == 0:
        raise UserError("part=validation: this run had no validation pictures")
    batches = components.batches(split, limit=components.trainer.limit_eval_batches)
    values = evaluate(model, batches, components.loss, step, precision=components.trainer.precision)
    table = Table(f"{part}, {batches.visited} pictures", f"{config['weights']} weights, step {step.number}")
    for name, value in values.items():
        table.add_row(name, f"{value:.6g}")
    for remark in components.dataset.caveats():
        print(remark)
    Console().print(table)
    with open(path / "evaluations.jsonl", "a") as file:
        file.write(json.dumps({"part": part, "step": step.number, "config": config, **values}) + "\n")
    return values


def _split(dataset: Dataset, part: str) -> Split:
    """The pictures of a part.

    Raises:
        UserError: there are no familiar test pictures beside the test part.
    """
    if part in ("train", "validation"):
        return dataset.read_training()[part == "validation"]
    split = dataset.read("test") if part == "test" else dataset.familiar()
    if split is None:
        raise UserError(f"part=familiar: {dataset.name} has no familiar test pictures beside its test part")
    return split
