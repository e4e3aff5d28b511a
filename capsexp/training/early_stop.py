"""Training that ends at an accuracy on familiar test pictures, as the papers match networks."""

from collections.abc import Mapping
from typing import Any

from capsexp.config.components import Components
from capsexp.data.batches import Batches
from capsexp.errors import UserError
from capsexp.training.trainer import Trainer


def familiar_batches(components: Components) -> Batches | None:
    """The familiar test pictures, if they decide when training ends.

    Raises:
        UserError: the data set has none.
    """
    settings, dataset = components.trainer, components.dataset
    if settings.stop_accuracy is None or settings.stop_on != "familiar":
        return None
    split = dataset.familiar()
    if split is None:
        raise UserError(f"trainer.stop_on: {dataset.name} has no familiar test pictures beside its test part")
    batches: Batches = components.batches(split, limit=settings.limit_eval_batches)
    return batches


def remarks_on(familiar: Batches | None) -> list[str]:
    """The line that must stand beside figures of a run that looked at test pictures."""
    if familiar is None:
        return []
    return [
        "familiar TEST pictures decide when training ends (trainer.stop_on): the figure on them is no test "
        "any more, only that on the other test pictures is"
    ]


def ending(settings: Trainer, stopped: Mapping[str, Any] | None, total: int) -> str:
    """How a training that was to stop at an accuracy came to its end."""
    if stopped is None:
        return f"an accuracy of {settings.stop_accuracy} on {settings.stop_on} pictures was not reached"
    at = f"stopped at step {stopped['step']} of {total}"
    return f"{at}: accuracy {stopped['accuracy']:.4f} on {stopped['on']} pictures"
