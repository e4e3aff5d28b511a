"""The splits that a run trains and validates on."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from capsexp.capsules import Batch
from capsexp.config.components import Components
from capsexp.data.batches import Batches
from capsexp.data.manifest import digest_of
from capsexp.data.split import Split
from capsexp.errors import UserError
from capsexp.training.early_stop import familiar_batches
from capsexp.training.parallel import ProcessGroup
from capsexp.training.trainer import Trainer


class Splits(NamedTuple):
    """Batches on the run's device. The test split is read after training."""

    training: Batches
    validation: Batches | None
    familiar: Batches | None
    """Familiar test images, if the accuracy on them ends the training."""
    test_count: int | None
    """Test images; None if there is no test, or if the dataset does not know their number yet."""

    @property
    def has_validation(self) -> bool:
        """Whether there is anything to evaluate during training."""
        return self.validation is not None or self.familiar is not None

    def epoch(self, number: int, *, start: int, overfit: bool) -> Iterator[Batch]:
        """Iterate over an epoch from batch `start` on; for overfitting, in order and without augmentation."""
        if not overfit:
            return self.training.training(number, start=start)
        return (batch for place, batch in enumerate(self.training.in_order()) if place >= start)


def read_splits(components: Components) -> Splits:
    """Read the training and validation images, and check the files of the test split.

    Raises:
        UserError: the images whose accuracy ends the training do not exist.
    """
    settings = components.trainer
    training, validation = components.dataset.read_training()
    if settings.overfit:
        size = settings.batch_size
        training = validation = Split(training.images[:size], training.labels[:size])
    splits = Splits(
        components.batches(training, limit=settings.limit_train_batches, training=True),
        components.batches(validation, limit=settings.limit_eval_batches) if validation.size > 0 else None,
        familiar_batches(components),
        components.dataset.check_test() if settings.test != "none" else None,
    )
    _require_validation(settings, splits)
    return splits


def _require_validation(settings: Trainer, splits: Splits) -> None:
    """Check that there are validation images where a setting needs them."""
    needs = {
        "stop_accuracy": settings.stop_accuracy is not None and settings.stop_on == "validation",
        "patience": settings.patience is not None,
        "best_by": settings.best_by is not None,
    }
    for name in (name for name, needed in needs.items() if needed and splits.validation is None):
        raise UserError(f"trainer.{name}: this run has no validation images to measure it on")


def require_same_images(splits: Splits, processes: ProcessGroup) -> None:
    """Check that all processes have read the same images in the same order: each takes its slice by number.

    Raises:
        UserError: they have not; which splits differ, and in which process.
    """
    if processes.size == 1:
        return
    read = {"training": splits.training, "validation": splits.validation, "familiar": splits.familiar}
    digests = {
        name: digest_of(batches.images.cpu().numpy(), batches.labels.cpu().numpy())
        for name, batches in read.items()
        if batches is not None
    }
    every = processes.gather(digests)
    problem = processes.broadcast(lambda: _other_images(every))
    if problem is not None:
        raise UserError(problem)


def _other_images(digests: Sequence[Mapping[str, str]]) -> str | None:
    """Return which splits of the first process that differs from rank 0 do so; None if all are equal."""
    for rank, other in enumerate(digests):
        names = [name for name, digest in digests[0].items() if other.get(name) != digest]
        if names:
            return f"the {' and '.join(names)} images of rank {rank} are not those of rank 0"
    return None
