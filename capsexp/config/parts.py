"""What a run is built of."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Parts(NamedTuple):
    """Everything that a run is made of; `train` and `eval` get it from the same function."""

    seed: int
    device: Any
    trainer: Any
    dataset: Any
    loss: Any
    new_model: Callable[[], Any]
    """Builds the network on the CPU from the global random state, so that every device starts alike."""
    new_optimizer: Callable[..., Any]
    """Takes the parameters and `lr`."""
    learning_rate: Callable[..., float]

    def batches(self, split: Any, *, limit: int | None, training: bool = False) -> Any:
        """A split as batches on the run's device (`capsexp.data.batches.Batches`)."""
        return self.dataset.batches(
            split,
            batch_size=self.trainer.batch_size,
            seed=self.seed,
            device=self.device.torch_device,
            memory_format=self.device.memory_format,
            limit=limit,
            training=training,
        )
