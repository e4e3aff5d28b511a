"""Margin loss on the lengths of class capsules, with the reconstruction as a regulariser."""

from jaxtyping import Float
from torch import Tensor

from capsexp.capsules import Batch, Output
from capsexp.ops.labels import multi_hot
from capsexp.ops.penalty import checked_decay, reconstruction_term, weight_decay_term, weight_schedule
from capsexp.schedule import Schedule, Step


class Margin:
    """Long capsules for classes that are present, of which there may be several, short ones for the others.

    Eq. 4 and section 4.1 of Sabour et al., "Dynamic routing between capsules" (NIPS 2017).
    Differs from it in: nothing.

    Args:
        present: m+, the length from which a present class costs nothing.
        absent: m-, the length up to which an absent class costs nothing.
        down_weight: lambda, of absent classes.
        weight_decay: factor on half the sum of all squared weights; 0 for none.
        reconstruction_weight: factor on the sum of squared errors over the pixels; a number or a schedule.
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
        if not 0 <= absent < present <= 1:
            raise ValueError(
                f"absent and present must be 0 <= absent < present <= 1, got {absent} and {present}"
            )
        if down_weight < 0:
            raise ValueError(f"down_weight must be >= 0, got {down_weight}")
        self.present, self.absent, self.down_weight = present, absent, down_weight
        self.weight_decay = checked_decay(weight_decay)
        self.reconstruction_weight = weight_schedule(reconstruction_weight)

    def __call__(self, output: Output, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Terms of the loss: "margin", and where they count "weight_decay" and "reconstruction"."""
        return {
            "margin": self._margin(output.scores, batch.labels),
            **weight_decay_term(output, self.weight_decay),
            **reconstruction_term(output, batch, self.reconstruction_weight(step)),
        }

    def scheduled(self, step: Step) -> dict[str, float]:
        """Present value of what may change during training."""
        return {"reconstruction_weight": self.reconstruction_weight(step)}

    def _margin(self, lengths: Float[Tensor, "B J"], labels: Tensor) -> Float[Tensor, ""]:
        is_present = multi_hot(labels, lengths.shape[1]).to(lengths.dtype)  # T_k
        too_short = (self.present - lengths).relu().square()
        too_long = (lengths - self.absent).relu().square()
        return (is_present * too_short + self.down_weight * (1 - is_present) * too_long).sum(1).mean()
