"""Predictions for a user's own images."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn

from capsexp.capsules import Output
from capsexp.config.components import Components
from capsexp.data.dataset import Dataset
from capsexp.data.preprocess import as_uint8_images
from capsexp.training.evaluate import inference


class Predictions(NamedTuple):
    """The network's answer for N images, on the CPU. T is the number of labels per image, if above 1."""

    labels: Int64[Tensor, " N *T"]
    """Indices of the classes with the highest scores."""
    probabilities: Float[Tensor, "N J"]
    """Of each class, in [0, 1]; capsules are independent, so they need not sum to 1."""
    classes: tuple[str, ...] | tuple[tuple[str, ...], ...]
    """Names of the labels: one per image, or a tuple of T."""
    reconstructions: Float[Tensor, "N *T C H W"] | None
    """Decoded images in [0, 1], one for each label; None without a decoder."""


def predict_images(model: nn.Module, components: Components, images: Tensor | NDArray[Any]) -> Predictions:
    """Classify images in batches of the run's batch size; see `TrainedRun.predict`."""
    raw = _raw_images(components.dataset, images)
    outputs = [_predict_batch(model, components, batch) for batch in raw.split(components.trainer.batch_size)]
    labels = torch.cat([batch_labels for batch_labels, _ in outputs]).cpu()
    decoded = [output.reconstruction for _, output in outputs if output.reconstruction is not None]
    return Predictions(
        labels=labels,
        probabilities=torch.cat([output.probabilities for _, output in outputs]).cpu(),
        classes=_names(components.dataset.classes, labels),
        reconstructions=torch.cat(decoded).cpu() if decoded else None,
    )


def _raw_images(dataset: Dataset, images: Tensor | NDArray[Any]) -> UInt8[Tensor, "N C H W"]:
    """Convert images to the dtype and the shape that the preprocessing takes."""
    shape, images = dataset.raw_shape, torch.as_tensor(images)
    if dataset.preprocess.resize is not None and images.ndim >= 2:
        shape = (shape[0], images.shape[-2], images.shape[-1])
    return dataset.preprocess.resize_all(as_uint8_images(images, shape))


def _predict_batch(
    model: nn.Module, components: Components, images: UInt8[Tensor, "N C H W"]
) -> tuple[Tensor, Output]:
    """Return labels, and an output with their reconstructions."""
    prepared = components.dataset.preprocess.test(images.to(components.device.torch_device))
    count = components.dataset.labels_per_image
    with inference(model):
        output = model(prepared.images)
        if count == 1:
            return output.scores.argmax(1), output
        labels = output.scores.topk(count, dim=1).indices
        return labels, model(prepared.images, labels)


def _names(
    classes: tuple[str, ...], labels: Int64[Tensor, " N *T"]
) -> tuple[str, ...] | tuple[tuple[str, ...], ...]:
    if labels.dim() == 1:
        return tuple(classes[label] for label in labels.tolist())
    return tuple(tuple(classes[label] for label in row) for row in labels.tolist())
