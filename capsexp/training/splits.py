"""The splits that a run trains and validates on."""

from typing import NamedTuple

from capsexp.config.components import Components
from capsexp.data.batches import Batches
from capsexp.data.split import Split
from capsexp.errors import UserError
from capsexp.training.early_stop import familiar_batches


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
    stops_on_validation = settings.stop_accuracy is not None and settings.stop_on == "validation"
    if stops_on_validation and splits.validation is None:
        raise UserError("trainer.stop_accuracy: this run has no validation images to measure it on")
    return splits
