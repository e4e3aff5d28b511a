"""The processes of one run: torchrun starts several, which share every batch and train as one.

Each makes every batch, which is a function of (seed, epoch, batch), and takes its slice of it. The process
of rank 0 is the lead: it alone writes and speaks. Nothing is sent while there is only one process.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from capsexp.capsules import Batch
from capsexp.config.components import Components
from capsexp.errors import UserError

Told = TypeVar("Told")


class ProcessLostError(UserError):
    """Another process of the run does not answer any more."""

    exit_code = 1


class ProcessGroup:
    """One process among those of its run. All of them have to call the same methods in the same order.

    Args:
        rank: number of this process, from 0.
        size: number of processes; with 1, every method gives back what it got.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def slice_of(self, batch: Batch) -> tuple[Batch, float]:
        """The part of a batch that is this process's, and the share of the whole that it counts for.

        Of fewer pictures than processes, each process takes all: no slice is ever empty.
        """
        count = len(batch.labels)
        if self.size == 1 or count < self.size:
            return batch, 1 / self.size
        start, end = (count * rank // self.size for rank in (self.rank, self.rank + 1))
        return Batch(*(field[start:end] for field in batch)), (end - start) / count

    def all_reduce_gradients(self, model: nn.Module, told: dict[str, float]) -> dict[str, float]:
        """Sum the gradients of all processes, in place, and their figures, which are returned.

        One exchange for both, after the last backward pass: the microbatches of a batch need no other,
        and the network stays as it is, with the names that its checkpoints have.
        """
        if self.size == 1:
            return told
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # What has no gradient in any process must stay so: an optimiser would take zeros for one.
        numbers = [float(parameter.grad is not None) for parameter in parameters] + list(told.values())
        pieces = [torch.tensor(numbers, device=parameters[0].device), *map(_flat_gradient, parameters)]
        flat = torch.cat(pieces)
        with _in_touch():
            dist.all_reduce(flat)
        total, *gradients = flat.split([len(piece) for piece in pieces])
        counts = total.tolist()
        for parameter, gradient, count in zip(parameters, gradients, counts, strict=False):
            if count > 0:
                _set_gradient(parameter, gradient)
        return dict(zip(told, counts[len(parameters) :], strict=True))

    def sum(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The sum over all processes, for each figure."""
        if self.size == 1:
            return dict(figures)
        values = torch.tensor(list(figures.values()), dtype=torch.float64)
        with _in_touch():
            dist.all_reduce(values)
        return dict(zip(figures, values.tolist(), strict=True))

    def max(self, number: int) -> int:
        """The largest number that any process gives."""
        if self.size == 1:
            return number
        value = torch.tensor(number)
        with _in_touch():
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def broadcast(self, make: Callable[[], Told]) -> Told:
        """What the lead makes, in every process; the others do not call `make`."""
        if self.size == 1:
            return make()
        told: list[Any] = [make() if self.is_main else None]
        with _in_touch():
            dist.broadcast_object_list(told, src=0)
        return told[0]

    def gather(self, value: Told) -> list[Told]:
        """The values of all processes by rank, for the lead; an empty list for the others."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size if self.is_main else []
        with _in_touch():
            dist.gather_object(value, values if self.is_main else None)
        return values

    def broadcast_parameters(self, model: nn.Module) -> None:
        """Give every process the lead's parameters and buffers: processors may differ in a last bit."""
        for tensor in (*model.parameters(), *model.buffers()) if self.size > 1 else ():
            values = tensor.detach().contiguous()
            with _in_touch():
                dist.broadcast(values, 0)
            tensor.detach().copy_(values)

    def __str__(self) -> str:
        return "" if self.size == 1 else f", {self.size} processes"


SINGLE = ProcessGroup(0, 1)


def check(components: Components, processes: ProcessGroup) -> None:
    """Make sure that these processes can share this run, and let each use a GPU of its own.

    Raises:
        UserError: they cannot; one line for each reason.
    """
    device, local_rank = components.device.torch_device, int(os.environ["LOCAL_RANK"])
    problems = list(_unshareable(components))
    if components.trainer.batch_size < processes.size:
        got = components.trainer.batch_size
        problems.append(f"trainer.batch_size must be >= {processes.size}, the number of processes, got {got}")
    if device.type == "mps":
        problems.append("device: mps serves one process; device=cpu serves several")
    if device.type == "cuda" and local_rank >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        problems.append(f"device: each process of a machine needs a GPU of its own; this one has {found}")
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
            yield f"model: {name} is a {kind}, which would see a slice of each batch: use one process"


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    return (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()


def _set_gradient(parameter: nn.Parameter, flat: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter)
    parameter.grad.copy_(flat.view_as(parameter))


@contextlib.contextmanager
def _in_touch() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "the same command goes on from the last checkpoint"
        raise ProcessLostError(f"lost another process of this run ({reason}); {hint}") from error
