"""What a network gives the loss: scores or activations of its class capsules."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import Routed
from capsexp.errors import require_literal, require_positive

LossInput = Literal["scores", "activations"]


class ClassScores(nn.Module):
    """Choose the input of the loss, and the probabilities of the classes.

    Args:
        loss_input: "scores": the scores of the class capsules, if the routing has any, for a cross-entropy;
            "activations": their activations, also where there are scores.
        gain: factor on the scores, learned from this start; None for 1. Normalized scores have a variance of
            1, with which a softmax learns slowly.
    Raises: ValueError: an unknown option, gain <= 0.
    """

    gain: nn.Parameter | None

    def __init__(self, loss_input: LossInput, gain: int | float | None) -> None:
        super().__init__()
        require_literal(LossInput, loss_input=loss_input)
        require_positive(score_gain=gain)
        self.loss_input: LossInput = loss_input
        self.gain = None if gain is None else nn.Parameter(torch.tensor(float(gain)))

    def forward(self, routed: Routed) -> tuple[Float[Tensor, "B J"], Float[Tensor, "B J"]]:
        """Return the input of the loss and the probabilities: softmax of the scores, or the activations."""
        if routed.scores is None or self.loss_input == "activations":
            return routed.activations, routed.activations
        scores = routed.scores if self.gain is None else self.gain * routed.scores
        return scores, scores.softmax(1)

    def extra_repr(self) -> str:
        """What the loss takes."""
        return f"loss_input={self.loss_input!r}"
