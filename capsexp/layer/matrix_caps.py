"""Matrix capsules: convolutional, and class capsules that share their matrices over all positions."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import Capsules, ReceptiveFields, Routed
from capsexp.errors import require_one_of
from capsexp.layer.balance import balance
from capsexp.ops.receptive_fields import Grid, gather_windows, receptive_fields
from capsexp.ops.votes import MatrixVotes, chunked, images_per_chunk, votes_budget, window_votes

POSES = ("matrix", "vector")
COORDINATES = ("paper", "official")


class MatrixCaps(nn.Module, ABC):
    """What matrix capsules have in common: matrices, votes made and routed in pieces, a balanced start.

    Args:
        pose_dim: numbers of a pose; a square for matrices.
        pose: "matrix": a pose is n x n, and so are the W_ij; "vector": W_ij is pose_dim x pose_dim (the
            paper's comparison, Table 1).
        places: children of a parent that have matrices of their own.
        repeats: how many times such children follow each other, with the same matrices.
        types: parent types.
        shared_transformations: one W_j per parent type for all children, instead of W_ij.
        init_identity, init_noise: W_ij starts as init_identity * I + init_noise * N(0, 1).
        routing: what routes the votes.
        votes_mib: see `ClassCaps`.
        votes_per_image: numbers in the votes of one picture.
    Raises: ValueError: a pose that does not exist or does not fit; votes_mib <= 0.
    """

    matrices: Tensor

    def __init__(
        self,
        *,
        pose_dim: int,
        pose: str,
        places: int,
        repeats: int,
        types: int,
        shared_transformations: bool,
        init_identity: int | float,
        init_noise: int | float,
        routing: nn.Module,
        votes_mib: int | float | None,
        votes_per_image: int,
    ) -> None:
        super().__init__()
        self.votes_bytes = votes_budget(votes_mib)
        self.votes_per_image = votes_per_image
        side = matrix_side(pose_dim, pose)
        self.places = places
        own = 1 if shared_transformations else places
        start = init_identity * torch.eye(side) + init_noise * torch.randn(own, types, side, side)
        self.weight = nn.Parameter(start)  # W_ij, or W_j
        self.routing = routing
        self.register_buffer(
            "matrices", torch.arange(places).remainder(own).repeat(repeats), persistent=False
        )

    def forward(self, capsules: Capsules) -> Routed:
        """Output capsules in the order (row, column, type), and the coupling that made them."""
        makes_votes = getattr(self.routing, "makes_votes", None)
        if makes_votes is not None and makes_votes(self.weight):
            with torch.autocast(capsules.poses.device.type, enabled=False):
                unmade = self.unmade_votes(capsules.poses.to(self.weight.dtype))
                return self.routing.route_unmade(unmade, capsules.activations.to(self.weight.dtype))  # type: ignore[operator]
        return chunked(self._route, capsules.poses, capsules.activations, images=self._images_per_chunk())

    def calibrate(self, capsules: Capsules) -> None:
        """Let the routing start balanced on these capsules, if it can."""
        balance(self.routing, self.votes, capsules, images=self._images_per_chunk())

    @abstractmethod
    def votes(self, poses: Float[Tensor, "B I D"]) -> Float[Tensor, "B *I J D"]:
        """Votes as the routing takes them."""

    @abstractmethod
    def unmade_votes(self, poses: Float[Tensor, "B I D"]) -> MatrixVotes:
        """The same for a routing that makes them itself."""

    def _of_places(self) -> Float[Tensor, "W J n n"]:
        """W_ij of the child at every place; shared ones are a view that repeats them."""
        return self.weight.expand(self.places, -1, -1, -1)

    def _images_per_chunk(self) -> int:
        size = self.votes_per_image * self.weight.element_size()
        return images_per_chunk(size, budget=self.votes_bytes, device=self.weight.device)

    def _route(self, poses: Float[Tensor, "B I D"], activations: Float[Tensor, "B I"]) -> Routed:
        with torch.autocast(poses.device.type, enabled=False):  # see `ClassCaps`
            return self.routing(self.votes(poses.to(self.weight.dtype)), activations.to(self.weight.dtype))


class ConvCaps(MatrixCaps):
    """Capsules that see windows of the grid below, with the same matrices at every position.

    Hinton, Sabour, Frosst, "Matrix capsules with EM routing" (ICLR 2018), section 4.
    Differs from it in: a window larger than the grid shrinks to the grid, so that small pictures pass.

    Args:
        grid, in_types: positions and types of the children.
        types: parent types.
        kernel, stride: K and the stride of the windows, without padding.
        routing: builds the routing from (in_caps, out_caps, pose_dim, fields), out_caps being the types.
        pose_dim, pose, shared_transformations, init_identity, init_noise, votes_mib: see `MatrixCaps`.
    Raises: ValueError: a routing that does not route windows; see `MatrixCaps`.
    """

    windows: Tensor

    def __init__(
        self,
        grid: Grid,
        in_types: int,
        *,
        types: int,
        kernel: int,
        stride: int,
        routing: Callable[..., nn.Module],
        pose_dim: int,
        pose: str,
        shared_transformations: bool,
        init_identity: int | float,
        init_noise: int | float,
        votes_mib: int | float | None,
    ) -> None:
        if "fields" not in inspect.signature(routing).parameters:
            raise ValueError("routing must route windows, as `em` does; this one has no argument `fields`")
        window = (min(kernel, grid.rows), min(kernel, grid.columns))
        fields = receptive_fields(grid, in_types, window, stride)
        places = fields.children.shape[1]
        super().__init__(
            pose_dim=pose_dim,
            pose=pose,
            places=places,
            repeats=1,
            types=types,
            shared_transformations=shared_transformations,
            init_identity=init_identity,
            init_noise=init_noise,
            routing=routing(fields.in_caps, types, pose_dim, fields),
            votes_mib=votes_mib,
            votes_per_image=fields.children.numel() * types * pose_dim,
        )
        self.grid, self.types = grid.after_convolution(window, stride), types
        self.register_buffer("windows", fields.children, persistent=False)
        self.counts = (fields.in_caps, fields.connected)

    def votes(self, poses: Float[Tensor, "B I D"]) -> Float[Tensor, "B P K J D"]:
        """V_ij of the child at each place of each window."""
        return window_votes(gather_windows(poses, self._fields()), self._of_places())

    def unmade_votes(self, poses: Float[Tensor, "B I D"]) -> MatrixVotes:
        """V_ij that are not made yet."""
        return MatrixVotes(poses, self.weight, self.matrices, self._fields(), None)

    def _fields(self) -> ReceptiveFields:
        return ReceptiveFields(self.windows, *self.counts)


class SharedClassCaps(MatrixCaps):
    """Class capsules that every capsule below votes for, with one matrix per type of child and class.

    Shared matrices lose the position of a child, so it is added to its votes (coordinate addition).
    Hinton, Sabour, Frosst, "Matrix capsules with EM routing" (ICLR 2018), section 4.
    Differs from it in: nothing. The paper says "scaled"; centre and scale are those of the authors' code.

    Args:
        grid, in_types: positions and types of the children.
        classes: number of classes.
        image_size: rows and columns of the picture, in whose middle the coordinates are 0.
        coordinates: None; "paper": row and column go to the first two elements of the pose's right-hand
            column (3 and 7 of 16); "official": to elements 0 and 1, as in the authors' code.
        coordinate_scale: per pixel.
        routing: builds the routing from (in_caps, out_caps, pose_dim).
        pose_dim, pose, shared_transformations, init_identity, init_noise, votes_mib: see `MatrixCaps`.
    Raises: ValueError: coordinates that do not exist; see `MatrixCaps`.
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
        coordinates: str | None,
        coordinate_scale: int | float,
        routing: Callable[..., nn.Module],
        pose_dim: int,
        pose: str,
        shared_transformations: bool,
        init_identity: int | float,
        init_noise: int | float,
        votes_mib: int | float | None,
    ) -> None:
        if coordinates not in (None, *COORDINATES):
            raise ValueError(
                f"coordinates must be null or one of {', '.join(COORDINATES)}, got {coordinates}"
            )
        if coordinates is not None and pose_dim < 4:
            raise ValueError(f"pose_dim must be >= 4 for coordinates, got {pose_dim}")
        in_caps = grid.positions * in_types
        super().__init__(
            pose_dim=pose_dim,
            pose=pose,
            places=in_types,
            repeats=grid.positions,
            types=classes,
            shared_transformations=shared_transformations,
            init_identity=init_identity,
            init_noise=init_noise,
            routing=routing(in_caps, classes, pose_dim),
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
        votes = window_votes(by_position, self._of_places())  # a view of [B, P, J, types, D]
        if self.coordinates is not None:
            votes = votes + self.coordinates[:, None, None]
        by_parent = votes.permute(0, 3, 1, 2, 4).flatten(2, 3)  # [B, J, I, D]
        return by_parent.transpose(1, 2)

    def unmade_votes(self, poses: Float[Tensor, "B I D"]) -> MatrixVotes:
        """V_ij that are not made yet."""
        offsets = self.coordinates
        if offsets is not None:
            offsets = offsets.repeat_interleave(self.places, 0)  # [I, D]
        return MatrixVotes(poses, self.weight, self.matrices, None, offsets)


def matrix_side(pose_dim: int, pose: str) -> int:
    """Rows of a W_ij for poses of this size.

    Raises: ValueError: a pose that does not exist, or a matrix that is not square.
    """
    require_one_of(POSES, pose=pose)
    side = pose_dim if pose == "vector" else math.isqrt(pose_dim)
    if pose == "matrix" and side * side != pose_dim:
        raise ValueError(f"pose_dim must be a square for matrix poses, got {pose_dim}")
    return side


def _coordinate_elements(pose_dim: int, placement: str) -> tuple[int, int]:
    """Which element of a pose the row goes to, and which the column."""
    columns = math.isqrt(pose_dim)
    return (columns - 1, 2 * columns - 1) if placement == "paper" else (0, 1)
