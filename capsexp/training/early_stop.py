"""Training that ends at an accuracy, as the papers do to match networks with each other."""

from capsexp.config.components import Components
from capsexp.data.batches import Batches
from capsexp.errors import UserError
from capsexp.training.state import State
from capsexp.training.trainer import Trainer


def familiar_batches(components: Components) -> Batches | None:
    """Return the familiar test images if the accuracy on them ends the training.

    Raises:
        UserError: the dataset has none.
    """
    settings, dataset = components.trainer, components.dataset
    if settings.stop_accuracy is None or settings.stop_on != "familiar":
        return None
    split = dataset.familiar()
    if split is None:
        raise UserError(f"trainer.stop_on: {dataset.name} has no familiar test images beside its test split")
    return components.batches(split, limit=settings.limit_eval_batches)


def caveats(familiar: Batches | None) -> list[str]:
    """Return what a user must know about the metrics of a run that test images ended."""
    if familiar is None:
        return []
    return [
        "familiar TEST images decide when training ends (trainer.stop_on): the accuracy on them is no longer "
        "a test result; only the accuracy on the other test images is"
    ]


def describe_end(settings: Trainer, state: State) -> list[str]:
    """Describe how a training with `trainer.stop_accuracy`, `patience` or `max_seconds` ended."""
    lines = []
    if settings.stop_accuracy is not None:
        lines.append(_describe_accuracy(settings, state))
    if state.stopped is None and settings.is_out_of_patience(state.unimproved):
        better = f"no validation round is better than that of step {state.best_step}"
        return [*lines, f"stopped at step {state.step}: {better} (trainer.patience={settings.patience})"]
    early = None if state.stopped else state.budget.end_line(state.step, state.seconds)
    return lines if early is None else [*lines, early]


def _describe_accuracy(settings: Trainer, state: State) -> str:
    stopped = state.stopped
    if stopped is None:
        return f"an accuracy of {settings.stop_accuracy} on {settings.stop_on} images was not reached"
    # Where time ends the training, its steps are only expected.
    of_total = f" of {state.total}" if settings.max_seconds is None else ""
    at = f"stopped at step {stopped['step']}{of_total}"
    return f"{at}: accuracy {stopped['accuracy']:.4f} on {stopped['on']} images"
