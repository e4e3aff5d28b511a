"""What a component of each config group must offer to a run."""

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
