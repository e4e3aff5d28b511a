"""Accuracy and loss of a network over a split, one batch at a time."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from capsexp.capsules import Batch
from capsexp.data.batches import Batches
from capsexp.schedule import Step
from capsexp.training.metrics import Loss, _accuracies, autocast, figures, pooled
from capsexp.training.parallel import SINGLE, ProcessGroup


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
    processes: ProcessGroup = SINGLE,
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
