"""Class capsules without matrices: a child votes for every class with its own pose."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from capsexp.capsules import Capsules, Routed
from capsexp.errors import require_at_least_1
from capsexp.layer.routed import require_factory
from capsexp.routing import reads_poses


class OwnPoseCaps(nn.Module):
    """Class capsules that need no votes: only their activations count.

    The class layer of Hahn, Pyeon, Kim, "Self-routing capsule networks" (NeurIPS 2019), whose code returns no
    poses there. Differs from it in: the pose of a class is the mean of the children's own poses, with the
    shares that they give it, so that studies have one.

    Args:
        in_caps, out_caps: I and J.
        pose_dim: numbers of a pose.
        routing: builds the routing from (in_caps, out_caps, pose_dim).
    Raises: ValueError: a number < 1. TypeError: routing builds nothing.
    """

    def __init__(
        self, in_caps: int, out_caps: int, *, pose_dim: int, routing: Callable[..., nn.Module]
    ) -> None:
        super().__init__()
        require_factory(routing)
        require_at_least_1(in_caps=in_caps, out_caps=out_caps, pose_dim=pose_dim)
        self.out_caps = out_caps
        self.routing = routing(in_caps, out_caps, pose_dim)

    def votes(self, poses: Float[Tensor, "B I D"]) -> Float[Tensor, "B I J D"]:
        """The children's poses, a view that repeats them for every class."""
        return poses.unsqueeze(2).expand(-1, -1, self.out_caps, -1)

    def forward(self, capsules: Capsules) -> Routed:
        """Class capsules and the coupling that made them."""
        given = (capsules.poses,) if reads_poses(self.routing) else ()
        routed: Routed = self.routing(self.votes(capsules.poses), capsules.activations, *given)
        return routed
