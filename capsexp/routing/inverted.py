"""Inverted dot-product attention: children attend to parents whose pose agrees with their votes."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import ReceptiveFields, Routed
from capsexp.errors import require_at_least_1, require_at_most
from capsexp.routing import MOST_ITERATIONS

EPS = 1e-5  # of the layer normalization, as in PyTorch and the authors' code


def inverted_routing(
    votes: Float[Tensor, "B *places J D"],
    *,
    iterations: int,
    gain: Float[Tensor, " D"] | None = None,
    bias: Float[Tensor, " D"] | None = None,
    fields: ReceptiveFields | None = None,
) -> Routed:
    """Route by inverted dot-product attention, one layer alone (the paper's sequential form).

        iteration 1:  r_ij = 1/J                                   p_j = LayerNorm(sum_i r_ij V_ij)
        iteration t:  r_ij = softmax_j(p_j · V_ij / sqrt(D))       p_j = LayerNorm(sum_i r_ij V_ij)

    Tsai, Srivastava, Goh, Salakhutdinov, "Capsules with inverted dot-product attention routing" (ICLR 2020),
    algorithm 1. The softmax is over the parent types at each position, not over positions.
    Differs from it in: nothing. The authors' first code cuts its windows wrongly: there a capsule of a window
    holds numbers of several positions. float16 and bfloat16 votes are routed and returned in float32.

    Args:
        votes: V_ij: [B, I, J, D] where every parent sees every child; with `fields` [B, P, K, J, D], of the
            child at place k of the window of position p, for each parent type j.
        iterations: T >= 1. More than 3 can converge slowly (the authors' code).
        gain: of the layer normalization, shared by all parents; None for 1.
        bias: of the layer normalization, shared by all parents; None for 0.
        fields: which child is at which place; None where every parent sees every child.
    Raises: ValueError: votes that do not fit the windows; no iteration.
    Returns: poses of the P * J parents in the order (position, type); activations of 1, because the algorithm
        has none; the shares r_ij that gave the poses.
    Laws: without gain and bias the poses have mean 0 and variance 1 over D; one iteration is uniform coupling
        and a normalization.
    """
    require_at_least_1(iterations=iterations)
    routed = None
    for _ in range(iterations):
        routed = inverted_step(votes, routed and routed.poses, gain=gain, bias=bias, fields=fields)
    assert routed is not None
    return routed


def inverted_step(
    votes: Float[Tensor, "B *places J D"],
    before: Float[Tensor, "B P_J D"] | None,
    *,
    gain: Float[Tensor, " D"] | None,
    bias: Float[Tensor, " D"] | None,
    fields: ReceptiveFields | None,
) -> Routed:
    """One iteration of `inverted_routing`.

    Args:
        votes: V_ij, see `inverted_routing`.
        before: poses of the parents that the shares come from; None in the first iteration.
        gain: see `inverted_routing`.
        bias: see `inverted_routing`.
        fields: see `inverted_routing`.
    Raises: ValueError: votes that do not fit the windows.
    """
    if fields is not None and list(votes.shape[1:-2]) != list(fields.children.shape):
        expected, got = list(fields.children.shape), list(votes.shape[1:-2])
        raise ValueError(f"votes must have [P, K] = {expected} from fields, got {got}")
    votes = votes.to(torch.promote_types(votes.dtype, torch.float32))
    types, dim = votes.shape[-2:]
    by_parent = votes.transpose(-3, -2)  # memory in the order [B, P, J, K, D], which the layers make
    with torch.autocast(votes.device.type, enabled=False):
        if before is None:
            shares = votes.new_full(by_parent.shape[:-1], 1 / types)  # [B, P, J, K]
        else:
            parents = before.view(*by_parent.shape[:-2], dim, 1)
            shares = (torch.matmul(by_parent, parents).squeeze(-1) / math.sqrt(dim)).softmax(-2)
        total = torch.matmul(shares.unsqueeze(-2), by_parent).squeeze(-2)
        poses = F.layer_norm(total, (dim,), gain, bias, EPS)
    poses = poses if fields is None else poses.flatten(1, 2)
    return Routed(poses, torch.ones_like(poses[..., 0]), shares.transpose(-2, -1), fields)


class InvertedRouting(nn.Module):
    """`inverted_routing` with its parameters.

    Where every parent sees every child, each parent has a score: a linear map of its pose, shared by all
    parents, which starts as PyTorch's. The paper has it after the class capsules. In windows there are none.

    Args:
        in_caps, out_caps, pose_dim: I, J, D of the votes; J is the number of parent types.
        fields: windows of a convolutional layer; None where every parent sees every child.
        iterations: T >= 1. The concurrent network makes these itself, by `step`.
    Raises: ValueError: a number out of its range.
    """

    score_weight: nn.Parameter | None
    score_bias: nn.Parameter | None
    windows: Tensor | None
    squashes = True  # a pose is a normalized sum of votes

    def __init__(
        self,
        in_caps: int,
        out_caps: int,
        pose_dim: int,
        fields: ReceptiveFields | None = None,
        *,
        iterations: int,
    ) -> None:
        super().__init__()
        require_at_least_1(iterations=iterations)
        require_at_most(MOST_ITERATIONS, iterations=iterations)
        self.in_caps, self.out_caps, self.pose_dim = in_caps, out_caps, pose_dim
        self.iterations = iterations
        self.gain = nn.Parameter(torch.ones(pose_dim))
        self.bias = nn.Parameter(torch.zeros(pose_dim))
        bound = 1 / math.sqrt(pose_dim)
        scores = fields is None
        self.score_weight = nn.Parameter(torch.empty(pose_dim).uniform_(-bound, bound)) if scores else None
        self.score_bias = nn.Parameter(torch.empty(1).uniform_(-bound, bound)) if scores else None
        self.register_buffer("windows", None if fields is None else fields.children, persistent=False)
        self.counts = (0, 0) if fields is None else (fields.in_caps, fields.connected)

    def forward(self, votes: Float[Tensor, "B *I J D"], activations: Float[Tensor, "B I"]) -> Routed:
        """Route votes [B, I, J, D], or [B, P, K, J, D] in a convolutional layer. Activations are not used."""
        return self._iterate(votes, self.iterations)[-1]

    def step(self, votes: Float[Tensor, "B *I J D"], before: Float[Tensor, "B P_J D"] | None) -> Routed:
        """One iteration, from the poses of the parents before it; None in the first."""
        fields = None if self.windows is None else ReceptiveFields(self.windows, *self.counts)
        return self._with_scores(inverted_step(votes, before, gain=self.gain, bias=self.bias, fields=fields))

    @torch.no_grad()
    def trace(
        self,
        votes: Float[Tensor, "B *I J D"],
        activations: Float[Tensor, "B I"],
        *,
        iterations: int | None = None,
    ) -> list[Routed]:
        """The state after each iteration."""
        return self._iterate(votes, iterations or self.iterations)

    def extra_repr(self) -> str:
        """The sizes of the layer, and the iterations."""
        sizes = f"in_caps={self.in_caps}, out_caps={self.out_caps}, pose_dim={self.pose_dim}"
        return f"{sizes}, iterations={self.iterations}"

    def _iterate(self, votes: Tensor, iterations: int) -> list[Routed]:
        states: list[Routed] = []
        for _ in range(iterations):
            states.append(self.step(votes, states[-1].poses if states else None))
        return states

    def _with_scores(self, routed: Routed) -> Routed:
        if self.score_weight is None or self.score_bias is None:
            return routed
        with torch.autocast(routed.poses.device.type, enabled=False):
            scores = routed.poses @ self.score_weight + self.score_bias
        return routed._replace(scores=scores, activations=scores.sigmoid())
