"""`capsexp predict`: what a trained network makes of a few pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.utils import save_image

from capsexp.analysis.trained_run import load_model
from capsexp.config.components import Components
from capsexp.data.preprocess import Shape, resized
from capsexp.dataset.image_folder import decode
from capsexp.errors import UserError
from capsexp.training.evaluate import inference


def predict(components: Components, config: Mapping[str, Any], files: Sequence[str]) -> None:
    """Print the likeliest classes of each picture; write its reconstruction beside it.

    A picture is brought to the channels and the size of those that the network was trained on. Where those
    show several classes each, as many of the likeliest are reconstructed, one at a time.

    Args:
        components: what `capsexp.config.build.build_components` returned.
        config: the plain config: `run`, `weights`, `top` (classes to print), `reconstructions`.
        files: the pictures.
    Raises:
        UserError: a file that is no picture; `top` below 1.
    """
    if not isinstance(config["top"], int) or config["top"] < 1:
        raise UserError(f"top: must be an integer >= 1, got {config['top']!r}")
    pictures = torch.stack([_fitted(name, components.dataset.raw_shape) for name in files])
    model, _ = load_model(components, Path(config["run"]), weights=str(config["weights"]))
    targets = components.dataset.labels_per_image
    prepared = components.dataset.preprocess.test(pictures.to(components.device.torch_device))
    with inference(model):
        output = model(prepared.images)
        if targets > 1:
            output = model(prepared.images, output.scores.topk(targets, dim=1).indices)
    Console().print(_table(files, output.probabilities, components.dataset.classes, config["top"]))
    if config["reconstructions"] and output.reconstruction is not None:
        for name, pixels, decoded in zip(files, prepared.pixels, output.reconstruction, strict=True):
            target = Path(name).with_suffix(".reconstruction.png")
            save_image(_side_by_side(pixels, *(decoded if targets > 1 else [decoded])), target)
            print(f"{target}: the picture as the network saw it, and its reconstruction")


def _fitted(name: str, shape: Shape) -> UInt8[Tensor, "C H W"]:
    """A picture file with the channels and the size of the training pictures."""
    channels, height, width = shape
    if channels not in (1, 3):
        raise UserError(f"this run was trained on pictures of {channels} channels; a file has 1 or 3")
    if not Path(name).is_file():
        raise UserError(f"{name}: there is no such file")
    return resized(decode(name, channels)[None], (height, width))[0]


def _table(
    files: Sequence[str], probabilities: Float[Tensor, "B J"], classes: Sequence[str], top: int
) -> Table:
    likeliest = probabilities.topk(min(top, len(classes)), dim=1)
    table = Table("picture", *(f"{place + 1}." for place in range(likeliest.indices.shape[1])))
    for name, values, labels in zip(files, likeliest.values, likeliest.indices, strict=True):
        cells = (f"{classes[label]} {value:.3f}" for value, label in zip(values, labels, strict=True))
        table.add_row(name, *cells)
    return table


def _side_by_side(*pictures: Float[Tensor, "C H W"]) -> Float[Tensor, "C H V"]:
    return torch.cat([picture.float().cpu() for picture in pictures], dim=2)
