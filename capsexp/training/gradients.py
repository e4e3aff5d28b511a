"""The gradient of a batch, over microbatches and processes."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from capsexp.capsules import Batch
from capsexp.ops.shared_norm import shared_statistics
from capsexp.schedule import Step
from capsexp.training.metrics import Loss, autocast, batch_metrics
from capsexp.training.parallel import SINGLE, ProcessGroup
from capsexp.training.trainer import Trainer


def accumulate_gradients(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    step: Step,
    settings: Trainer,
    *,
    layers: bool = True,
    processes: ProcessGroup = SINGLE,
) -> dict[str, float]:
    """Set the gradients of the parameters to those of the batch's mean loss.

    With several processes each computes its slice, and all get the gradient of the whole batch.

    Returns:
        The metrics of `batch_metrics`, over the whole batch.
    """
    model.zero_grad(set_to_none=True)
    metrics: dict[str, float] = {}
    own, own_share = processes.slice_of(batch)
    with shared_statistics(processes.size > 1):
        for microbatch in _microbatches(own, settings.accumulate):
            share = own_share * len(microbatch.labels) / len(own.labels)
            with autocast(microbatch.images.device, settings.precision):
                output = model(microbatch.images, microbatch.labels)
                terms = loss(output, microbatch, step)
            total = torch.stack(list(terms.values())).sum()
            (total * share if share < 1 else total).backward()
            for name, value in batch_metrics(output, microbatch, terms, layers=layers).items():
                metrics[name] = metrics.get(name, 0.0) + share * value
    return processes.all_reduce_gradients(model, metrics)


def _microbatches(batch: Batch, count: int) -> Iterator[Batch]:
    if count == 1:
        yield batch
    else:
        size = math.ceil(len(batch.labels) / count)
        for start in range(0, len(batch.labels), size):
            yield batch.take(slice(start, start + size))


def gradient_norm(model: nn.Module, largest: float | None) -> float:
    """Return the norm of the whole gradient, then clip the gradient to the norm `largest`."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if largest is not None:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm.item()
