"""Accuracy and loss of a network over a split, one batch at a time."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from capsexp import checkpoint
from capsexp.build import Parts
from capsexp.capsules import Batch, Output, Routed
from capsexp.data import Batches, Dataset, Split
from capsexp.errors import UserError
from capsexp.ops.entropy import coupling_entropy
from capsexp.ops.labels import all_correct, fraction_correct, predicted_labels
from capsexp.parallel import ALONE, Processes
from capsexp.schedule import Step
from capsexp.state import trained_weights

Loss = Callable[[Output, Batch, Step], dict[str, Tensor]]


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """The network in evaluation mode and without gradients, and afterwards as it was before."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def evaluate(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    step: Step,
    *,
    precision: torch.dtype = torch.float32,
    at_batch: Callable[[], None] = lambda: None,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Means over all pictures of a split, and over the crops of each where the data set has several.

    Args:
        model: the network.
        batches: the split; taken in order, with the preprocessing of test time.
        loss: gives the terms to average.
        step: where the training stands, for the loss's schedules.
        precision: of autocast; float32 for none.
        at_batch: called before each batch; may raise to break off.
        processes: share the pictures of each batch.

    Returns:
        What `figures` tells. With several crops a picture's classes are those that they agree on best.
    """
    sums: dict[str, float] = defaultdict(float)
    count = 0
    with inference(model):
        for views in batches.views():
            at_batch()
            size = len(views[0].labels)
            slices, (share, *_) = zip(*map(processes.slice_of, views), strict=True)
            for name, value in _figures_over(slices, model, loss, step, precision).items():
                sums[name] += value * (share * size)
            count += size
    return {name: total / count for name, total in processes.sum(sums).items()}


def _figures_over(
    views: Sequence[Batch], model: nn.Module, loss: Loss, step: Step, precision: torch.dtype
) -> dict[str, float]:
    """What is told about one batch, as the mean over its crops; the classes are what the crops agree on."""
    told: dict[str, float] = defaultdict(float)
    probabilities = []
    for batch in views:
        with autocast(batch.images.device, precision):
            output = model(batch.images, batch.labels)
            terms = loss(output, batch, step)
        probabilities.append(output.probabilities.float())
        for name, value in figures(output, batch, terms).items():
            told[name] += value / len(views)
    if len(views) > 1:
        accuracies = _accuracies(pooled(probabilities), views[0].labels)
        told.update({name: value.item() for name, value in accuracies.items()})
    return told


def pooled(probabilities: Sequence[Float[Tensor, "B J"]]) -> Float[Tensor, "B J"]:
    """Scores of each picture by all its crops: each crop's probabilities count scaled to a sum of 1."""
    return torch.stack([F.normalize(one, p=1, dim=1) for one in probabilities]).sum(0)


def _accuracies(scores: Float[Tensor, "B J"], labels: Int[Tensor, " B *T"]) -> dict[str, Float[Tensor, ""]]:
    """Share of pictures of which all classes are right; of several in each, also the share of classes."""
    predictions = predicted_labels(scores, labels)
    told = {"accuracy": all_correct(predictions, labels).float().mean()}
    return (
        told if labels.dim() == 1 else told | {"digit_accuracy": fraction_correct(predictions, labels).mean()}
    )


def figures(
    output: Output, batch: Batch, terms: dict[str, Tensor], *, layers: bool = True
) -> dict[str, float]:
    """What is told about one batch.

    Returns:
        `accuracy` in [0, 1], `loss` and its terms. Of several classes in each picture all must be right for
        `accuracy`; `digit_accuracy` is then the share of classes that are. With `layers`, which read all
        couplings: for each layer of capsules `activation/LAYER`, their mean, and `active/LAYER`, the share
        above 1/2; for each routed one `coupling_entropy/LAYER`.
    """
    values = _accuracies(output.scores, batch.labels)
    values |= {"loss": torch.stack(list(terms.values())).sum(), **terms}
    with torch.no_grad():
        for name, capsules in output.layers.items() if layers else ():
            values[f"activation/{name}"] = capsules.activations.mean()
            values[f"active/{name}"] = (capsules.activations > 0.5).float().mean()
            if isinstance(capsules, Routed):
                values[f"coupling_entropy/{name}"] = coupling_entropy(capsules.coupling, capsules.fields)
    # One transfer: on an accelerator each would wait for all the work that was queued.
    told = torch.stack([value.float() for value in values.values()]).tolist()
    return dict(zip(values, told, strict=True))


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Mixed precision for a device; float32 switches it off."""
    enabled = precision is not torch.float32
    return torch.autocast(device.type, dtype=precision if enabled else torch.bfloat16, enabled=enabled)


def load_model(parts: Parts, path: Path, *, weights: str) -> tuple[nn.Module, Step]:
    """A trained network on its device, and the step that its weights are from.

    Args:
        parts: what `capsexp.build.components` returned.
        path: the run directory.
        weights: `best`, `last`, or the number of a step.

    Raises:
        UserError: no such checkpoint, a damaged one, or one of another network.
    """
    parts.device.prepare()
    folder = path / "checkpoints"
    name = checkpoint.name_of(int(weights)) if weights.isdigit() else f"{weights}.pt"
    saved = checkpoint.load(folder / name)
    model = parts.new_model()
    try:
        model.load_state_dict(trained_weights(saved))
    except RuntimeError as error:
        raise UserError(f"the weights in {path} are of another network: {_first_lines(error)}") from None
    model.to(parts.device.torch_device, memory_format=parts.device.memory_format).eval()
    return model, Step(saved["step"], saved["step"])


def evaluate_run(parts: Parts, config: Mapping[str, Any]) -> dict[str, float]:
    """`capsexp eval`: print a trained run's figures on a part of its data; evaluations.jsonl keeps them."""
    path, part = Path(config["run"]), config["part"]
    if part not in ("test", "familiar", "validation", "train"):
        raise UserError(f"part: must be 'test', 'familiar', 'validation' or 'train', got {part!r}")
    model, step = load_model(parts, path, weights=str(config["weights"]))
    split = _split(parts.dataset, part)
    if split.size == 0:
        raise UserError("part=validation: this run had no validation pictures")
    batches = parts.batches(split, limit=parts.trainer.limit_eval_batches)
    values = evaluate(model, batches, parts.loss, step, precision=parts.trainer.precision)
    table = Table(f"{part}, {batches.visited} pictures", f"{config['weights']} weights, step {step.number}")
    for name, value in values.items():
        table.add_row(name, f"{value:.6g}")
    for remark in parts.dataset.remarks():
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


def _first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:3])
