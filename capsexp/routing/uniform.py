"""No routing: the control that a routing algorithm must beat."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import Routed
from capsexp.ops.squash import length, squash


def uniform_routing(votes: Float[Tensor, "B I J D"], *, bias: Float[Tensor, "J D"] | None = None) -> Routed:
    """Squash the sum of the votes over the children, divided by the number of parents: every coupling is 1/J.

        v_j = squash(1/J sum_i û_j|i)

    The control of Paik et al., "Capsule networks need an improved routing algorithm" (ACML 2019), and the
    first pass of Sabour et al., "Dynamic routing between capsules" (NIPS 2017).
    Differs from it in: float16 and bfloat16 votes are summed and returned in float32.

    Args:
        votes: û_j|i.
        bias: added to the sum before the squash; None for none.
    Returns: poses; their lengths in [0, 1); couplings, all 1/J.
    Laws: the same as dynamic routing with one iteration.
    """
    votes = votes.to(torch.promote_types(votes.dtype, torch.float32))
    children, parents = votes.shape[1:3]
    total = votes.sum(1) / parents
    poses = squash(total if bias is None else total + bias)
    coupling = votes.new_full((len(votes), children, parents), 1 / parents)
    return Routed(poses, length(poses), coupling)


class UniformRouting(nn.Module):
    """`uniform_routing` with a learned bias as an option.

    Args:
        in_caps, out_caps, pose_dim: I, J, D of the votes.
        bias: learn a bias per parent, which starts at 0.1.
    """

    bias: nn.Parameter | None
    squashes = True

    def __init__(self, in_caps: int, out_caps: int, pose_dim: int, *, bias: bool) -> None:
        super().__init__()
        self.in_caps, self.out_caps, self.pose_dim = in_caps, out_caps, pose_dim
        self.bias = nn.Parameter(torch.full((out_caps, pose_dim), 0.1)) if bias else None

    def forward(self, votes: Float[Tensor, "B I J D"], activations: Float[Tensor, "B I"]) -> Routed:
        """Route. As in dynamic routing, the votes already contain the activations."""
        return uniform_routing(votes, bias=self.bias)

    def extra_repr(self) -> str:
        """The sizes of the layer."""
        return f"in_caps={self.in_caps}, out_caps={self.out_caps}, pose_dim={self.pose_dim}"

    @torch.no_grad()
    def trace(self, votes: Float[Tensor, "B I J D"], activations: Float[Tensor, "B I"]) -> list[Routed]:
        """The state after the only iteration."""
        return [self(votes, activations)]
