"""No routing: the control that a routing algorithm must beat."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import ReceptiveFields, Routed
from capsexp.ops.squash import length, squash
from capsexp.ops.votes import MatrixVotes, summed_votes


def uniform_routing(
    votes: Float[Tensor, "B *places J D"],
    *,
    bias: Float[Tensor, "J D"] | None = None,
    fields: ReceptiveFields | None = None,
) -> Routed:
    """Squash the sum of the votes over the children, divided by the number of parents: every coupling is 1/J.

        v_j = squash(1/J sum_i û_j|i)

    The control of Paik et al., "Capsule networks need an improved routing algorithm" (ACML 2019), and the
    first pass of Sabour et al., "Dynamic routing between capsules" (NIPS 2017).
    Differs from it in: float16 and bfloat16 votes are summed and returned in float32; windows are ours.

    Args:
        votes: û_j|i: [B, I, J, D] where every parent sees every child; with `fields` [B, P, K, J, D], of the
            child at place k of the window of position p, for each of J parent types.
        bias: added to the sum before the squash; None for none.
        fields: which child is at which place; None where every parent sees every child.
    Raises: ValueError: votes that do not fit the windows.
    Returns: poses of the P * J parents in the order (position, type); their lengths in [0, 1); couplings, all
        1/J.
    Laws: the same as dynamic routing with one iteration, in each window.
    """
    if fields is not None and list(votes.shape[1:-2]) != list(fields.children.shape):
        expected, got = list(fields.children.shape), list(votes.shape[1:-2])
        raise ValueError(f"votes must have [P, K] = {expected} from fields, got {got}")
    votes = votes.to(torch.promote_types(votes.dtype, torch.float32))
    parents = votes.shape[-2]
    total = votes.sum(-3) / parents
    poses = squash(total if bias is None else total + bias)
    poses = poses if fields is None else poses.flatten(1, 2)
    coupling = votes.new_full(votes.shape[:-1], 1 / parents)
    return Routed(poses, length(poses), coupling, fields)


class UniformRouting(nn.Module):
    """`uniform_routing` with a learned bias as an option.

    Args:
        in_caps, out_caps, pose_dim: I, J, D of the votes; J is the number of parent types.
        fields: windows of a convolutional layer; None where every parent sees every child.
        bias: learn a bias per parent type, which starts at 0.1.
    """

    bias: nn.Parameter | None
    windows: Tensor | None
    squashes = True
    fused_votes = MatrixVotes
    fused_bias = True

    def __init__(
        self,
        in_caps: int,
        out_caps: int,
        pose_dim: int,
        fields: ReceptiveFields | None = None,
        *,
        bias: bool,
    ) -> None:
        super().__init__()
        self.in_caps, self.out_caps, self.pose_dim = in_caps, out_caps, pose_dim
        self.bias = nn.Parameter(torch.full((out_caps, pose_dim), 0.1)) if bias else None
        self.register_buffer("windows", None if fields is None else fields.children, persistent=False)
        self.counts = (0, 0) if fields is None else (fields.in_caps, fields.connected)

    def forward(self, votes: Float[Tensor, "B *I J D"], activations: Float[Tensor, "B I"]) -> Routed:
        """Route votes [B, I, J, D], or [B, P, K, J, D] in a convolutional layer.

        As in dynamic routing, the votes already contain the activations.
        """
        fields = None if self.windows is None else ReceptiveFields(self.windows, *self.counts)
        return uniform_routing(votes, bias=self.bias, fields=fields)

    def fused_reason(self, weight: Float[Tensor, "W J n n"]) -> str | None:
        """None: the sum of the votes of matrix capsules never needs the votes."""
        return None

    def route_fused(self, votes: MatrixVotes, activations: Float[Tensor, "B I"]) -> Routed:
        """Sum the votes without making them, and squash."""
        total = summed_votes(votes) / self.out_caps
        poses = squash(total if self.bias is None else total + self.bias)
        shape = (len(poses), *poses.shape[1:2], len(votes.matrices), self.out_caps)
        coupling = poses.new_full((), 1 / self.out_caps).expand(shape)
        coupling = coupling.squeeze(1) if votes.fields is None else coupling
        poses = poses.flatten(1, 2)
        return Routed(poses, length(poses), coupling, votes.fields)

    def extra_repr(self) -> str:
        """The sizes of the layer."""
        return f"in_caps={self.in_caps}, out_caps={self.out_caps}, pose_dim={self.pose_dim}"

    @torch.no_grad()
    def trace(self, votes: Float[Tensor, "B *I J D"], activations: Float[Tensor, "B I"]) -> list[Routed]:
        """The state after the only iteration."""
        return [self(votes, activations)]
