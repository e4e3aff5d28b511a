"""`capsexp predict`: classify image files with a trained network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torchvision.utils import save_image

from capsexp.analysis.trained_run import TrainedRun
from capsexp.config.components import Components
from capsexp.data.preprocess import Shape, resized
from capsexp.dataset.image_folder import decode
from capsexp.errors import UserError
from capsexp.terminal import Table, new_console
from capsexp.text import printable


def predict(components: Components, config: Mapping[str, Any], files: Sequence[str]) -> None:
    """Print the most likely classes of each image; write its reconstruction beside it.

    An image is converted to the channels and the size of the training images. If those have several labels
    each, as many of the most likely classes are reconstructed, one at a time.

    Args:
        components: what `capsexp.config.build.build_components` returned.
        config: the plain config: `run`, `weights`, `top` (classes to print), `reconstructions`.
        files: the image files.

    Raises:
        UserError: a file that is not an image; `top` below 1.
    """
    if not isinstance(config["top"], int) or config["top"] < 1:
        raise UserError(f"top: must be an integer >= 1, got {config['top']!r}")
    components.device.prepare()
    images = torch.stack([_read(name, components.dataset.raw_shape) for name in files])
    run = TrainedRun.restore(components, Path(config["run"]), weights=config["weights"], config=dict(config))
    predictions = run.predict(images)
    new_console().print(_table(files, predictions.probabilities, run.classes, config["top"]))
    if config["reconstructions"] and predictions.reconstructions is not None:
        pixels = run.dataset.preprocess.test(images).pixels
        # One reconstruction for each label: [N, T, C, H, W].
        decoded = predictions.reconstructions.reshape(len(images), -1, *pixels.shape[1:])
        for name, image, reconstructions in zip(files, pixels, decoded, strict=True):
            target = Path(name).with_suffix(".reconstruction.png")
            save_image(torch.cat([image, *reconstructions], dim=2), target)  # side by side
            print(f"{printable(target)}: the network's input and its reconstruction")


def _read(name: str, shape: Shape) -> UInt8[Tensor, "C H W"]:
    """Read an image file, with the channels and the size of the training images."""
    channels, height, width = shape
    if channels not in (1, 3):
        raise UserError(f"this run was trained on images of {channels} channels; a file has 1 or 3")
    if not Path(name).is_file():
        raise UserError(f"{name}: there is no such file")
    return resized(decode(name, channels)[None], (height, width))[0]


def _table(
    files: Sequence[str], probabilities: Float[Tensor, "B J"], classes: Sequence[str], top: int
) -> Table:
    best = probabilities.topk(min(top, len(classes)), dim=1)
    table = Table("image", *(f"{rank + 1}." for rank in range(best.indices.shape[1])))
    for name, values, labels in zip(files, best.values, best.indices, strict=True):
        cells = (f"{classes[label]} {value:.3f}" for value, label in zip(values, labels, strict=True))
        table.add_row(name, *cells)
    return table
