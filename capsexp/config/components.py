"""The components of a run."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from capsexp.schedule import Schedule

if TYPE_CHECKING:  # torch takes a second to import, and checking a command line does not need it
    import torch

    from capsexp.data.batches import Batches
    from capsexp.data.dataset import Dataset
    from capsexp.data.split import Split
    from capsexp.loss import Loss
    from capsexp.training.device import Device
    from capsexp.training.trainer import Trainer


class Components(NamedTuple):
    """Everything that a run is built of; `capsexp.config.build.build_components` returns it."""

    seed: int
    device: "Device"
    trainer: "Trainer"
    dataset: "Dataset"
    loss: "Loss"
    new_model: "Callable[[], torch.nn.Module]"
    """Builds the network on the CPU from the global random state: the same weights for every device."""
    new_optimizer: "Callable[..., torch.optim.Optimizer]"
    """Takes the parameters and `lr`."""
    learning_rate: Schedule
    init_from: str | None = None
    """Run directory whose weights a new run starts with (`model.init_from`)."""
    remarks: tuple[str, ...] = ()
    """Lines about the data of a trained run, for the user."""

    def caveats(self) -> list[str]:
        """Return lines to print beside every metric. Call it after reading."""
        return [*self.remarks, *self.dataset.caveats()]

    def batches(self, split: "Split", *, limit: int | None, training: bool = False) -> "Batches":
        """Return a split in batches on the run's device."""
        batches = self.dataset.batches(
            split,
            batch_size=self.trainer.batch_size,
            seed=self.seed,
            device=self.device.torch_device,
            memory_format=self.device.memory_format,
            limit=limit,
        )
        return batches.for_training() if training else batches
