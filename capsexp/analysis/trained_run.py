"""A trained network with everything that its run directory stores about it."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from rich import get_console
from rich.progress import track
from torch import Tensor, nn

from capsexp.analysis.predictions import Predictions, predict_images
from capsexp.analysis.run_components import run_components
from capsexp.capsules import Batch, Output
from capsexp.config.components import Components
from capsexp.config.saved import load_saved_config
from capsexp.data.batches import Batches
from capsexp.data.dataset import Dataset
from capsexp.data.seeds import epoch_order
from capsexp.data.split import Split
from capsexp.errors import UserError
from capsexp.routing import advance
from capsexp.schedule import Step
from capsexp.terminal import as_markup
from capsexp.training import checkpoint
from capsexp.training.evaluate import evaluate, inference
from capsexp.training.run_dir import RunDir
from capsexp.training.saved_state import restore_weights, saved_position, trained_weights
from capsexp.training.tally import Tally

SPLITS = ("test", "familiar", "validation", "train")


class TrainedRun:
    """A trained network, its dataset and its config. `TrainedRun.load` creates one from a run directory.

    Attributes:
        path (Path): the run directory.
        model (nn.Module): the network on its device, in evaluation mode, without parameter gradients.
        step (Step): training step of the weights: `number` of `total`.
        classes (tuple[str, ...]): names of the classes.
        components (Components): everything else that the run is built of.
        config (dict): the plain config.
        limit (int | None): images at most that `batches` and `outputs` read of a split; None for all.
    """

    def __init__(
        self,
        model: nn.Module,
        components: Components,
        *,
        path: Path,
        step: Step,
        config: dict[str, Any] | None = None,
        limit: int | None = None,
        plugins: Sequence[str] = (),
    ) -> None:
        if limit is not None and limit < 1:
            raise UserError(f"limit: must be an integer >= 1 or null, got {limit}")
        self.model = model.eval().requires_grad_(False)
        self.components, self.path, self.step, self.limit = components, path, step, limit
        self.config = {} if config is None else config
        self.classes, self._plugins = tuple(components.dataset.classes), plugins

    def __repr__(self) -> str:
        network = type(self.model).__name__
        return f"TrainedRun({self.path}: {network} on {self.dataset.name}, step {self.step.number})"

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        weights: str | int = "best",
        device: str | None = None,
        plugins: Sequence[str] = (),
    ) -> "TrainedRun":
        """Load a run directory.

        Loading reads the config and a checkpoint, no dataset files. It changes no global state: only the
        `capsexp` commands apply the device's settings `threads`, `allocator` and `deterministic`.

        Args:
            path: the run directory.
            weights: `best`, `last`, or the step of a checkpoint.
            device: `auto`, `cpu`, `cuda` or `mps`; None for the device in the run's config.
            plugins: packages beside capsexp and torch whose classes the config may name. Their code runs.

        Returns:
            The run, its network in evaluation mode.

        Raises:
            UserError: no such run or checkpoint, a damaged file, or a device that is not available.

        Example:
            >>> run = TrainedRun.load("outputs/demo")
            >>> run.predict(images).classes
            ('7', '2', '1')
            >>> run.evaluate("test")["accuracy"]
            0.9958
        """
        folder = Path(path)
        config = load_saved_config(folder)
        if device is not None:
            config["device"] = {**config.get("device", {}), "name": device}
        components = run_components(config, plugins=plugins)
        return cls.restore(components, folder, weights=weights, config=config, plugins=plugins)

    @classmethod
    def restore(
        cls,
        components: Components,
        path: Path,
        *,
        weights: str | int,
        config: dict[str, Any] | None = None,
        limit: int | None = None,
        plugins: Sequence[str] = (),
    ) -> "TrainedRun":
        """Load the weights of a run whose components are built already.

        Args:
            components: what `capsexp.config.build.build_components` returned.
            path: the run directory.
            weights: `best`, `last`, or the step of a checkpoint.
            config: the plain config that the components are built from.
            limit: images at most of any split; None for all.
            plugins: see `capsexp.config.build.build_components`.

        Raises:
            UserError: no such checkpoint, a damaged one, or weights of another network.
        """
        model, step = load_model(components, path, weights=weights)
        return cls(model, components, path=path, step=step, config=config, limit=limit, plugins=plugins)

    @property
    def dataset(self) -> Dataset:
        """The dataset of the run, with its preprocessing."""
        return self.components.dataset

    def predict(self, images: Tensor | NDArray[Any]) -> Predictions:
        """Classify images, in batches of the run's batch size. Needs no dataset files.

        Args:
            images: [N, C, H, W] or [C, H, W], uint8 or float in [0, 1]. Their shape is the dataset's
                `raw_shape`; height and width are free if the dataset's preprocessing resizes.

        Returns:
            Labels, probabilities, names of the labels, and reconstructions, on the CPU.

        Raises:
            ValueError: another dtype, range or shape.

        Example:
            >>> predictions = run.predict(torch.rand(5, 1, 28, 28))
            >>> predictions.labels.shape, predictions.probabilities.shape
            (torch.Size([5]), torch.Size([5, 10]))
        """
        return predict_images(self.model, self.components, images)

    def evaluate(self, split: str = "test", *, limit: int | None = None) -> dict[str, float]:
        """Measure the network on a split; `capsexp eval` prints the same numbers.

        Args:
            split: `test`, `validation`, `train`, or `familiar`: test images of the kind seen in training, for
                a dataset whose test split is of another kind.
            limit: images at most, the same random sample at every call; None for all.

        Returns:
            `accuracy` in [0, 1], `loss` and its terms, and statistics of the capsules, by name.

        Raises:
            UserError: an unknown or empty split, a limit below 1, missing or damaged dataset files.
        """
        return self.evaluate_batches(self.evaluation_batches(split, limit=limit))

    def evaluation_batches(self, split: str, *, limit: int | None = None) -> Batches:
        """Return the batches of a split that `evaluate` visits. The arguments are those of `evaluate`."""
        if limit is not None and limit < 1:
            raise UserError(f"limit: must be an integer >= 1 or null, got {limit}")
        images = self._read(split)
        if images.size == 0:
            raise UserError(f"split={split}: this run has no {split} images")
        batches = self.components.batches(images, limit=self.components.trainer.limit_eval_batches)
        return batches if limit is None else batches.subset(_sample(batches.count, limit))

    def evaluate_batches(self, batches: Batches, tally: Tally | None = None) -> dict[str, float]:
        """Return the metrics of the network over some batches; the tally counts their images."""
        loss, precision = self.components.loss, self.components.trainer.precision
        return evaluate(self.model, batches, loss, self.step, precision=precision, tally=tally)

    def other_run(self, path: str) -> "TrainedRun":
        """Load the best weights of another run, on the same device and under the same limit.

        Raises:
            UserError: no such run, or it cannot be loaded.
        """
        config = load_saved_config(Path(path))
        components = run_components(config, plugins=self._plugins)._replace(device=self.components.device)
        return TrainedRun.restore(
            components, Path(path), weights="best", config=config, limit=self.limit, plugins=self._plugins
        )

    def batches(self, split: Split | None = None, *, description: str = "images") -> Iterator[Batch]:
        """Iterate over a split in order, below a progress bar; by default over the test split."""
        split = self.dataset.read("test") if split is None else split
        batches = self.in_batches(split)
        # Without a terminal, a bar would leave an empty line for each pass over the images.
        silent = not get_console().is_terminal
        yield from track(
            batches.in_order(), as_markup(description), total=len(batches), transient=True, disable=silent
        )

    def in_batches(self, split: Split) -> Batches:
        """Return a split, or the sample of it that the limit allows, on the run's device."""
        batches = self.components.batches(split, limit=None)
        return batches if self.limit is None else batches.subset(self.sampled(batches.count))

    def sampled(self, size: int) -> Int64[Tensor, " N"]:
        """Return the places of the images that the limit allows, of a split of this size.

        They are in order, and the same for every run.
        """
        return _sample(size, self.limit)

    def outputs(
        self, split: Split | None = None, *, description: str = "images"
    ) -> Iterator[tuple[Batch, Output]]:
        """Iterate like `batches`, with the network's outputs."""
        for batch in self.batches(split, description=description):
            with inference(self.model):
                output = self.model(batch.images, batch.labels)
            yield batch, output

    def require_single_label(self) -> None:
        """Refuse a run with several labels per image, for a study that needs one.

        Raises:
            UserError: the images have several labels.
        """
        if self.dataset.labels_per_image > 1:
            raise UserError(
                f"this study needs images of one class each; those of {self.dataset.name} have "
                f"{self.dataset.labels_per_image}"
            )

    def decoder(self) -> Callable[[Float[Tensor, "B J D"], Tensor], Float[Tensor, "B *T C H W"]]:
        """Return the network's decoder.

        Raises:
            UserError: the network has none.
        """
        decoder = getattr(self.model, "decoder", None)
        if decoder is None:
            raise UserError("this run has no decoder, so there are no reconstructions to study")
        return decoder

    def _read(self, split: str) -> Split:
        if split not in SPLITS:
            allowed = ", ".join(map(repr, SPLITS[:-1]))
            raise UserError(f"split: must be {allowed} or {SPLITS[-1]!r}, got {split!r}")
        if split in ("train", "validation"):
            return self.dataset.read_training()[split == "validation"]
        images = self.dataset.read("test") if split == "test" else self.dataset.familiar()
        if images is None:
            raise UserError(
                f"split=familiar: {self.dataset.name} has no familiar test images beside its test split"
            )
        return images


def load_model(components: Components, path: Path, *, weights: str | int) -> tuple[nn.Module, Step]:
    """Return a trained network on its device, and the step of its weights, where all its schedules stand.

    Args:
        components: what `capsexp.config.build.build_components` returned.
        path: the run directory.
        weights: `best`, `last`, or the step of a checkpoint.

    Raises:
        UserError: no such checkpoint, a damaged one, or weights of another network.
    """
    weights = str(weights)
    name = checkpoint.name_of(int(weights)) if weights.isdigit() else f"{weights}.pt"
    saved = checkpoint.load(path / "checkpoints" / name)
    with torch.random.fork_rng(devices=()):  # a new network draws its initial weights
        model = components.new_model()
    restore_weights(model, trained_weights(saved), origin=str(path))
    position = saved_position(saved, recorded=RunDir(path).status().get("total"))
    advance(model, position)
    return components.device.place(model).eval(), position


def _sample(size: int, limit: int | None) -> Int64[Tensor, " N"]:
    # Random, because the first images may be alike: smallNORB begins with one toy of each class.
    order = epoch_order(size, seed=0, epoch=0)
    return order[:limit].sort().values
