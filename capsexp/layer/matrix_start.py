"""How the transformation matrices of matrix capsules start."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from capsexp.errors import refuse, require_literal

Initialisation = Literal["identity", "normal", "xavier", "orthogonal", "fan"]
Pose = Literal["matrix", "vector"]


def start_matrices(
    initialisation: Initialisation,
    *,
    matrices: int,
    types: int,
    side: int,
    pose_dim: int,
    places: int,
    window: int,
    init_identity: int | float,
    init_noise: int | float,
) -> Float[Tensor, "W J n n"]:
    """Return random matrices to start from.

    Args:
        initialisation: with N(0, 1) for normal random numbers and n x n matrices,
            "identity": init_identity * I + init_noise * N(0, 1);
            "normal": N(0, 1) / n (Heinsen 2019);
            "xavier": uniform within sqrt(6 / (D K^2 (child types + types))) (Ribeiro et al. 2020, code);
            "orthogonal": a random rotation or reflection, so that all have the same volume;
            "fan": N(0, 1) * sqrt(types / (n children of a parent)) (Tsai et al. 2020, code).
        matrices: W.
        types: J, of parents.
        side: n.
        pose_dim: D.
        places: children of a parent.
        window: K^2, positions of a window; 1 where a parent has no window.
        init_identity: of "identity".
        init_noise: of "identity".
    Raises: ValueError: an unknown option.
    """
    require_literal(Initialisation, initialisation=initialisation)
    shape = (matrices, types, side, side)
    if initialisation == "identity":
        return init_identity * torch.eye(side) + init_noise * torch.randn(shape)
    if initialisation == "xavier":
        bound = math.sqrt(6 / (pose_dim * (places + window * types)))
        return torch.empty(shape).uniform_(-bound, bound)
    if initialisation == "orthogonal":
        start = torch.empty(shape)
        for matrix in start.view(-1, side, side):
            torch.nn.init.orthogonal_(matrix)
        return start
    scale = 1 / side if initialisation == "normal" else math.sqrt(types / (side * places))
    return scale * torch.randn(shape)


def matrix_side(pose_dim: int, pose: Pose) -> int:
    """Rows of a W_ij for poses of this size.

    Raises: ValueError: an unknown option, or a matrix that is not square.
    """
    require_literal(Pose, pose=pose)
    side = pose_dim if pose == "vector" else math.isqrt(pose_dim)
    if pose == "matrix" and side * side != pose_dim:
        refuse(f"pose_dim must be a square for matrix poses, got {pose_dim}")
    return side
