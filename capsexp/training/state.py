"""What a resumed run has to get back."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class State:
    """Everything that a resumed run has to get back; the rest follows from the config and the step."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedModel | None
    ) -> None:
        self.model, self.optimizer, self.average = model, optimizer, average
        self.step = self.epoch = self.batch = 0
        self.recorded = 0  # bytes of metrics.jsonl
        self.best_accuracy = -1.0
        self.best_step: int | None = None
        self.stopped: dict[str, Any] | None = None
        """Where an accuracy ended the training: `on` which pictures, `accuracy`, `step`."""

    @property
    def best(self) -> dict[str, int | float] | None:
        """The best validation so far: its accuracy and step."""
        return None if self.best_step is None else {"accuracy": self.best_accuracy, "step": self.best_step}

    def note_validation(self, accuracy: float) -> None:
        """Remember the best validation so far; of equals, the first."""
        if accuracy > self.best_accuracy:
            self.best_accuracy, self.best_step = accuracy, self.step

    def note_stop(self, stopped: dict[str, Any], figures: Mapping[str, float]) -> None:
        """Remember that training ends here, which makes these weights the best, whatever came before."""
        self.stopped = stopped
        if "validation/accuracy" in figures:
            self.best_accuracy, self.best_step = figures["validation/accuracy"], self.step

    @property
    def chosen_step(self) -> int | None:
        """The step of the weights that `best.pt` and the test are to have; None for the last."""
        return self.best_step if self.stopped is None else self.stopped["step"]

    def state_dict(self, rng_states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The state as plain values and tensors.

        Args:
            rng_states: `random_state` of every process of the run, by rank.
        """
        numbers = ("step", "epoch", "batch", "recorded", "best_accuracy", "best_step", "stopped")
        return {
            **{name: getattr(self, name) for name in numbers},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            **rng_states[0],
            **({"random_others": list(rng_states[1:])} if len(rng_states) > 1 else {}),
        }

    def restore(self, saved: dict[str, Any], *, rank: int = 0) -> None:
        """Take over what `state_dict` returned, in the process of this rank.

        A process that had none of its rank before it keeps its random state.
        """
        self.restore_weights(saved)
        self.optimizer.load_state_dict(saved["optimizer"])
        for name in ("step", "epoch", "batch", "recorded", "best_accuracy", "best_step"):
            setattr(self, name, saved[name])
        self.stopped = saved.get("stopped")  # older checkpoints have none
        if rank < processes_of(saved):
            _restore_random(saved if rank == 0 else saved["random_others"][rank - 1])

    def restore_weights(self, saved: dict[str, Any]) -> None:
        """Take over the weights, and their moving average, alone."""
        self.model.load_state_dict(saved["model"])
        if self.average is not None:
            self.average.load_state_dict(saved["average"])


def random_state() -> dict[str, Any]:
    """The global generators, which dropout draws from. Order and augmentation follow from seed and epoch."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"random": torch.get_rng_state(), "random_cuda": cuda}


def processes_of(saved: dict[str, Any]) -> int:
    """How many processes the run had when this was captured."""
    return 1 + len(saved.get("random_others", ()))


def _restore_random(saved: dict[str, Any]) -> None:
    torch.set_rng_state(saved["random"])
    if torch.cuda.is_available() and saved["random_cuda"]:
        torch.cuda.set_rng_state_all(saved["random_cuda"])


def trained_weights(saved: dict[str, Any]) -> dict[str, Any]:
    """The weights to use from a checkpoint: their moving average where there is one."""
    if saved["average"] is None:
        return dict(saved["model"])
    module = "module."
    items = saved["average"].items()
    return {name.removeprefix(module): value for name, value in items if name.startswith(module)}
