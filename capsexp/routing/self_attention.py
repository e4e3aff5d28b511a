"""Self-attention routing: a vote counts by its agreement with the sum of all votes, in one pass."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import Routed
from capsexp.ops.squash import exponential_squash, length


def self_attention_routing(votes: Float[Tensor, "B I J D"], *, bias: Float[Tensor, "I J"] | None) -> Routed:
    """Route votes by their agreement with the sum of all votes for the same parent.

        A_ij = û_j|i · sum_k û_j|k / sqrt(D)
        c_i = softmax_j(A_i),    v_j = squash(sum_i (c_ij + b_ij) û_j|i)

    with the squash (1 - exp(-|s|)) s / |s|. Mazzia, Salvetti, Chiaberge, "Efficient-CapsNet: capsule network
    with self-attention routing" (Scientific Reports 11, 2021).
    Differs from it in: `exponential_squash` has no epsilon; lengths are exact, where the authors' code adds
    1e-7 under the root. float16 and bfloat16 votes are routed and returned in float32.

    The agreements grow with the number of children. The algorithm was made for 16. With a thousand, the
    softmax of each child chooses one parent from the start.

    Args:
        votes: û_j|i.
        bias: b_ij, added after the softmax; None for none.
    Returns: poses v_j; their lengths in [0, 1); the couplings c_ij without b_ij.
    Laws: coupling sums to 1 over j; permuting i, with the bias, permutes the coupling and leaves the poses;
        rotating all votes for j rotates pose j and leaves the coupling.
    """
    votes = votes.to(torch.promote_types(votes.dtype, torch.float32))
    with torch.autocast(votes.device.type, enabled=False):
        agreement = torch.einsum("bijd,bjd->bij", votes, votes.sum(1)) / math.sqrt(votes.shape[3])
        coupling = agreement.softmax(2)
        shares = coupling if bias is None else coupling + bias
        poses = exponential_squash(torch.einsum("bij,bijd->bjd", shares, votes))
    return Routed(poses, length(poses), coupling)


class SelfAttentionRouting(nn.Module):
    """`self_attention_routing` with its learned bias.

    Args:
        in_caps, out_caps, pose_dim: I, J, D of the votes.
        bias: learn b_ij, which starts at 0.
    """

    bias: nn.Parameter | None
    squashes = True

    def __init__(self, in_caps: int, out_caps: int, pose_dim: int, *, bias: bool) -> None:
        super().__init__()
        self.in_caps, self.out_caps, self.pose_dim = in_caps, out_caps, pose_dim
        self.bias = nn.Parameter(torch.zeros(in_caps, out_caps)) if bias else None

    def forward(self, votes: Float[Tensor, "B I J D"], activations: Float[Tensor, "B I"]) -> Routed:
        """Route. A child's activation is the length of its pose, so the votes already contain it."""
        return self_attention_routing(votes, bias=self.bias)

    def extra_repr(self) -> str:
        """The sizes of the layer."""
        return f"in_caps={self.in_caps}, out_caps={self.out_caps}, pose_dim={self.pose_dim}"
