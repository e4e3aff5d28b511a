"""Votes: what each input capsule predicts for the pose of each output capsule."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from capsexp.capsules import ReceptiveFields, Routed
from capsexp.errors import is_in, refuse
from capsexp.ops.receptive_fields import gather_windows

MIB = 2**20
LARGEST_BUDGET = 2**62  # bytes: torch counts in 64 bits


class MatrixVotes(NamedTuple):
    """Votes of matrix capsules before they are computed: the input of `route_fused`."""

    poses: Float[Tensor, "B I D"]
    weight: Float[Tensor, "W J n n"]
    matrices: Int[Tensor, " K"]
    """Index of the matrix, among the W per parent type, of the child at each place."""
    fields: ReceptiveFields | None
    """None where every parent sees every child: K = I."""
    offsets: Float[Tensor, "K D"] | None
    """Added to the votes of the child at each place."""
    bias: Float[Tensor, "W J D"] | None = None
    """Learned, added to the votes; one for each matrix."""


class DenseVotes(NamedTuple):
    """Votes with one matrix per pair of capsules before they are computed: the input of `route_fused`."""

    poses: Float[Tensor, "B I K"]
    weight: Float[Tensor, "I K J D"]
    chunk: int
    """Images whose votes may exist at the same time."""


def make_votes(poses: Float[Tensor, "B I K"], weight: Float[Tensor, "I K J D"]) -> Float[Tensor, "B I J D"]:
    """Multiply every pose with the matrices of its capsule: one batched product over I.

    Eq. 2 (left) of Sabour et al., "Dynamic routing between capsules" (NIPS 2017).
    Differs from it in: nothing.

    Args:
        poses: u_i.
        weight: the transformation matrices W_ij.
    Returns: û_j|i, a view of memory in the order [B J I D], because routing sums over I for each parent j.
    """
    product = torch.bmm(poses.transpose(0, 1), weight.flatten(2))  # [I, B, J*D]
    by_parent = (
        product.view(*product.shape[:2], *weight.shape[2:]).permute(1, 2, 0, 3).contiguous()
    )  # [B, J, I, D]
    return by_parent.transpose(1, 2)


def window_votes(
    poses: Float[Tensor, "B P K D"], weight: Float[Tensor, "K J n m"]
) -> Float[Tensor, "B P K J D"]:
    """Multiply every pose with the matrices of its place in the window: one batched product over K.

    V_ij = M_i W_ij of Hinton, Sabour, Frosst, "Matrix capsules with EM routing" (ICLR 2018), the same
    matrices at all positions. Differs from it in: nothing.

    Args:
        poses: M_i of the child at each place of each window, flat; D is a multiple of n.
        weight: W_ij. With n * n = D a pose is an n x n matrix; with n = D it is a vector.
    Returns: votes, a view of memory in the order [B P J K D], because routing sums over K for each parent.
    """
    batch, positions, places, dim = poses.shape
    types, rows = weight.shape[1], dim // weight.shape[2]
    # M W is the flat M times a block-diagonal matrix with `rows` copies of W. That keeps D numbers together;
    # a product of 4x4 matrices would leave rows of 4 to gather one by one.
    blocks = torch.einsum("ab,kjnm->kanjbm", torch.eye(rows, dtype=poses.dtype, device=poses.device), weight)
    by_place = poses.permute(2, 0, 1, 3).reshape(places, batch * positions, dim)
    product = torch.bmm(by_place, blocks.reshape(places, dim, types * dim))  # [K, B * P, J * D]
    by_parent = product.view(places, batch, positions, types, dim).permute(1, 2, 3, 0, 4).contiguous()
    return by_parent.permute(0, 1, 3, 2, 4)


def summed_votes(votes: MatrixVotes) -> Float[Tensor, "B P J D"]:
    """Sum of the votes of all children for each parent, by one product that never makes votes.

    P is 1 where every parent sees every child.
    """
    poses = votes.poses.unsqueeze(1)
    if votes.fields is not None:
        poses = gather_windows(votes.poses, votes.fields)
    batch, positions, places, dim = poses.shape
    matrices, types, side, _ = votes.weight.shape
    # Children with the same matrix are summed first.
    if places > matrices:
        by_matrix = poses.new_zeros(batch, positions, matrices, dim).index_add(2, votes.matrices, poses)
    else:
        by_matrix = poses
    rows = by_matrix.unflatten(3, (-1, side)).permute(0, 1, 3, 2, 4).flatten(3)  # [B, P, rows, W * n]
    product = rows @ votes.weight.permute(0, 2, 1, 3).reshape(matrices * side, types * side)
    total = product.unflatten(3, (types, side)).permute(0, 1, 3, 2, 4).flatten(3)  # [B, P, J, D]
    if votes.offsets is not None:
        total = total + votes.offsets.sum(0)
    if votes.bias is not None:
        total = total + votes.bias[votes.matrices].sum(0)
    return total


def votes_budget(votes_mib: int | float | None) -> int | None:
    """A layer's memory for votes in bytes; None lets `images_per_chunk` choose.

    Raises:
        ValueError: votes_mib <= 0.
    """
    if votes_mib is not None and not is_in("(0, inf)", votes_mib):
        refuse(f"votes_mib must be > 0 or null, got {votes_mib}")
    # torch.compile treats an integer as a constant, but would guard on a float.
    return None if votes_mib is None else int(min(votes_mib * MIB, LARGEST_BUDGET))


def images_per_chunk(bytes_per_image: int, *, budget: int | None, device: torch.device) -> int:
    """Number of images whose votes fit the budget; at least 1.

    Args:
        bytes_per_image: size of the votes of one image.
        budget: in bytes; None chooses by device.
        device: of the votes.
    """
    if budget is None:
        # On a CPU the votes of a chunk should stay in the cache from one pass of the routing to the next: of
        # the sizes tried for the MNIST network, 16 images (11.3 MiB) were fastest. An accelerator is fastest
        # with large chunks; there the budget only keeps many classes from exhausting its memory.
        budget = (12 if device.type == "cpu" else 1024) * MIB
    return max(1, budget // bytes_per_image)


def chunked(route: Callable[..., Routed], *inputs: Float[Tensor, "B ..."], images: int) -> Routed:
    """Apply `route` to the batch in chunks, so that the votes of the whole batch never exist at once.

    With more than one chunk, the backward pass recomputes each chunk instead of storing its intermediates.

    Args:
        route: treats each image by itself, and draws no random numbers.
        inputs: tensors of one batch.
        images: images per chunk.
    Laws: values and gradients do not depend on `images`, up to rounding.
    """
    if len(inputs[0]) <= images:
        return route(*inputs)
    chunks = [
        checkpoint(route, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(*(torch.split(tensor, images) for tensor in inputs), strict=True)
    ]
    poses, activations, coupling = (
        torch.cat(field) for field in zip(*(routed[:3] for routed in chunks), strict=True)
    )
    scores = [routed.scores for routed in chunks if routed.scores is not None]
    return Routed(poses, activations, coupling, chunks[0].fields, torch.cat(scores) if scores else None)
