"""Matrix capsules: convolutional, and class capsules that share their matrices over all positions."""

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import ReceptiveFields
from capsexp.errors import refuse, require_literal, stop_if_refused
from capsexp.layer.matrix_start import Initialisation, Pose, matrix_side, start_matrices
from capsexp.layer.routed import RoutedLayer, require_factory, shared_keyword
from capsexp.ops.receptive_fields import Grid, gather_windows, receptive_fields
from capsexp.ops.votes import MatrixVotes, window_votes

Coordinates = Literal["paper", "official"]


class MatrixCapsOptions(TypedDict):
    """The settings that all matrix capsules of a network share. See `MatrixCaps`."""

    pose_dim: int
    pose: Pose
    shared_transformations: bool
    initialisation: Initialisation
    init_identity: int | float
    init_noise: int | float
    vote_bias: bool
    routing: Callable[..., nn.Module]
    votes_mib: int | float | None


class MatrixCaps(RoutedLayer):
    """What both kinds of matrix capsules share: their matrices.

    Args:
        in_caps: number of input capsules.
        pose_dim: numbers of a pose; a square for matrices.
        pose: "matrix": a pose is n x n, and so are the W_ij; "vector": W_ij is pose_dim x pose_dim (the
            paper's comparison, Table 1).
        places: children of a parent that have matrices of their own.
        window: positions of a parent's window; 1 where every parent sees every child.
        repeats: how many times such children follow each other, with the same matrices.
        types: parent types.
        shared_transformations: one W_j per parent type for all children, instead of W_ij.
        initialisation, init_identity, init_noise: see `start_matrices`.
        vote_bias: learn a bias per matrix and number of the pose, from 0, added to the votes (Heinsen 2019).
        routing: routes the votes.
        votes_mib, votes_per_image: see `RoutedLayer`.
    Raises: ValueError: an unknown option, a pose_dim that is no square for matrices, votes_mib <= 0.
    """

    lazy_type = MatrixVotes
    matrices: Tensor

    def __init__(
        self,
        *,
        in_caps: int,
        pose_dim: int,
        pose: Pose,
        places: int,
        window: int,
        repeats: int,
        types: int,
        shared_transformations: bool,
        initialisation: Initialisation,
        init_identity: int | float,
        init_noise: int | float,
        vote_bias: bool,
        routing: nn.Module,
        votes_mib: int | float | None,
        votes_per_image: int,
    ) -> None:
        super().__init__(
            in_caps=in_caps, in_dim=pose_dim, votes_per_image=votes_per_image, votes_mib=votes_mib
        )
        side = matrix_side(pose_dim, pose)
        self.places = places
        own = 1 if shared_transformations else places
        start = start_matrices(
            initialisation,
            matrices=own,
            types=types,
            side=side,
            pose_dim=pose_dim,
            places=places,
            window=window,
            init_identity=init_identity,
            init_noise=init_noise,
        )
        self.weight = nn.Parameter(start)  # W_ij, or W_j
        self.bias = nn.Parameter(torch.zeros(own, types, pose_dim)) if vote_bias else None  # B_ij, or B_j
        self.routing = routing
        self.register_buffer(
            "matrices", torch.arange(places).remainder(own).repeat(repeats), persistent=False
        )

    @abstractmethod
    def lazy_votes(self, poses: Float[Tensor, "B I D"]) -> MatrixVotes:
        """The votes before they are computed."""

    def fused_reason(self) -> str | None:
        """Why this layer takes the reference path; None where it takes the fused one. See `FusedRouting`."""
        if self.bias is not None and not getattr(self.routing, "fused_bias", False):
            return f"there is no fused {type(self.routing).__name__} for votes with a bias"
        return super().fused_reason()

    def extra_repr(self) -> str:
        """The sizes of the layer."""
        own, types, side = self.weight.shape[:3]
        sizes = f"in_caps={self.in_caps}, out_types={types}, pose_dim={self.in_dim}, matrix={side}x{side}"
        return f"{sizes}, shared_transformations={own < self.places}"

    def _matrices_of_places(self) -> Float[Tensor, "K J n n"]:
        """W_ij of the child at every place; shared ones are a view that repeats them."""
        return self.weight.expand(self.places, -1, -1, -1)

    def _votes_of_windows(self, children: Float[Tensor, "B P K D"]) -> Float[Tensor, "B P K J D"]:
        """V_ij of the child at each place of each window: the product, and the bias if there is one."""
        votes = window_votes(children, self._matrices_of_places())
        return votes if self.bias is None else votes + self.bias


class ConvCaps(MatrixCaps):
    """Capsules that see windows of the grid below, with the same matrices at every position.

    Hinton, Sabour, Frosst, "Matrix capsules with EM routing" (ICLR 2018), section 4.
    Differs from it in: a window larger than the grid shrinks to the grid, so that small images work.

    Args:
        grid, in_types: positions and types of the children.
        types: parent types.
        kernel, stride: K and the stride of the windows, without padding.
        routing: builds the routing from (in_caps, out_caps, pose_dim, fields), with the types as out_caps.
        pose_dim, pose, shared_transformations, votes_mib: see `MatrixCaps`.
        initialisation, init_identity, init_noise, vote_bias: see `MatrixCaps`.
    Raises: ValueError: a routing that does not route windows; see `MatrixCaps`.
    """

    windows: Tensor

    def __init__(
        self,
        grid: Grid,
        in_types: int,
        *,
        types: int,
        routing: Callable[..., nn.Module],
        kernel: int = 3,
        stride: int = 1,
        pose_dim: int = 16,
        pose: Pose = "matrix",
        shared_transformations: bool = False,
        initialisation: Initialisation = "identity",
        init_identity: int | float = 1.0,
        init_noise: int | float = 0.03,
        vote_bias: bool = False,
        votes_mib: int | float | None = None,
    ) -> None:
        require_factory(routing)
        if "fields" not in inspect.signature(routing).parameters:
            refuse("routing must route windows, as `em` does; this one has no argument `fields`")
            stop_if_refused()
        window = (min(kernel, grid.rows), min(kernel, grid.columns))
        fields = receptive_fields(grid, in_types, window, stride)
        super().__init__(
            in_caps=fields.in_caps,
            pose_dim=pose_dim,
            pose=pose,
            places=fields.children.shape[1],
            window=window[0] * window[1],
            repeats=1,
            types=types,
            shared_transformations=shared_transformations,
            initialisation=initialisation,
            init_identity=init_identity,
            init_noise=init_noise,
            vote_bias=vote_bias,
            routing=routing(fields.in_caps, types, pose_dim, fields),
            votes_mib=votes_mib,
            votes_per_image=fields.children.numel() * types * pose_dim,
        )
        self.grid, self.types = grid.after_convolution(window, stride), types
        self.register_buffer("windows", fields.children, persistent=False)
        self.counts = (fields.in_caps, fields.connected)

    def votes(self, poses: Float[Tensor, "B I D"]) -> Float[Tensor, "B P K J D"]:
        """V_ij of the child at each place of each window."""
        return self._votes_of_windows(gather_windows(poses, self._fields()))

    def lazy_votes(self, poses: Float[Tensor, "B I D"]) -> MatrixVotes:
        """V_ij of the child at each place of each window before they are computed."""
        return MatrixVotes(poses, self.weight, self.matrices, self._fields(), None, self.bias)

    def _fields(self) -> ReceptiveFields:
        return ReceptiveFields(self.windows, *self.counts)


class SharedClassCaps(MatrixCaps):
    """Class capsules that every capsule below votes for, with one matrix per type of child and class.

    Shared matrices lose the position of a child, so it is added to its votes (coordinate addition).
    Hinton, Sabour, Frosst, "Matrix capsules with EM routing" (ICLR 2018), section 4.
    Differs from it in: nothing. The paper says "scaled"; center and scale are those of the authors' code.

    Args:
        grid, in_types: positions and types of the children.
        classes: number of classes.
        image_size: rows and columns of the image; the coordinates are 0 at its center.
        coordinates: None; "paper": row and column are added to the first two elements of the pose's
            right-hand column (3 and 7 of 16); "official": to elements 0 and 1, as in the authors' code.
        coordinate_scale: per pixel.
        routing: builds the routing from (in_caps, out_caps, pose_dim); with shared_transformations also from
            `shared=True`, if it has such an argument.
        pose_dim, pose, shared_transformations, votes_mib: see `MatrixCaps`.
        initialisation, init_identity, init_noise, vote_bias: see `MatrixCaps`.
    Raises: ValueError: unknown coordinates; see `MatrixCaps`.
    """

    coordinates: Tensor | None
    coordinate_elements: tuple[int, int] | None
    """Elements of a vote that row and column are added to; None without coordinates."""

    def __init__(
        self,
        grid: Grid,
        in_types: int,
        classes: int,
        *,
        image_size: tuple[int, int],
        routing: Callable[..., nn.Module],
        coordinates: Coordinates | None = "paper",
        coordinate_scale: int | float = 0.01,
        pose_dim: int = 16,
        pose: Pose = "matrix",
        shared_transformations: bool = False,
        initialisation: Initialisation = "identity",
        init_identity: int | float = 1.0,
        init_noise: int | float = 0.03,
        vote_bias: bool = False,
        votes_mib: int | float | None = None,
    ) -> None:
        require_factory(routing)
        if coordinates is not None:
            require_literal(Coordinates, coordinates=coordinates)
            if pose_dim < 4:
                refuse(f"pose_dim must be >= 4 for coordinates, got {pose_dim}")
        in_caps = grid.positions * in_types
        super().__init__(
            in_caps=in_caps,
            pose_dim=pose_dim,
            pose=pose,
            places=in_types,
            window=1,
            repeats=grid.positions,
            types=classes,
            shared_transformations=shared_transformations,
            initialisation=initialisation,
            init_identity=init_identity,
            init_noise=init_noise,
            vote_bias=vote_bias,
            routing=routing(in_caps, classes, pose_dim, **shared_keyword(routing, shared_transformations)),
            votes_mib=votes_mib,
            votes_per_image=in_caps * classes * pose_dim,
        )
        offsets = None
        self.coordinate_scale, self.coordinate_elements = coordinate_scale, None
        if coordinates is not None:
            self.coordinate_elements = _coordinate_elements(pose_dim, coordinates)
            centres = coordinate_scale * (grid.centres() - torch.tensor(image_size) / 2)
            offsets = centres @ torch.eye(pose_dim)[[*self.coordinate_elements]]  # [P, D]
        self.register_buffer("coordinates", offsets, persistent=False)

    def votes(self, poses: Float[Tensor, "B I D"]) -> Float[Tensor, "B I J D"]:
        """V_ij of every child."""
        by_position = poses.unflatten(1, (-1, self.places))  # [B, P, types, D]
        votes = self._votes_of_windows(by_position)  # a view of [B, P, J, types, D]
        if self.coordinates is not None:
            votes = votes + self.coordinates[:, None, None]
        by_parent = votes.permute(0, 3, 1, 2, 4).flatten(2, 3)  # [B, J, I, D]
        return by_parent.transpose(1, 2)

    def lazy_votes(self, poses: Float[Tensor, "B I D"]) -> MatrixVotes:
        """V_ij of every child before they are computed."""
        offsets = self.coordinates
        if offsets is not None:
            offsets = offsets.repeat_interleave(self.places, 0)  # [I, D]
        return MatrixVotes(poses, self.weight, self.matrices, None, offsets, self.bias)


def _coordinate_elements(pose_dim: int, coordinates: Coordinates) -> tuple[int, int]:
    """Index of the pose's element that the row is added to, and of that for the column."""
    columns = math.isqrt(pose_dim)
    return (columns - 1, 2 * columns - 1) if coordinates == "paper" else (0, 1)
