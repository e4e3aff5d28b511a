"""Dynamic routing: couplings follow the agreement between a vote and the parent's pose."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import Routed
from capsexp.errors import require_at_least_1, require_at_most, require_literal
from capsexp.ops.dynamic_passes import (
    FusedDynamicRouting,
    routing_passes,
    softmax_over_parents,
    vote_agreement,
)
from capsexp.ops.kernels.compiled import library_problem
from capsexp.ops.kernels.dynamic import NARROWEST, dynamic_routing_op
from capsexp.ops.squash import length, squash
from capsexp.ops.votes import DenseVotes
from capsexp.routing import MOST_ITERATIONS

Prior = Literal["zero", "learned"]
Implementation = Literal["auto", "reference", "fused"]


def dynamic_routing_reference(
    votes: Float[Tensor, "B I J D"],
    *,
    iterations: int,
    prior: Float[Tensor, "I J"] | None,
    bias: Float[Tensor, "J D"] | None,
    leaky: bool,
    detach: bool,
) -> Routed:
    """The paper's loop, operation by operation. Tests compare `dynamic_routing` with it. Same arguments."""
    logits = votes.new_zeros(votes.shape[:3])  # [B, I, J]
    if prior is not None:
        logits = logits + prior
    for iteration in range(1, iterations + 1):
        last = iteration == iterations
        inputs = votes if last or not detach else votes.detach()
        coupling = softmax_over_parents(logits, dim=2, leaky=leaky)  # eq. 3
        total = torch.einsum("bij,bijd->bjd", coupling, inputs)  # eq. 2
        poses = squash(total if bias is None else total + bias)  # eq. 1
        if not last:  # nothing reads the logits after the last pass
            agreement = torch.einsum("bijd,bjd->bij", inputs, poses)
            logits = logits + (agreement.detach() if detach else agreement)
    return Routed(poses, length(poses), coupling)


def dynamic_routing(
    votes: Float[Tensor, "B I J D"],
    *,
    iterations: int = 3,
    prior: Float[Tensor, "I J"] | None = None,
    bias: Float[Tensor, "J D"] | None = None,
    leaky: bool = False,
    detach: bool = False,
    implementation: Implementation = "auto",
) -> Routed:
    """Route votes by agreement.

    Each pass computes, from b_ij = prior,

        c_i = softmax_j(b_i),    v_j = squash(sum_i c_ij û_j|i),    b_ij += û_j|i · v_j

    Procedure 1 of Sabour et al., "Dynamic routing between capsules" (NIPS 2017), with its values as defaults.
    Differs from it in: nothing, with the defaults. float16 and bfloat16 votes are routed and returned in
    float32; autocast is off inside.

    Args:
        votes: û_j|i.
        iterations: r >= 1; with 1 the coupling is the softmax of the prior.
        prior: logits b_ij before the first pass; None is 0 (the paper, footnote 2: "sufficient" for MNIST).
        bias: added to s_j before each squash (the authors' code, not the paper).
        leaky: each child may also choose "none of the above": one more logit, always 0, whose share is lost
            (the paper's CIFAR-10 network).
        detach: gradients flow through the last pass only; the agreements are constants.
        implementation: "reference"; "fused": gradient by hand, no second derivatives; "auto": fused.
    Raises: ValueError: a wrong shape; an unknown option; iterations < 1.
    Returns: poses v_j; their lengths in [0, 1); the couplings c_ij of the last pass.
    Laws: coupling sums to 1 over j (leaky: to less); permuting i permutes the coupling and leaves the poses;
        rotating all votes for j rotates pose j (without bias) and leaves the coupling.
    """
    require_at_least_1(iterations=iterations)
    require_literal(Implementation, implementation=implementation)
    _check_shapes(votes, prior, bias)
    votes = votes.to(torch.promote_types(votes.dtype, torch.float32))
    with torch.autocast(votes.device.type, enabled=False):
        return IMPLEMENTATIONS[implementation](
            votes, iterations=iterations, prior=prior, bias=bias, leaky=leaky, detach=detach
        )


def _check_shapes(votes: Tensor, prior: Tensor | None, bias: Tensor | None) -> None:
    if votes.dim() != 4:
        raise ValueError(f"votes must have shape [B, I, J, D], got {list(votes.shape)}")
    if prior is not None and prior.shape != votes.shape[1:3]:
        expected, got = list(votes.shape[1:3]), list(prior.shape)
        raise ValueError(f"prior must have shape [I, J] = {expected} like the votes, got {got}")
    if bias is not None and bias.shape != votes.shape[2:]:
        expected, got = list(votes.shape[2:]), list(bias.shape)
        raise ValueError(f"bias must have shape [J, D] = {expected} like the votes, got {got}")


class DynamicRouting(nn.Module):
    """Dynamic routing with learned parameters as an option. See `dynamic_routing`.

    Args:
        in_caps, out_caps, pose_dim: I, J, D of the votes.
        prior: "zero" (the paper) or "learned": a logit per child and parent, the same for all images, which
            starts at 0.
        bias: learn a bias per parent, which starts at 0.1 (the authors' code).
        iterations, leaky, detach, implementation: see `dynamic_routing`.
    Raises: ValueError: iterations < 1; an unknown option.
    """

    prior: nn.Parameter | None
    bias: nn.Parameter | None
    squashes = True
    fused_votes = DenseVotes

    def __init__(
        self,
        in_caps: int,
        out_caps: int,
        pose_dim: int,
        *,
        iterations: int,
        prior: Prior,
        bias: bool,
        leaky: bool,
        detach: bool,
        implementation: Implementation,
    ) -> None:
        super().__init__()
        require_at_least_1(iterations=iterations)
        require_at_most(MOST_ITERATIONS, iterations=iterations)
        require_literal(Prior, prior=prior)
        require_literal(Implementation, implementation=implementation)
        self.in_caps, self.out_caps, self.pose_dim = in_caps, out_caps, pose_dim
        self.iterations, self.leaky, self.detach = iterations, leaky, detach
        self.implementation: Implementation = implementation
        self.prior = nn.Parameter(torch.zeros(in_caps, out_caps)) if prior == "learned" else None
        self.bias = nn.Parameter(torch.full((out_caps, pose_dim), 0.1)) if bias else None

    def forward(self, votes: Float[Tensor, "B I J D"], activations: Float[Tensor, "B I"]) -> Routed:
        """Route. A child's activation is the length of its pose, so the votes already contain it."""
        return dynamic_routing(
            votes,
            iterations=self.iterations,
            prior=self.prior,
            bias=self.bias,
            leaky=self.leaky,
            detach=self.detach,
            implementation=self.implementation,
        )

    def extra_repr(self) -> str:
        """The sizes of the layer, and the iterations."""
        sizes = f"in_caps={self.in_caps}, out_caps={self.out_caps}, pose_dim={self.pose_dim}"
        return f"{sizes}, iterations={self.iterations}"

    def trace(
        self,
        votes: Float[Tensor, "B I J D"],
        activations: Float[Tensor, "B I"],
        *,
        iterations: int | None = None,
    ) -> list[Routed]:
        """The state after each pass, by plain PyTorch and without a gradient.

        Args: iterations: number of passes, which may be higher than in training; None for as many.
        Raises: ValueError: iterations < 1.
        """
        require_at_least_1(iterations=iterations)
        votes = votes.detach().to(torch.promote_types(votes.dtype, torch.float32)).transpose(1, 2)
        with torch.no_grad(), torch.autocast(votes.device.type, enabled=False):
            passes = routing_passes(votes, self.prior, self.bias, iterations or self.iterations, self.leaky)
        return [
            Routed(poses, length(poses), coupling.transpose(1, 2))
            for coupling, poses in zip(passes[::3], passes[2::3], strict=True)
        ]

    def agreement(
        self, votes: Float[Tensor, "B I J D"], poses: Float[Tensor, "B J D"]
    ) -> Float[Tensor, "B I J"]:
        """û_j|i · v_j, which a pass that ends with these poses adds to the logits b_ij."""
        return vote_agreement(votes.transpose(1, 2), poses).transpose(1, 2)

    def fused_reason(self, weight: Float[Tensor, "I K J D"]) -> str | None:
        """Why a layer with these matrices takes the reference path; None where it takes the fused one."""
        if self.implementation == "reference":
            return "routing.implementation=reference"
        if weight.device.type != "cpu":
            return f"on {weight.device.type} dynamic routing takes votes that are made first"
        if weight.dtype not in (torch.float32, torch.float64):
            return f"there is no fused dynamic routing in {weight.dtype}"
        if weight.shape[3] % NARROWEST:
            return f"there is no fused dynamic routing for poses of size {weight.shape[3]}"
        return library_problem("dynamic routing takes its PyTorch form, half as fast")

    def route_fused(self, votes: DenseVotes, activations: Float[Tensor, "B I"]) -> Routed:
        """Make the votes, of `votes.chunk` images at a time, and route them."""
        switches = (self.iterations, self.leaky, self.detach, votes.chunk)
        learned = (self.prior, self.bias)
        coupling, _, poses = dynamic_routing_op(votes.poses, votes.weight, *learned, *switches)
        return Routed(poses[-1], length(poses[-1]), coupling[-1])


def _fused(
    votes: Float[Tensor, "B I J D"],
    *,
    iterations: int,
    prior: Float[Tensor, "I J"] | None,
    bias: Float[Tensor, "J D"] | None,
    leaky: bool,
    detach: bool,
) -> Routed:
    poses, coupling = FusedDynamicRouting.apply(votes.transpose(1, 2), prior, bias, iterations, leaky, detach)
    return Routed(poses, length(poses), coupling.transpose(1, 2))


IMPLEMENTATIONS = {"auto": _fused, "reference": dynamic_routing_reference, "fused": _fused}
