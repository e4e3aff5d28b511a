"""Files of reconstructions: in a folder of their own, none written over another."""

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.utils import save_image

from capsexp.analysis.predictions import PredictedBatch
from capsexp.files import own_folder
from capsexp.text import printable

SHOWN = 20
"""Files that are named; the others are counted."""

LONGEST_NAME = 200
"""Bytes of an image's name that its reconstruction keeps; file systems allow 255 in all."""


class ReconstructionFolder:
    """Writes the reconstructions of images as NAME.reconstruction.png, numbered where that exists.

    After the first failure nothing more is written.

    Args:
        folder: made when the first image is written.
        is_default: whether it lies in the run directory, where a link is not followed.
    """

    def __init__(self, folder: Path, *, is_default: bool) -> None:
        self.folder, self._is_default = folder, is_default
        self.problems: list[str] = []
        """One line, if the reconstructions cannot be written."""
        self._names: list[str] = []
        self._count = 0
        self._taken: Counter[str] = Counter()

    def save_all(self, files: Sequence[str], batch: PredictedBatch) -> None:
        """Write the reconstructions of a batch, each beside the network's input."""
        if batch.reconstructions is None or self.problems:
            return
        # One reconstruction for each label: [B, T, C, H, W].
        decoded = batch.reconstructions.reshape(len(files), -1, *batch.pixels.shape[1:])
        try:
            self._make()
            for file, image, reconstructions in zip(files, batch.pixels, decoded, strict=True):
                self._save(Path(file).name, torch.cat([image, *reconstructions], dim=2))
        except OSError as error:
            reason = error.strerror or str(error)
            self.problems.append(
                f"the reconstructions cannot be written into {printable(self.folder)}: {reason}"
            )

    def summary(self) -> list[str]:
        """Return lines that name what was written."""
        lines = [f"{self.folder / name}: the network's input and its reconstruction" for name in self._names]
        more = self._count - len(self._names)
        return [*lines, f"and {more} more in {self.folder}"] if more else lines

    def _make(self) -> None:
        if self._is_default:
            own_folder(self.folder)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)

    def _save(self, name: str, image: Float[Tensor, "C H W"]) -> None:
        content = BytesIO()
        save_image(image, content, format="png")
        if len(os.fsencode(name)) > LONGEST_NAME:
            name = os.fsencode(name)[:LONGEST_NAME].decode(errors="ignore")
        for number in itertools.count(self._taken[name] + 1):
            target = self.folder / f"{name}.reconstruction{'' if number == 1 else f'-{number}'}.png"
            with contextlib.suppress(FileExistsError):
                _write_new(target, content.getvalue())
                break
        self._taken[name] = number
        self._count += 1
        if len(self._names) < SHOWN:
            self._names.append(target.name)


def _write_new(path: Path, content: bytes) -> None:
    """Write a file that does not exist yet, or nothing.

    Raises:
        OSError: it exists, or the system refuses.
    """
    with open(path, "xb") as file:
        try:
            file.write(content)
            file.flush()
        except BaseException:
            path.unlink(missing_ok=True)
            raise
