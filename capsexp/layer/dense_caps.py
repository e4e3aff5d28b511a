"""Matrix capsules that every capsule below votes for, whatever its place in the image."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from capsexp.errors import require_at_least_1
from capsexp.layer.matrix_caps import MatrixCaps
from capsexp.layer.matrix_start import Initialisation, Pose
from capsexp.layer.routed import require_factory, shared_keyword
from capsexp.ops.votes import MatrixVotes


class DenseCaps(MatrixCaps):
    """Capsules with a matrix W_ij per child and parent, or one W_j per parent for all children.

    The layers of Heinsen, "An algorithm for routing capsules in all domains" (arXiv 1911.00792).
    Differs from it in: poses are square matrices.

    Args:
        in_caps, out_caps: I and J.
        routing: builds the routing from (in_caps, out_caps, pose_dim); with shared_transformations also from
            `shared=True`, if it has such an argument.
        pose_dim, pose, shared_transformations, votes_mib: see `MatrixCaps`.
        initialisation, init_identity, init_noise, vote_bias: see `MatrixCaps`.
    Raises: ValueError: a number < 1; see `MatrixCaps`.
    """

    def __init__(
        self,
        in_caps: int,
        out_caps: int,
        *,
        routing: Callable[..., nn.Module],
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
        require_at_least_1(in_caps=in_caps, out_caps=out_caps)
        super().__init__(
            in_caps=in_caps,
            pose_dim=pose_dim,
            pose=pose,
            places=in_caps,
            window=1,
            repeats=1,
            types=out_caps,
            shared_transformations=shared_transformations,
            initialisation=initialisation,
            init_identity=init_identity,
            init_noise=init_noise,
            vote_bias=vote_bias,
            routing=routing(in_caps, out_caps, pose_dim, **shared_keyword(routing, shared_transformations)),
            votes_mib=votes_mib,
            votes_per_image=in_caps * out_caps * pose_dim,
        )

    def votes(self, poses: Float[Tensor, "B I D"]) -> Float[Tensor, "B I J D"]:
        """V_ij of every child."""
        return self._votes_of_windows(poses.unsqueeze(1)).squeeze(1)

    def lazy_votes(self, poses: Float[Tensor, "B I D"]) -> MatrixVotes:
        """V_ij of every child before they are computed."""
        return MatrixVotes(poses, self.weight, self.matrices, None, None, self.bias)
