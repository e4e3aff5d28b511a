"""What a component of each config group must offer to a run."""

from collections.abc import Iterator
from typing import Any

from capsexp.errors import UserError

KINDS: dict[str, tuple[str, ...]] = {
    "device": ("torch_device", "memory_format", "prepare", "place"),
    "trainer": ("max_epochs", "batch_size", "total_steps", "check_stop"),
    "dataset": ("image_shape", "classes", "read", "read_training", "batches"),
    "loss": ("scheduled", "__call__"),
    "optimizer": ("func", "keywords"),
    "model": ("forward", "parameters", "state_dict"),
    "study": ("__call__",),
}
"""Attributes that the code of a run uses. A component of a user's own need not derive from a class."""


def require_kind(group: str, component: Any) -> None:
    """Check that what a node has built belongs into its group.

    Raises:
        UserError: naming what is missing.
    """
    missing = [name for name in KINDS.get(group, ()) if not hasattr(component, name)]
    if missing:
        got = type(component).__name__
        raise UserError(f"{group}: {got} is no {group}: it has no {', '.join(missing)}")


def label_problems(built: dict[str, Any]) -> Iterator[str]:
    """Yield a line if the loss takes one label per image and the dataset has several."""
    if "dataset" not in built or "loss" not in built:
        return
    dataset, loss = built["dataset"], built["loss"]
    targets = getattr(dataset, "labels_per_image", 1)
    if targets > 1 and not getattr(loss, "multi_label", False):
        name = getattr(loss, "__name__", type(loss).__name__)
        yield (
            f"loss: {name} takes one label per image, and {dataset.name} has {targets}: "
            "choose loss=margin or loss=sigmoid_cross_entropy"
        )
