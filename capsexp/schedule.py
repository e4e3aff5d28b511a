"""Values that change during training: functions of the training step.

A config may give a schedule wherever a scalar may change: the learning rate, the weight of the
reconstruction, a margin, an inverse temperature. A schedule keeps no state, so resuming needs none.
"""

import math
from collections.abc import Callable
from typing import NamedTuple


class Step(NamedTuple):
    """Progress of a training: `number` optimizer steps done, of `total`."""

    number: int
    total: int


Schedule = Callable[[Step], int | float]


class Constant:
    """The same value at every step."""

    def __init__(self, *, value: int | float) -> None:
        self.value = _finite("value", float(value))

    def __call__(self, step: Step) -> int | float:
        """Value at a step."""
        return self.value


class Exponential:
    """`start * decay ** (step / every)`, at least `minimum`. Continuous, not in stairs.

    In the authors' code for Sabour et al. 2017 the learning rate is 0.001 * 0.96 ** (step / 2000), >= 1e-6.
    """

    def __init__(
        self, *, start: int | float, decay: int | float, every: int | float, minimum: int | float
    ) -> None:
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {decay}")
        if not every > 0:
            raise ValueError(f"every must be > 0 steps, got {every}")
        if not _finite("start", start) >= minimum:
            raise ValueError(f"start must be >= minimum ({minimum}), got {start}")
        self.start, self.decay, self.every, self.minimum = start, decay, every, minimum

    def __call__(self, step: Step) -> int | float:
        """Value at a step."""
        return max(self.minimum, self.start * self.decay ** (step.number / self.every))


class Linear:
    """From `start` to `end` in a straight line over `steps` steps, then constant.

    Args:
        start: value at step 0.
        end: value from step `steps` on.
        steps: length of the ramp: an integer >= 1 in optimizer steps, or a float in (0, 1] as a fraction of
            the run. 1 is one step, 1.0 the whole run.
    """

    def __init__(self, *, start: int | float, end: int | float, steps: int | float) -> None:
        self.start, self.end = _finite("start", start), _finite("end", end)
        self.steps = _ramp_length(steps)

    def __call__(self, step: Step) -> int | float:
        """Value at a step."""
        return self.start + (self.end - self.start) * _ramp(step, self.steps)


class Cosine:
    """From `start` to `end` along half a cosine over `steps` steps (as in `Linear`), then constant."""

    def __init__(self, *, start: int | float, end: int | float, steps: int | float) -> None:
        self.start, self.end = _finite("start", start), _finite("end", end)
        self.steps = _ramp_length(steps)

    def __call__(self, step: Step) -> int | float:
        """Value at a step."""
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * _ramp(step, self.steps)))


class Sigmoid:
    """From `start` to `end` along a logistic curve over `steps` steps (as in `Linear`), then constant.

    The curve runs over [-4, 10], so the first value is 1.8 % of the way above `start`. In the authors' code
    for Hinton et al. 2018 the margin is 0.2 + 0.79 * sigmoid(min(10, step / 50,000 - 4)): 700,000 steps.
    """

    def __init__(self, *, start: int | float, end: int | float, steps: int | float) -> None:
        self.start, self.end = _finite("start", start), _finite("end", end)
        self.steps = _ramp_length(steps)

    def __call__(self, step: Step) -> int | float:
        """Value at a step."""
        return self.start + (self.end - self.start) / (1 + math.exp(4 - 14 * _ramp(step, self.steps)))


class Saturating:
    """`limit * (1 - decay ** (step + 1))`: rises toward `limit`, slower and slower."""

    def __init__(self, *, limit: int | float, decay: int | float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.limit, self.decay = _finite("limit", limit), decay

    def __call__(self, step: Step) -> int | float:
        """Value at a step."""
        return self.limit * (1 - self.decay ** (step.number + 1))


class Warmup:
    """The schedule `then`, times a straight line from 0 to 1 over `steps` steps (as in `Linear`)."""

    def __init__(self, *, steps: int | float, then: Schedule | int | float) -> None:
        self.steps, self.then = _ramp_length(steps), as_schedule(then)

    def __call__(self, step: Step) -> int | float:
        """Value at a step."""
        # A rate of 0 at step 0 would waste that step: count the step about to be taken.
        return self.then(step) * _ramp(Step(step.number + 1, step.total), self.steps)


def as_schedule(value: Schedule | int | float) -> Schedule:
    """Return a schedule unchanged and a number as a constant schedule."""
    return value if callable(value) else Constant(value=value)


def _finite(name: str, value: int | float) -> int | float:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def _ramp_length(steps: int | float) -> int | float:
    if isinstance(steps, bool) or not steps > 0 or (isinstance(steps, float) and steps > 1):
        raise ValueError(
            f"steps must be an integer >= 1 (steps) or a fraction in (0, 1] of the run, got {steps}"
        )
    return steps


def _ramp(step: Step, steps: int | float) -> float:
    length = steps * step.total if isinstance(steps, float) else steps
    return min(1.0, step.number / length) if length > 0 else 1.0
