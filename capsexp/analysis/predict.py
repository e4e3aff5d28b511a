"""`capsexp predict`: classify image files with a trained network."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from capsexp.analysis.input_files import find_images
from capsexp.analysis.predictions import PredictedBatch, predict_batch
from capsexp.analysis.reconstruction_files import ReconstructionFolder
from capsexp.analysis.streamed_table import StreamedTable
from capsexp.analysis.trained_run import TrainedRun
from capsexp.config.components import Components
from capsexp.data.dataset import Dataset
from capsexp.data.decode import BY_ITSELF, Reading, decode
from capsexp.data.image_ops import resized
from capsexp.data.threads import refuse, try_files
from capsexp.errors import UserError, is_integer, print_error
from capsexp.text import printable

FOLDER = "predictions"
"""Below the run directory: where reconstructions go by default."""


def predict(components: Components, config: Mapping[str, Any], names: Sequence[str]) -> int:
    """Print the most likely classes of each image, and write its reconstruction.

    An image is converted to the channels and the size of the training images. If those have several labels
    each, as many of the most likely classes are reconstructed, one at a time. The images are read in batches.

    Args:
        components: of the run; no file of its dataset is read.
        config: the plain config: `run`, `weights`, `top` (classes to print), `reconstructions`, `output`
            (folder of the reconstructions; None for RUN/predictions).
        names: image files, and folders of them.

    Returns:
        0, or 1 if some images could not be read or no reconstruction could be written.

    Raises:
        UserError: a file that does not exist; a value that is out of range; not one image that can be read.
    """
    _check(config, components.dataset)
    files, notes = find_images(names)
    components.device.prepare()
    run = TrainedRun.restore(components, Path(config["run"]), weights=config["weights"], config=dict(config))
    for note in notes:
        print(printable(note))
    folder = Path(config["run"], FOLDER) if config["output"] is None else Path(config["output"]).expanduser()
    written = ReconstructionFolder(folder, is_default=config["output"] is None)
    table = _new_table(files, run.classes, config["top"])
    problems: list[str] = []
    size = components.trainer.batch_size
    for start in range(0, len(files), size):
        images, failures = _read(files[start : start + size], components.dataset)
        problems += map(printable, failures)
        if readable := list(images):
            batch = predict_batch(run.model, components, torch.stack(list(images.values())))
            table.add_rows(list(_rows(readable, batch, run.classes, config["top"])))
            if config["reconstructions"]:
                written.save_all(readable, batch)
    if table.is_empty:
        refuse(problems)
    table.end()
    return _report(written, problems)


def _check(config: Mapping[str, Any], dataset: Dataset) -> None:
    problems = []
    top, output = config["top"], config["output"]
    if not is_integer(top) or top < 1:
        problems.append(f"top: must be an integer >= 1, got {top!r}")
    if not isinstance(config["reconstructions"], bool):
        problems.append(f"reconstructions: must be true or false, got {config['reconstructions']!r}")
    if output is not None and (not isinstance(output, str) or not output):
        problems.append(f"output: must be a folder or null, got {output!r}")
    if dataset.raw_shape[0] not in (1, 3):
        channels = dataset.raw_shape[0]
        problems.append(f"this run was trained on images of {channels} channels; a file has 1 or 3")
    if problems:
        raise UserError(*problems)


def _read(files: Sequence[str], dataset: Dataset) -> tuple[dict[str, UInt8[Tensor, "C H W"]], list[str]]:
    """Read files with the channels and the size of the training images.

    Returns:
        The images by the names of their files, and a line for each file that cannot be read.
    """
    channels, height, width = dataset.raw_shape
    reading = _reading(dataset)

    def read(file: str) -> tuple[str, UInt8[Tensor, "C H W"]]:
        return file, resized(decode(file, channels, reading)[None], (height, width))[0]

    results, failures = try_files(read, files)
    return dict(results), failures


def _reading(dataset: Dataset) -> Reading:
    """Return how the images of the training set were read; for other datasets each image by itself."""
    while (source := getattr(dataset, "source", None)) is not None:
        dataset = source
    return getattr(dataset, "reading", BY_ITSELF)


def _new_table(files: Sequence[str], classes: Sequence[str], top: int) -> StreamedTable:
    answers = [f"{name} 0.000" for name in classes]
    return StreamedTable(
        {"image": files, **{f"{rank + 1}.": answers for rank in range(min(top, len(classes)))}}
    )


def _rows(
    files: Sequence[str], batch: PredictedBatch, classes: Sequence[str], top: int
) -> Iterator[list[str]]:
    best = batch.probabilities.topk(min(top, len(classes)), dim=1)
    for file, values, labels in zip(files, best.values.tolist(), best.indices.tolist(), strict=True):
        yield [file, *(f"{classes[label]} {value:.3f}" for value, label in zip(values, labels, strict=True))]


def _report(written: ReconstructionFolder, problems: Sequence[str]) -> int:
    """Print what was written and what failed; return the exit code."""
    for line in written.summary():
        print(printable(line))
    failures = [*written.problems, *problems]
    if failures:
        print_error(UserError(*failures))
    return 1 if failures else 0
