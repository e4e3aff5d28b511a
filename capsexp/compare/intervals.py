"""How far a test error would move with other toys: a bootstrap over groups of images.

Errors come in groups: a network that mistakes a toy mistakes many of its views. So the spread over seeds says
how a training varies, and this interval how far the error depends on the toys that are in the test.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from capsexp.compare.group_errors import Errors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESAMPLES = 10_000
PERCENTILES = (2.5, 97.5)
SEED = 0


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; without bounds where the images have no groups."""

    mean: float
    low: float | None = None
    high: float | None = None


def error_interval(runs: Sequence[Errors]) -> Interval | None:
    """Return the mean test error of some runs in %, with its interval over the groups.

    Groups are drawn with replacement within each class, as many as the class has, with all of their images:
    the classes are given, the toys are a sample. The draws are the same at every call.

    Args:
        runs: errors on the same images, one for each seed.

    Returns:
        None without groups, or where the runs have not seen the same ones.
    """
    if not runs or not _same_groups(runs):
        return None
    return _interval(runs[0], _mean_errors(runs))


def gap_interval(runs: Sequence[Errors], baseline: Sequence[Errors]) -> Interval | None:
    """Return the difference of two mean test errors in points of %, paired: both see each draw of groups.

    Args:
        runs: one for each seed.
        baseline: those whose mean is subtracted.

    Returns:
        None without groups, or where the runs have not seen the same ones.
    """
    if not runs or not baseline or not _same_groups([*runs, *baseline]):
        return None
    return _interval(runs[0], _mean_errors(runs) - _mean_errors(baseline))


def _same_groups(runs: Sequence[Errors]) -> bool:
    seen = [[(part.name, part.of_class, part.images) for part in errors.groups] for errors in runs]
    return bool(seen[0]) and all(groups == seen[0] for groups in seen)


def _mean_errors(runs: Sequence[Errors]) -> "NDArray[np.float64]":
    """Return the errors of each group, averaged over runs."""
    import numpy as np

    return np.array([[part.errors for part in errors.groups] for errors in runs], float).mean(0)


def _interval(like: Errors, errors: "NDArray[np.float64]") -> Interval:
    import numpy as np

    images = np.array([part.images for part in like.groups], float)
    draws = _draws(tuple(part.of_class for part in like.groups))
    resampled = 100 * (draws @ errors) / (draws @ images)
    low, high = np.percentile(resampled, PERCENTILES)
    return Interval(float(100 * errors.sum() / images.sum()), float(low), float(high))


def _draws(classes: Sequence[str]) -> "NDArray[np.float64]":
    """Return how often each group is in each resample, [RESAMPLES, groups]."""
    import numpy as np

    generator = np.random.default_rng(SEED)
    draws = np.zeros((RESAMPLES, len(classes)))
    for name in dict.fromkeys(classes):
        members = [place for place, own in enumerate(classes) if own == name]
        draws[:, members] = generator.multinomial(len(members), [1 / len(members)] * len(members), RESAMPLES)
    return draws
