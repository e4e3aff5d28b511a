"""The processes of a distributed run, which torchrun starts.

Each process creates every batch, which is a function of (seed, epoch, batch), and takes its slice. Only
rank 0 writes files and prints. A single process sends nothing.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from capsexp.capsules import Batch
from capsexp.config.components import Components
from capsexp.errors import UserError
from capsexp.ops.processes import detect_lost_process
from capsexp.training.running_statistics import running_statistics

T = TypeVar("T")


class ProcessGroup:
    """The processes of a run, seen from one of them. All must call the same methods in the same order.

    Args:
        rank: number of this process, from 0.
        size: number of processes; with 1, every method returns its argument.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the process that writes and prints."""
        return self.rank == 0

    def slice_of(self, batch: Batch) -> tuple[Batch, float]:
        """Return this process's slice of a batch, and its share of the whole batch.

        If there are fewer images than processes, each process takes all of them: no slice is empty.
        """
        count = len(batch.labels)
        if self.size == 1 or count < self.size:
            return batch, 1 / self.size
        start, end = (count * rank // self.size for rank in (self.rank, self.rank + 1))
        return batch.take(slice(start, end)), (end - start) / count

    def all_reduce_gradients(self, model: nn.Module, metrics: dict[str, float]) -> dict[str, float]:
        """Sum the gradients of all processes, in place, and their metrics, which are returned.

        One exchange after the last backward pass serves both, whatever the number of microbatches. No wrapper
        changes the names of parameters in checkpoints.
        """
        if self.size == 1:
            return metrics
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # A parameter without a gradient in all processes must stay without one: an optimizer would use zeros.
        numbers = [float(parameter.grad is not None) for parameter in parameters] + list(metrics.values())
        pieces = [torch.tensor(numbers, device=parameters[0].device), *map(_flat_gradient, parameters)]
        flat = torch.cat(pieces)
        with detect_lost_process():
            dist.all_reduce(flat)
        total, *gradients = flat.split([len(piece) for piece in pieces])
        counts = total.tolist()
        for parameter, gradient, count in zip(parameters, gradients, counts, strict=False):
            if count > 0:
                _set_gradient(parameter, gradient)
        return dict(zip(metrics, counts[len(parameters) :], strict=True))

    def sum(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the sum of each metric over all processes."""
        if self.size == 1:
            return dict(metrics)
        values = torch.tensor(list(metrics.values()), dtype=torch.float64)
        with detect_lost_process():
            dist.all_reduce(values)
        return dict(zip(metrics, values.tolist(), strict=True))

    def max(self, number: int) -> int:
        """Return the largest number of all processes."""
        if self.size == 1:
            return number
        value = torch.tensor(number)
        with detect_lost_process():
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def number_of_main(self, number: float) -> float:
        """Return the number of rank 0, in every process: one small exchange."""
        if self.size == 1:
            return number
        value = torch.tensor(number, dtype=torch.float64)
        with detect_lost_process():
            dist.broadcast(value, 0)
        return float(value)

    def broadcast(self, make: Callable[[], T]) -> T:
        """Return what `make` returns in rank 0, in every process; the others do not call it."""
        if self.size == 1:
            return make()
        values: list[Any] = [make() if self.is_main else None]
        with detect_lost_process():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes by rank, in rank 0; an empty list in the others."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size if self.is_main else []
        with detect_lost_process():
            dist.gather_object(value, values if self.is_main else None)
        return values

    def broadcast_parameters(self, model: nn.Module) -> None:
        """Copy rank 0's parameters and buffers to every process: processors may differ in the last bit."""
        for tensor in (*model.parameters(), *model.buffers()) if self.size > 1 else ():
            values = tensor.detach().contiguous()
            with detect_lost_process():
                dist.broadcast(values, 0)
            tensor.detach().copy_(values)

    def __str__(self) -> str:
        return "" if self.size == 1 else f", {self.size} processes"


SINGLE = ProcessGroup(0, 1)


def check(components: Components, processes: ProcessGroup) -> None:
    """Check that these processes can share this run, and select a GPU for this one.

    Raises:
        UserError: they cannot; one line for each reason.
    """
    device, local_rank = components.device.torch_device, int(os.environ["LOCAL_RANK"])
    problems = list(_unshareable(components))
    if components.trainer.batch_size < processes.size:
        got = components.trainer.batch_size
        problems.append(f"trainer.batch_size must be >= {processes.size}, the number of processes, got {got}")
    if device.type == "mps":
        problems.append("device: mps works with one process; device=cpu works with several")
    if device.type == "cuda" and local_rank >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        problems.append(f"device: each process of a machine needs a GPU of its own; this one has {gpus}")
    if problems:
        raise UserError(*problems)
    if device.type == "cuda":
        torch.cuda.set_device(local_rank)


def _unshareable(components: Components) -> Iterator[str]:
    with torch.device("meta"):
        model = components.new_model()
    for name, module in model.named_modules():
        normalises = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if normalises and not isinstance(module, nn.SyncBatchNorm):
            kind = type(module).__name__
            yield f"model: {name} is a {kind}, which would see only a slice of each batch: use one process"
    accumulate = components.trainer.accumulate
    if accumulate > 1 and running_statistics(model):  # the processes' pieces may differ in number
        yield f"trainer.accumulate must be 1 with batch norms in several processes, got {accumulate}"


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    return (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()


def _set_gradient(parameter: nn.Parameter, flat: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter)
    parameter.grad.copy_(flat.view_as(parameter))
