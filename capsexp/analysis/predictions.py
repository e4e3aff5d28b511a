"""Predictions for a user's own images."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn

from capsexp.capsules import Output
from capsexp.config.components import Components
from capsexp.data.batches import Batches
from capsexp.data.dataset import Dataset
from capsexp.data.preprocess import as_uint8_images
from capsexp.data.split import Split
from capsexp.training.evaluate import inference
from capsexp.training.metrics import autocast, pool_crops


class Predictions(NamedTuple):
    """The network's answer for N images, on the CPU. T is the number of labels per image, if above 1."""

    labels: Int64[Tensor, " N *T"]
    """Indices of the classes with the highest scores."""
    probabilities: Float[Tensor, "N J"]
    """Of each class, in [0, 1]; capsules are independent, so they need not sum to 1. With several test crops,
    the mean over the crops of the probabilities scaled to sum to 1."""
    classes: tuple[str, ...] | tuple[tuple[str, ...], ...]
    """Names of the labels: one per image, or a tuple of T."""
    reconstructions: Float[Tensor, "N *T C H W"] | None
    """Decoded images in [0, 1], one for each label; None without a decoder."""


class PredictedBatch(NamedTuple):
    """The network's answer for a batch of images, on the CPU."""

    labels: Int64[Tensor, " B *T"]
    probabilities: Float[Tensor, "B J"]
    pixels: Float[Tensor, "B C H W"]
    """What the network was given, in [0, 1]: of several test crops the one in the center."""
    reconstructions: Float[Tensor, "B *T C H W"] | None


def predict_images(model: nn.Module, components: Components, images: Tensor | NDArray[Any]) -> Predictions:
    """Classify images in batches of the run's batch size; see `TrainedRun.predict`."""
    raw = _raw_images(components.dataset, images)
    batches = [predict_batch(model, components, part) for part in raw.split(components.trainer.batch_size)]
    labels = torch.cat([batch.labels for batch in batches])
    decoded = [batch.reconstructions for batch in batches if batch.reconstructions is not None]
    return Predictions(
        labels=labels,
        probabilities=torch.cat([batch.probabilities for batch in batches]),
        classes=_names(components.dataset.classes, labels),
        reconstructions=torch.cat(decoded) if decoded else None,
    )


def predict_batch(
    model: nn.Module, components: Components, images: UInt8[Tensor, "B C H W"]
) -> PredictedBatch:
    """Classify a batch as the evaluation does: with its preprocessing, precision and test crops.

    Args:
        model: the network.
        components: of the run.
        images: of the dataset's `raw_shape`.
    """
    dataset, device = components.dataset, components.device
    batches = Batches(
        Split(images, torch.zeros(len(images), dtype=torch.int64)),
        dataset.preprocess,
        batch_size=len(images),
        seed=components.seed,
        device=device.torch_device,
        memory_format=device.memory_format,
        limit=None,
    )
    views = next(batches.views())
    count = dataset.labels_per_image
    with inference(model), autocast(device.torch_device, components.trainer.precision):
        outputs = [model(view.images) for view in views]
        scores, probabilities = _pooled(outputs)
        labels = scores.argmax(1) if count == 1 else scores.topk(count, dim=1).indices
        # The network decodes the best class of its own input, which is not that of all crops together.
        decodes_others = outputs[0].reconstruction is not None and (count > 1 or len(views) > 1)
        output = model(views[0].images, labels) if decodes_others else outputs[0]
    decoded = output.reconstruction
    return PredictedBatch(
        labels=labels.cpu(),
        probabilities=probabilities.float().cpu(),
        pixels=views[0].pixels.float().cpu(),
        reconstructions=None if decoded is None else decoded.float().cpu(),
    )


def _pooled(outputs: Sequence[Output]) -> tuple[Tensor, Tensor]:
    """Return scores and probabilities of the classes; of several crops the mean, as `evaluate` has it."""
    if len(outputs) == 1:
        return outputs[0].scores, outputs[0].probabilities
    pooled = pool_crops([output.probabilities.float() for output in outputs]) / len(outputs)
    return pooled, pooled


def _raw_images(dataset: Dataset, images: Tensor | NDArray[Any]) -> UInt8[Tensor, "N C H W"]:
    """Convert images to the dtype and the shape that the preprocessing takes."""
    shape, images = dataset.raw_shape, torch.as_tensor(images)
    if dataset.preprocess.resize is not None and images.ndim >= 2:
        shape = (shape[0], images.shape[-2], images.shape[-1])
    return dataset.preprocess.resize_all(as_uint8_images(images, shape))


def _names(
    classes: tuple[str, ...], labels: Int64[Tensor, " N *T"]
) -> tuple[str, ...] | tuple[tuple[str, ...], ...]:
    if labels.dim() == 1:
        return tuple(classes[label] for label in labels.tolist())
    return tuple(tuple(classes[label] for label in row) for row in labels.tolist())
