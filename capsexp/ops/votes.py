"""Votes: what each input capsule predicts for the pose of each output capsule."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from capsexp.capsules import ReceptiveFields, Routed

MIB = 2**20


class MatrixVotes(NamedTuple):
    """Votes of matrix capsules that are not made yet: what a routing that makes them itself needs."""

    poses: Float[Tensor, "B I D"]
    weight: Float[Tensor, "W J n n"]
    matrices: Int[Tensor, " K"]
    """Which of the W matrices per parent type the child at each place votes with."""
    fields: ReceptiveFields | None
    """None where every parent sees every child: K = I."""
    offsets: Float[Tensor, "K D"] | None
    """Added to the votes of the child at each place."""


class DenseVotes(NamedTuple):
    """Votes with one matrix per pair of capsules that are not made yet."""

    poses: Float[Tensor, "B I K"]
    weight: Float[Tensor, "I K J D"]


def make_votes(poses: Float[Tensor, "B I K"], weight: Float[Tensor, "I K J D"]) -> Float[Tensor, "B I J D"]:
    """Multiply every pose with the matrices of its capsule: one batched product over I.

    Eq. 2 (left) of Sabour et al., "Dynamic routing between capsules" (NIPS 2017).
    Differs from it in: nothing.

    Args:
        poses: u_i.
        weight: the transformation matrices W_ij.
    Returns: û_j|i, as a view of memory ordered [B J I D]: routing sums over I for each parent j.
    """
    product = torch.bmm(poses.transpose(0, 1), weight.flatten(2))  # [I, B, J*D]
    by_parent = (
        product.view(*product.shape[:2], *weight.shape[2:]).permute(1, 2, 0, 3).contiguous()
    )  # [B, J, I, D]
    return by_parent.transpose(1, 2)


def window_votes(
    poses: Float[Tensor, "B P K D"], weight: Float[Tensor, "K J n m"]
) -> Float[Tensor, "B P K J D"]:
    """Multiply every pose with the matrices of its place in the window; one batched product over K.

    V_ij = M_i W_ij of Hinton, Sabour, Frosst, "Matrix capsules with EM routing" (ICLR 2018), the same
    matrices at all positions. Differs from it in: nothing.

    Args:
        poses: M_i of the child at each place of each window, flat; D is a multiple of n.
        weight: W_ij. With n * n = D a pose is an n x n matrix; with n = D it is a vector.
    Returns: votes as a view of memory ordered [B P J K D]: routing sums over K for each parent.
    """
    batch, positions, places, dim = poses.shape
    types, rows = weight.shape[1], dim // weight.shape[2]
    # M W is the flat M times a block-diagonal matrix with `rows` copies of W. So D numbers lie together; a
    # product of 4x4 matrices would leave rows of 4 to be gathered one by one.
    blocks = torch.einsum("ab,kjnm->kanjbm", torch.eye(rows, dtype=poses.dtype, device=poses.device), weight)
    by_place = poses.permute(2, 0, 1, 3).reshape(places, batch * positions, dim)
    product = torch.bmm(by_place, blocks.reshape(places, dim, types * dim))  # [K, B * P, J * D]
    by_parent = product.view(places, batch, positions, types, dim).permute(1, 2, 3, 0, 4).contiguous()
    return by_parent.permute(0, 1, 3, 2, 4)


def votes_budget(votes_mib: int | float | None) -> int | None:
    """A layer's memory for votes in bytes; None leaves it to `images_per_chunk`.

    Raises:
        ValueError: no memory at all.
    """
    if votes_mib is not None and votes_mib <= 0:
        raise ValueError(f"votes_mib must be > 0 or null, got {votes_mib}")
    # An integer, which torch.compile takes for a constant. It would make the pieces depend on a float.
    return None if votes_mib is None else int(votes_mib * MIB)


def images_per_chunk(bytes_per_image: int, *, budget: int | None, device: torch.device) -> int:
    """How many pictures' votes fit the budget; at least one.

    Args:
        bytes_per_image: size of the votes of one picture.
        budget: in bytes; None chooses by device.
        device: where the votes will lie.
    """
    if budget is None:
        # On a CPU the votes of a piece should stay in the cache from one pass of the routing to the next: of
        # the piece sizes tried for the MNIST network, 16 pictures (11.3 MiB) were the fastest. An accelerator
        # wants large pieces, and there the budget only keeps many classes from exhausting its memory.
        budget = (12 if device.type == "cpu" else 1024) * MIB
    return max(1, budget // bytes_per_image)


def chunked(route: Callable[..., Routed], *inputs: Float[Tensor, "B ..."], images: int) -> Routed:
    """Apply `route` to the batch in pieces, so that the votes of the whole batch never exist at once.

    With more than one piece, the backward pass computes each piece again instead of storing what is inside.

    Args:
        route: computes what it needs from the inputs' pictures alone, and draws no random numbers.
        inputs: tensors of one batch.
        images: pictures per piece.
    Laws: values and gradients do not depend on `images`, up to rounding.
    """
    if len(inputs[0]) <= images:
        return route(*inputs)
    pieces = [
        checkpoint(route, *piece, use_reentrant=False, preserve_rng_state=False)
        for piece in zip(*(torch.split(tensor, images) for tensor in inputs), strict=True)
    ]
    poses, activations, coupling = (
        torch.cat(field) for field in zip(*(one[:3] for one in pieces), strict=True)
    )
    return Routed(poses, activations, coupling, pieces[0].fields)
