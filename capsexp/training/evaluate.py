"""Accuracy and loss of a network over a split, one batch at a time."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import Batch
from capsexp.data.batches import Batches
from capsexp.schedule import Step
from capsexp.training.metrics import Loss, accuracies, autocast, batch_metrics, pool_crops
from capsexp.training.parallel import SINGLE, ProcessGroup
from capsexp.training.per_class import balanced_accuracy, count_labels, macro_f1
from capsexp.training.tally import Tally


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Put the network into evaluation mode, without gradients, and restore its mode afterwards."""
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
    processes: ProcessGroup = SINGLE,
    tally: Tally | None = None,
) -> dict[str, float]:
    """Average the metrics over all images of a split, and over the crops of each if there are several.

    Args:
        model: the network.
        batches: the split; read in order, with the preprocessing of test time.
        loss: returns the terms to average.
        step: of the training, for the loss's schedules.
        precision: of autocast; float32 for none.
        at_batch: called before each batch; may raise to stop the evaluation.
        processes: share the images of each batch.
        tally: counts the images by class and predicted class.

    Returns:
        The metrics of `batch_metrics`, and means over the classes: `balanced_accuracy`, of accuracies, and
        `macro_f1`.
        With several crops the predicted classes of an image are those of all its crops together.
    """
    sums: dict[str, float] = defaultdict(float)
    labels: dict[str, float] = defaultdict(float)
    count = 0
    with inference(model):
        for views in batches.views():
            at_batch()
            size = len(views[0].labels)
            slices = [processes.slice_of(view) for view in views]
            _, share = slices[0]
            own = [view for view, _ in slices]
            metrics, scores = _view_metrics(own, model, loss, step, precision)
            # Processes that share the same image count it once together.
            weight = share * size / len(own[0].labels)
            if tally is not None:
                tally.add(own[0], scores, weight=weight)
            for name, value in metrics.items():
                sums[name] += value * (share * size)
            for name, value in count_labels(scores, own[0].labels).items():
                labels[name] += value * weight
            count += size
    if tally is not None:
        tally.sum_over(processes)
    means = {name: total / count for name, total in processes.sum(sums).items()}
    counts = processes.sum(labels)
    by_class = {"balanced_accuracy": balanced_accuracy(counts), "macro_f1": macro_f1(counts)}
    return {"accuracy": means["accuracy"], **by_class, **means}


def _view_metrics(
    views: Sequence[Batch], model: nn.Module, loss: Loss, step: Step, precision: torch.dtype
) -> tuple[dict[str, float], Float[Tensor, "B J"]]:
    """Return metrics and scores of a batch: means over its crops; accuracy and scores of all together."""
    metrics: dict[str, float] = defaultdict(float)
    probabilities = []
    for view in views:
        with autocast(view.images.device, precision):
            output = model(view.images, view.labels)
            terms = loss(output, view, step)
        probabilities.append(output.probabilities.float())
        for name, value in batch_metrics(output, view, terms).items():
            metrics[name] += value / len(views)
    if len(views) == 1:
        return metrics, output.scores
    scores = pool_crops(probabilities)
    metrics.update({name: value.item() for name, value in accuracies(scores, views[0].labels).items()})
    return metrics, scores
