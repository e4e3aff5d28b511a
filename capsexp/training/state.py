"""The state of a training run, as checkpoints store it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from capsexp.errors import UserError
from capsexp.schedule import Step
from capsexp.training.budget import Budget
from capsexp.training.saved_state import process_count, restore_optimizer, restore_weights


class State:
    """Everything that a resumed run must restore; the rest follows from the config and the step.

    Args:
        model: the network.
        optimizer: of its parameters.
        average: the moving average of its weights; None without one.
        budget: the length of the whole run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: AveragedModel | None,
        *,
        budget: Budget,
    ) -> None:
        self.model, self.optimizer, self.average, self.budget = model, optimizer, average, budget
        self.step = self.epoch = self.batch = 0
        self.seconds = 0.0
        """Seconds of all training steps so far, with their data; rank 0 counts them."""
        self.recorded = 0  # bytes of metrics.jsonl
        self.best_accuracy = -1.0
        self.best_step: int | None = None
        self.best_rank: list[float] | None = None
        """What `Trainer.rank` returned for the best validation."""
        self.unimproved = 0
        """Validation rounds since the best one."""
        self.stopped: dict[str, Any] | None = None
        """The accuracy that ended the training: `on` (the images), `accuracy`, `step`."""

    @property
    def position(self) -> Step:
        """The step of the training, for schedules. It changes only at the end of a step."""
        return self.budget.position(self.step, self.seconds)

    @property
    def total(self) -> int | None:
        """Optimizer steps of the whole run; expected ones if time ends it, and None before the first step."""
        total = self.position.total
        return round(total) if math.isfinite(total) else None

    @property
    def progress(self) -> dict[str, Any]:
        """How far the training is, for status.json."""
        return {"step": self.step, "total": self.total, "training_seconds": self.seconds}

    @property
    def is_over(self) -> bool:
        """Whether the length of the run is used up."""
        return self.budget.is_used(self.step, self.seconds)

    @property
    def best(self) -> dict[str, int | float] | None:
        """Accuracy and step of the best validation so far."""
        return None if self.best_step is None else {"accuracy": self.best_accuracy, "step": self.best_step}

    def note_validation(self, accuracy: float, rank: list[float]) -> None:
        """Keep accuracy and step of the best validation so far; of equal ones, the first.

        Args:
            accuracy: of this validation.
            rank: what `Trainer.rank` returns for it.
        """
        if self.best_rank is None or rank > self.best_rank:
            self.best_accuracy, self.best_step, self.best_rank = accuracy, self.step, rank
            self.unimproved = 0
        else:
            self.unimproved += 1

    def note_stop(self, stopped: dict[str, Any], metrics: Mapping[str, float]) -> None:
        """End the training here. These weights count as the best, even if an earlier accuracy was higher."""
        self.stopped = stopped
        if "validation/accuracy" in metrics:
            self.best_accuracy, self.best_step = metrics["validation/accuracy"], self.step

    @property
    def chosen_step(self) -> int | None:
        """The step whose weights are `best.pt` and get tested; None for the last."""
        return self.best_step if self.stopped is None else self.stopped["step"]

    def state_dict(self, rng_states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the state as plain values and tensors.

        Args:
            rng_states: `random_state` of every process of the run, by rank.
        """
        numbers = ["step", "seconds", "epoch", "batch", "recorded", "stopped"]
        numbers += ["best_accuracy", "best_step", "best_rank", "unimproved"]
        return {
            **{name: getattr(self, name) for name in numbers},
            "total": self.position.total,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            **rng_states[0],
            **({"random_others": list(rng_states[1:])} if len(rng_states) > 1 else {}),
        }

    def restore(self, saved: dict[str, Any], *, rank: int = 0) -> None:
        """Restore what `state_dict` returned, in the process of this rank. The budget is the new config's.

        A process of a rank that the saved run did not have keeps its random state.

        Raises:
            UserError: the state is of another network or optimizer; the message names the first differences.
        """
        self.restore_weights(saved)
        restore_optimizer(self.optimizer, saved["optimizer"], origin=_origin(saved))
        for name in ("step", "epoch", "batch", "recorded", "best_accuracy", "best_step"):
            setattr(self, name, saved[name])
        self.stopped = saved.get("stopped")  # older checkpoints have none
        self.seconds = saved.get("seconds", 0.0)  # older checkpoints have none
        of_accuracy = None if self.best_step is None else [self.best_accuracy]
        self.best_rank, self.unimproved = saved.get("best_rank", of_accuracy), saved.get("unimproved", 0)
        if rank < process_count(saved):
            _restore_random(saved if rank == 0 else saved["random_others"][rank - 1])

    def restore_weights(self, saved: dict[str, Any]) -> None:
        """Restore only the weights and their moving average.

        Raises:
            UserError: they are of another network, or there is no moving average.
        """
        restore_weights(self.model, saved["model"], origin=_origin(saved))
        if self.average is not None:
            if saved["average"] is None:
                raise UserError(f"trainer.ema_decay: {_origin(saved)} has no moving average of the weights")
            restore_weights(self.average, saved["average"], origin=_origin(saved))


def random_state() -> dict[str, Any]:
    """Return the state of the global generators, which dropout uses.

    The order and the augmentation of images follow from seed and epoch.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"random": torch.get_rng_state(), "random_cuda": cuda}


def _origin(saved: Mapping[str, Any]) -> str:
    return f"the checkpoint of step {saved['step']}"


def _restore_random(saved: dict[str, Any]) -> None:
    torch.set_rng_state(saved["random"])
    if torch.cuda.is_available() and saved["random_cuda"]:
        torch.cuda.set_rng_state_all(saved["random_cuda"])
