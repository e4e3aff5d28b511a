"""What ends a training: a number of optimizer steps, a time, or the first of both."""

import math
from typing import NamedTuple

from capsexp.schedule import Step


class Budget(NamedTuple):
    """The length of a training; at least one of both is set."""

    steps: int | None
    """Optimizer steps of the whole run."""
    seconds: float | None = None
    """Seconds of training steps, as `State.seconds` counts them."""

    def is_used(self, step: int, seconds: float) -> bool:
        """Whether the training is over after so many steps that took so many seconds."""
        return (self.steps is not None and step >= self.steps) or self._is_time_up(seconds)

    def position(self, step: int, seconds: float) -> Step:
        """Return the step of its total, for schedules.

        Without a time that is the number of steps. With one, `number / total` is the share of the time used,
        or of the steps if that is larger: at most 1, and 1 at the end. Before the first step is timed the
        share is 0. It depends on nothing else, so a resumed run goes on from the exact share.
        """
        limit = math.inf if self.steps is None else self.steps
        if self.seconds is None:
            return Step(step, limit)
        expected = step * (self.seconds / seconds) if seconds > 0 else math.inf
        return Step(step, min(limit, max(step, expected)))

    def describe(self, epochs: int | None) -> str:
        """Return the length in words.

        Args:
            epochs: `trainer.max_epochs`.
        """
        if self.seconds is None:
            return f"{self.steps} steps"
        time = f"{self.seconds:,g} seconds of training"
        if self.steps is None:
            return time
        hint = "" if epochs is None else "; trainer.max_epochs=null lifts the limit of epochs"
        return f"{time} or {self.steps} steps, whichever ends first{hint}"

    def describe_place(self, step: int, seconds: float) -> str:
        """Return the step at which a run resumes, in words."""
        if self.seconds is None:
            return f"step {step} of {self.steps}"
        return f"step {step}, after {seconds:,.1f} of {self.seconds:,g} seconds of training"

    def end_line(self, step: int, seconds: float) -> str | None:
        """Return a line about a run whose steps ended before its time; None for any other run."""
        if self.seconds is None or self.steps is None or step < self.steps or self._is_time_up(seconds):
            return None
        used = f"{seconds:,.1f} of {self.seconds:,g} seconds of training"
        return f"trainer.max_epochs or trainer.max_steps ended the training at step {step}, after {used}"

    def _is_time_up(self, seconds: float) -> bool:
        return self.seconds is not None and seconds >= self.seconds
