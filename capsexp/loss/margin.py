"""Margin loss on the lengths of class capsules."""

from jaxtyping import Float, Int
from torch import Tensor

from capsexp.capsules import Batch, Output
from capsexp.errors import refuse, require_not_negative
from capsexp.ops.labels import check_labels, multi_hot
from capsexp.ops.penalty import PenalisedLoss
from capsexp.schedule import Schedule, Step


def margin_loss(
    lengths: Float[Tensor, "B J"],
    labels: Int[Tensor, " B *T"],
    *,
    present: int | float = 0.9,
    absent: int | float = 0.1,
    down_weight: int | float = 0.5,
) -> Float[Tensor, ""]:
    """Push the class capsules of present classes to be long and the others to be short.

    Mean over the batch of

        sum_k  T_k max(0, m+ - |v_k|)^2  +  lambda (1 - T_k) max(0, |v_k| - m-)^2

    with T_k = 1 for a class that the image shows. Eq. 4 of Sabour et al., "Dynamic routing between capsules"
    (NIPS 2017); the defaults are the paper's. Differs from it in: nothing.

    Args:
        lengths: |v_k| of the class capsules, `Output.scores` of a `CapsNet`.
        labels: class of each image, or its T classes.
        present: m+, the length from which a present class costs nothing.
        absent: m-, the length up to which an absent class costs nothing.
        down_weight: lambda, of absent classes.
    Raises: ValueError: wrong shapes; labels not int64 or not in 0 ... J - 1; not
        0 <= absent < present <= 1; a negative down_weight.
    """
    check_labels(lengths, labels, multi_label=True)
    _check_margins(present, absent, down_weight)
    return _margin_loss(lengths, labels, present, absent, down_weight)


class Margin(PenalisedLoss):
    """`margin_loss` of the scores, for images of one class or several, with penalties.

    Sabour et al., "Dynamic routing between capsules" (NIPS 2017), section 4.1 adds the reconstruction.

    Args:
        present, absent, down_weight: see `margin_loss`.
        weight_decay, reconstruction_weight: see `PenalisedLoss`.
    Raises: ValueError: not 0 <= absent < present <= 1; a negative weight.
    """

    multi_label = True

    def __init__(
        self,
        *,
        present: int | float,
        absent: int | float,
        down_weight: int | float,
        weight_decay: int | float,
        reconstruction_weight: Schedule | int | float,
    ) -> None:
        super().__init__(weight_decay=weight_decay, reconstruction_weight=reconstruction_weight)
        _check_margins(present, absent, down_weight)
        self.present, self.absent, self.down_weight = present, absent, down_weight

    def own_term(self, output: Output, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The term "margin"."""
        margins = (self.present, self.absent, self.down_weight)
        return {"margin": _margin_loss(output.scores, batch.labels, *margins)}


def _check_margins(present: int | float, absent: int | float, down_weight: int | float) -> None:
    if not 0 <= absent < present <= 1:
        refuse(f"absent and present must be 0 <= absent < present <= 1, got {absent} and {present}")
    require_not_negative(down_weight=down_weight)


def _margin_loss(
    lengths: Float[Tensor, "B J"],
    labels: Tensor,
    present: int | float,
    absent: int | float,
    down_weight: int | float,
) -> Float[Tensor, ""]:
    is_present = multi_hot(labels, lengths.shape[1]).to(lengths.dtype)  # T_k
    too_short = (present - lengths).relu().square()
    too_long = (lengths - absent).relu().square()
    return (is_present * too_short + down_weight * (1 - is_present) * too_long).sum(1).mean()
