"""Self-routing: each child decides from its own pose alone where it goes. No agreement, no iterations."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import ReceptiveFields, Routed
from capsexp.ops.em_steps import SMALLEST_MASS, check_shapes
from capsexp.ops.receptive_fields import gather_windows


def self_routing(
    votes: Float[Tensor, "B *places J D"],
    activations: Float[Tensor, "B I"],
    poses: Float[Tensor, "B I C"],
    *,
    weight: Float[Tensor, "K C J"],
    bias: Float[Tensor, "K J"],
    fields: ReceptiveFields | None = None,
) -> Routed:
    """Average the votes by shares that each child computes from its own pose.

        c_ij = softmax_j(u_i w_ij + b_ij)
        a_j = sum_i c_ij a_i / sum_i a_i
        u_j = sum_i c_ij a_i û_j|i / sum_i c_ij a_i

    Hahn, Pyeon, Kim, "Self-routing capsule networks" (NeurIPS 2019), section 3.
    Differs from it in: both divisors are at least 1e-8, so a window without an active child gives zeros; the
    authors' code divides 0 by 0 there. float16 and bfloat16 are routed and returned in float32.

    Args:
        votes: û_j|i: [B, I, J, D] where every parent sees every child; with `fields` [B, P, K, J, D], of the
            child at place k of the window of position p, for each parent type j.
        activations: a_i.
        poses: u_i of the children; C numbers each.
        weight: w_ij of the child at each place; K = I without `fields`.
        bias: b_ij.
        fields: which child is at which place; None where every parent sees every child.
    Raises: ValueError: a wrong shape.
    Returns: poses and activations of the P * J parents in the order (position, type), and the shares c_ij.
    Laws: the activations of a position sum to 1; a factor on all activations changes nothing; a child with
        activation 0 has no effect; the shares of a child depend on its own pose alone; with w = b = 0 the
        poses are the means of the votes, weighted by the activations, and a_j = 1/J.
    """
    is_dense = votes.dim() == 4
    votes = votes.unsqueeze(1) if is_dense else votes
    check_shapes(votes, activations, fields, iterations=1)
    _check_own_shapes(votes, poses, weight, bias, in_caps=activations.shape[1])
    votes = votes.to(torch.promote_types(votes.dtype, torch.float32))
    with torch.autocast(votes.device.type, enabled=False):
        active = _by_window(activations.to(votes.dtype), fields)  # [B, P, K]
        children = _by_window(poses.to(votes.dtype), fields)  # [B, P, K, C]
        logits = torch.einsum("bpkc,kcj->bpkj", children, weight.to(votes.dtype)) + bias
        coupling = logits.softmax(3)
        shares = coupling * active.unsqueeze(3)
        mass = shares.sum(2)  # [B, P, J]
        total = active.sum(2, keepdim=True).clamp_min(SMALLEST_MASS)
        weights = shares / mass.clamp_min(SMALLEST_MASS).unsqueeze(2)
        # On memory in the order [B, P, J, K, D], which the layers make.
        mean = torch.matmul(weights.permute(0, 1, 3, 2).unsqueeze(3), votes.permute(0, 1, 3, 2, 4)).squeeze(3)
    coupling = coupling.squeeze(1) if is_dense else coupling
    return Routed(mean.flatten(1, 2), (mass / total).flatten(1), coupling, fields)


class SelfRouting(nn.Module):
    """`self_routing` with its parameters, one map per place and type of child, which start at 0.

    So it starts as the mean of the votes, weighted by the activations.

    Args:
        in_caps, out_caps, pose_dim: I, J, D of the votes; J is the number of parent types.
        fields: windows of a convolutional layer; None where every parent sees every child.
        in_dim: numbers in the pose of a child; None: as many as in a vote.
    """

    reads_poses = True
    windows: Tensor | None

    def __init__(
        self,
        in_caps: int,
        out_caps: int,
        pose_dim: int,
        fields: ReceptiveFields | None = None,
        in_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.in_caps, self.out_caps, self.pose_dim = in_caps, out_caps, pose_dim
        places = in_caps if fields is None else fields.children.shape[1]
        # Not named `weight`: the losses' weight decay is for kernels and matrices.
        self.map = nn.Parameter(torch.zeros(places, in_dim or pose_dim, out_caps))
        self.bias = nn.Parameter(torch.zeros(places, out_caps))
        self.register_buffer("windows", None if fields is None else fields.children, persistent=False)
        self.counts = (0, 0) if fields is None else (fields.in_caps, fields.connected)

    def forward(
        self,
        votes: Float[Tensor, "B *I J D"],
        activations: Float[Tensor, "B I"],
        poses: Float[Tensor, "B I C"],
    ) -> Routed:
        """Route votes [B, I, J, D], or [B, P, K, J, D] in a convolutional layer."""
        fields = None if self.windows is None else ReceptiveFields(self.windows, *self.counts)
        return self_routing(votes, activations, poses, weight=self.map, bias=self.bias, fields=fields)

    def extra_repr(self) -> str:
        """The sizes of the layer."""
        return f"in_caps={self.in_caps}, out_caps={self.out_caps}, pose_dim={self.pose_dim}"


def _by_window(values: Float[Tensor, "B I *rest"], fields: ReceptiveFields | None) -> Tensor:
    """The value of the child at each place of each window; one window without `fields`."""
    return values.unsqueeze(1) if fields is None else gather_windows(values, fields)


def _check_own_shapes(votes: Tensor, poses: Tensor, weight: Tensor, bias: Tensor, *, in_caps: int) -> None:
    """Raise ValueError where poses and map do not fit votes [B, P, K, J, D] of this many children."""
    batch, _, places, types = votes.shape[:4]
    if poses.dim() != 3 or list(poses.shape[:2]) != [batch, in_caps]:
        raise ValueError(
            f"poses must have shape [B, I, C] = [{batch}, {in_caps}, C], got {list(poses.shape)}"
        )
    own = [places, poses.shape[2], types]
    if list(weight.shape) != own:
        raise ValueError(f"weight must have shape [K, C, J] = {own}, got {list(weight.shape)}")
    if list(bias.shape) != [places, types]:
        raise ValueError(f"bias must have shape [K, J] = {[places, types]}, got {list(bias.shape)}")
