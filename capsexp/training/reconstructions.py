"""Image grids that show reconstructions during training."""

from torch import nn

from capsexp.data.batches import Batches
from capsexp.ops.labels import predicted_labels
from capsexp.training.evaluate import inference
from capsexp.training.record import NoRecord, Record

COUNT = 16
"""Images in the grid."""


def log_reconstructions(record: Record | NoRecord, model: nn.Module, batches: Batches, step: int) -> None:
    """Log the first images above their reconstructions from the predicted class.

    With several labels per image the rows are the image, the images that it was composed of, and a
    reconstruction from each predicted class; a correct class has the place of its label.
    """
    images, labels, pixels, *_ = next(batches.in_order()).take(slice(COUNT))
    several = labels.dim() > 1
    with inference(model):
        output = model(images)
        if several:
            output = model(images, predicted_labels(output.scores, labels))
    decoded = output.reconstruction
    if decoded is not None:
        rows = [images, *pixels.unbind(1), *decoded.unbind(1)] if several else [pixels, decoded]
        record.log_images(step, "reconstruction", rows)
