"""Values that change during training: functions of the training step.

A config may give a schedule wherever a scalar may change: the learning rate, the weight of the
reconstruction, a margin, an inverse temperature. A schedule keeps no state, so resuming needs none.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from capsexp.errors import (
    describe,
    is_in,
    is_number,
    refuse,
    require_finite,
    require_in,
    require_not_negative,
    require_positive,
)


class Step(NamedTuple):
    """Progress of a training: `number` optimizer steps done, of `total`.

    Where time ends the training, `total` is the number of steps that it will have at the speed so far: a
    float, so that `number / total` is the share of the time used, and infinite before the first step.
    """

    number: int
    total: int | float


Schedule = Callable[[Step], int | float]

SAMPLES = tuple(
    Step(number, 2**30) for number in sorted({0, *(2**power for power in range(31)), *range(0, 2**30, 2**24)})
)
"""Steps of a long run: dense at the start, for ramps of a number of steps, and even over the whole."""


class Constant:
    """The same value at every step."""

    def __init__(self, *, value: int | float) -> None:
        require_finite(value=value)
        self.value = float(value)

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
        require_in("(0, 1]", decay=decay)
        require_positive(every=every)
        require_finite(start=start)
        require_not_negative(minimum=minimum)
        if start < minimum:
            refuse(f"start must be >= minimum ({minimum}), got {start}")
        self.start, self.decay, self.every, self.minimum = start, decay, every, minimum

    def __call__(self, step: Step) -> int | float:
        """Value at a step."""
        return max(self.minimum, self.start * self.decay ** (step.number / self.every))


class Stairs:
    """`start`, times `factor` from each of the points `at` on: constant between them.

    Args:
        start: value at step 0.
        factor: > 0; 0.1 divides the value by 10 at each point.
        at: points in ascending order: all steps, or all fractions of the run, as `steps` of `Linear`.
    """

    def __init__(self, *, start: int | float, factor: int | float, at: Sequence[int | float]) -> None:
        require_finite(start=start)
        require_positive(factor=factor)
        self.start, self.factor, self.at = start, factor, [_ramp_length(point, name="at") for point in at]
        if list(at) != sorted(at) or len({type(point) for point in at}) > 1:
            refuse(f"at must be steps, or fractions of the run, in ascending order, got {list(at)}")

    def __call__(self, step: Step) -> int | float:
        """Value at a step."""
        return self.start * self.factor ** sum(_ramp(step, point) >= 1 for point in self.at)


class Linear:
    """From `start` to `end` in a straight line over `steps` steps, then constant.

    Args:
        start: value at step 0.
        end: value from step `steps` on.
        steps: length of the ramp: an integer >= 1 in optimizer steps, or a float in (0, 1] as a fraction of
            the run. 1 is one step, 1.0 the whole run.
    """

    def __init__(self, *, start: int | float, end: int | float, steps: int | float) -> None:
        require_finite(start=start, end=end)
        self.start, self.end = start, end
        self.steps = _ramp_length(steps)

    def __call__(self, step: Step) -> int | float:
        """Value at a step."""
        return self.start + (self.end - self.start) * _ramp(step, self.steps)


class Cosine:
    """From `start` to `end` along half a cosine over `steps` steps (as in `Linear`), then constant."""

    def __init__(self, *, start: int | float, end: int | float, steps: int | float) -> None:
        require_finite(start=start, end=end)
        self.start, self.end = start, end
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
        require_finite(start=start, end=end)
        self.start, self.end = start, end
        self.steps = _ramp_length(steps)

    def __call__(self, step: Step) -> int | float:
        """Value at a step."""
        return self.start + (self.end - self.start) / (1 + math.exp(4 - 14 * _ramp(step, self.steps)))


class Saturating:
    """`limit * (1 - decay ** (step + 1))`: rises toward `limit`, slower and slower."""

    def __init__(self, *, limit: int | float, decay: int | float) -> None:
        require_in("[0, 1)", decay=decay)
        require_finite(limit=limit)
        self.limit, self.decay = limit, decay

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


def schedule_in(interval: str, **named: Schedule | int | float) -> Schedule:
    """Return the one argument as a schedule, after a check of its values over any run.

    Args:
        interval: of the values, such as "(0, 1]"; "(0, inf)" and "[0, inf)" for no upper end.
        named: the argument by its name.

    Raises:
        ValueError: a number, or a value of a schedule, is outside the interval.
    """
    ((name, value),) = named.items()
    if not callable(value):
        require_in(interval, **{name: value})
        return as_schedule(value)
    for step in SAMPLES:
        at = _value_at(value, step)
        if not is_number(at):
            refuse(f"{name} must be a number or a schedule, got a {type(value).__name__}")
            break
        if not is_in(interval, at):
            refuse(f"{name} must be {describe(interval)}, got {at:g} at step {step.number} of {step.total}")
            break
    return value


def require_some_positive(**named: Schedule) -> None:
    """Check a schedule that may be 0 for a while, such as a learning rate: not at every step.

    Raises:
        ValueError: it is 0 at every step.
    """
    ((name, schedule),) = named.items()
    values = [_value_at(schedule, step) for step in SAMPLES]
    if all(value == 0 for value in values):
        refuse(f"{name} must be > 0, got 0" + " at every step" * (not isinstance(schedule, Constant)))


def _value_at(schedule: Schedule, step: Step) -> Any:
    try:
        return schedule(step)
    except Exception:  # any callable can stand here in a config, such as a layer
        return None


def _ramp_length(steps: int | float, *, name: str = "steps") -> int | float:
    if isinstance(steps, bool) or not steps > 0 or (isinstance(steps, float) and steps > 1):
        refuse(f"{name} must be an integer >= 1 (steps) or a fraction in (0, 1] of the run, got {steps}")
    return steps


def _ramp(step: Step, steps: int | float) -> float:
    length = steps * step.total if isinstance(steps, float) else steps
    return min(1.0, step.number / length) if length > 0 else 1.0
