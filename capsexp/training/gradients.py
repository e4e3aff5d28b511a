"""The gradient of a batch, in as many parts and processes as there are."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from capsexp.capsules import Batch
from capsexp.schedule import Step
from capsexp.training.metrics import Loss, autocast, figures
from capsexp.training.parallel import SINGLE, ProcessGroup
from capsexp.training.trainer import Trainer


def gradients(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    step: Step,
    settings: Trainer,
    *,
    layers: bool = True,
    processes: ProcessGroup = SINGLE,
) -> dict[str, float]:
    """Leave the gradient of the batch's mean loss in the parameters; return the batch's `figures`.

    With several processes each does its slice, and all end up with the gradient of the whole batch.
    """
    model.zero_grad(set_to_none=True)
    told: dict[str, float] = {}
    mine, whole = processes.slice_of(batch)
    for part in _parts_of(mine, settings.accumulate):
        share = whole * len(part.labels) / len(mine.labels)
        with autocast(part.images.device, settings.precision):
            output = model(part.images, part.labels)
            terms = loss(output, part, step)
        total = torch.stack(list(terms.values())).sum()
        (total * share if share < 1 else total).backward()
        for name, value in figures(output, part, terms, layers=layers).items():
            told[name] = told.get(name, 0.0) + share * value
    return processes.all_reduce_gradients(model, told)


def _parts_of(batch: Batch, count: int) -> Iterator[Batch]:
    if count == 1:
        yield batch
    else:
        size = math.ceil(len(batch.labels) / count)
        yield from (Batch(*fields) for fields in zip(*(field.split(size) for field in batch), strict=True))


def gradient_norm(model: nn.Module, largest: float | None) -> float:
    """Norm of the whole gradient, before it is cut to `largest`."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if largest is not None:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm.item()
