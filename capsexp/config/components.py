"""What a run is built of."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from capsexp.schedule import Schedule

if TYPE_CHECKING:  # torch takes a second to import, and a command that only checks words does not need it
    import torch

    from capsexp.data.batches import Batches
    from capsexp.data.dataset import Dataset
    from capsexp.data.split import Split
    from capsexp.loss import Loss
    from capsexp.training.device import Device
    from capsexp.training.trainer import Trainer


class Components(NamedTuple):
    """Everything that a run is built of; all commands get it from `capsexp.config.build.build_components`."""

    seed: int
    device: "Device"
    trainer: "Trainer"
    dataset: "Dataset"
    loss: "Loss"
    new_model: "Callable[[], torch.nn.Module]"
    """Builds the network on the CPU from the global random state, so that it starts alike on every device."""
    new_optimizer: "Callable[..., torch.optim.Optimizer]"
    """Takes the parameters and `lr`."""
    learning_rate: Schedule

    def batches(self, split: "Split", *, limit: int | None, training: bool = False) -> "Batches":
        """Return a split in batches on the run's device."""
        return self.dataset.batches(
            split,
            batch_size=self.trainer.batch_size,
            seed=self.seed,
            device=self.device.torch_device,
            memory_format=self.device.memory_format,
            limit=limit,
            training=training,
        )
