"""affNIST: MNIST at random positions for training, affine transforms of it to test; 40x40, grayscale."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from scipy.io import loadmat
from torch import Tensor

from capsexp.data.cache import content_fingerprint
from capsexp.data.checked_files import Progress, digest
from capsexp.data.dataset import Dataset
from capsexp.data.manifest import SPLITS, ListedSplit, Manifest
from capsexp.data.placed import PlacedDataset
from capsexp.data.preprocess import Preprocess
from capsexp.data.split import Split
from capsexp.errors import DataError, first_line, refuse

URL = "https://www.cs.toronto.edu/~tijmen/affNIST/32x/apply_affine/test.mat.zip"
FILE = "affNIST/test.mat"
STRUCT = "affNISTdata"
FIELDS = ("image", "label_int", "label_one_of_n")


class AffNIST(PlacedDataset):
    """60,000 training images, of which 5,000 are for validation, and 320,000 affNIST test images.

    The file of the test images has no published checksum, so it is not downloaded and never reported as
    verified; its structure is checked in full. The familiar test images are the 10,000 of MNIST.

    Args:
        root: the data root (`~` is expanded); the file is affNIST/test.mat below it.
        source: see `PlacedDataset`.
        canvas: see `PlacedDataset`; 40 for the file.
        placement_seed: see `PlacedDataset`.
        test_pictures: `affine` for the file, or `expanded` for the familiar test images, without it.
        preprocess: see `PlacedDataset`.

    Raises:
        ValueError: the source's images do not fit those of the file.
    """

    name = "affnist"
    transforms = 32
    """Of each of MNIST's test images."""
    originals = 10_000

    def __init__(
        self,
        *,
        root: str,
        source: Dataset,
        canvas: int,
        placement_seed: int,
        test_pictures: Literal["affine", "expanded"],
        preprocess: Preprocess,
    ) -> None:
        if source.raw_shape[0] != 1 or len(source.classes) != 10:
            refuse(
                f"source must have grayscale images in 10 classes, got {source.raw_shape[0]} channels and "
                f"{len(source.classes)} classes"
            )
        super().__init__(
            source=source,
            canvas=canvas,
            placement_seed=placement_seed,
            test_pictures=test_pictures,
            preprocess=preprocess,
        )
        self.path = Path(root).expanduser() / FILE
        self.folder = self.path.parent

    def missing_files(self) -> list[str]:
        """Return the names, below the data root, of the missing files."""
        is_missing = self.test_pictures == "affine" and not self.path.is_file()
        return [*self.source.missing_files(), *([FILE] if is_missing else [])]

    def require_files(self) -> None:
        """Raise an error if files are missing.

        Raises:
            DataError: names the file and where to get it.
        """
        self.source.require_files()
        if FILE in self.missing_files():
            raise DataError(
                f"{self.path} is missing: download {URL} by hand and unpack it into {self.path.parent} (no "
                "checksum is published, so capsexp does not download it), or run without it: "
                "dataset.test_pictures=expanded"
            )

    def prepare(self, progress: Progress) -> None:
        """Download the missing files of MNIST.

        Raises:
            DataError: the file of the test images is missing, or a download fails.
        """
        self.source.prepare(progress)
        self.require_files()

    def problems(self) -> list[str]:
        """Return one line for every missing, damaged or unverifiable file."""
        return [*self.source.problems(), *(self._file_problems() if self.test_pictures == "affine" else [])]

    def caveats(self) -> list[str]:
        """Return the source's caveats, and that the test images have no checksum."""
        if self.test_pictures == "expanded":
            return self.source.caveats()
        line = f"{self.name}: no checksum of {FILE} is published; only its structure was checked"
        return [*self.source.caveats(), line]

    def manifest(self, splits: Sequence[ListedSplit] = SPLITS) -> Manifest:
        """Return what a run stores of the source's data, and a fingerprint of the file of test images."""
        manifest = super().manifest(splits)
        if self.test_pictures == "expanded" or not self.path.is_file():
            return manifest
        fingerprints = {**manifest.fingerprints, FILE: content_fingerprint(self.path)}
        return dataclasses.replace(manifest, fingerprints=fingerprints)

    def require_stored(self, splits: Sequence[ListedSplit]) -> None:
        """Check that the file of test images still is that of the run.

        Raises:
            DataError: it is another file.
        """
        if "test" in splits and self.stored is not None:
            Dataset.require_stored(self, splits)

    def check_test(self) -> int | None:
        """Check the structure of the file of test images, and return their number."""
        count = self.source.check_test()
        if self.test_pictures == "expanded":
            return count
        self.require_files()
        return len(read_columns(self.path, pixels=self.canvas**2, count=self.transforms * self.originals)[1])

    def _file_problems(self) -> list[str]:
        if not self.path.is_file():
            return [f"{self.path} is missing; it is in {URL}"]
        try:
            self._affine()
        except DataError as error:
            return [str(error)]
        sha256 = digest(self.path, "sha256")
        return [
            f"{self.path} has the structure of affNIST's test split, but no checksum is published to "
            f"compare it with (sha256 {sha256}); it can be used, but report this beside any metric"
        ]

    def _affine(self) -> Split:
        self.require_files()
        columns, labels = read_columns(
            self.path, pixels=self.canvas**2, count=self.transforms * self.originals
        )
        # loadmat returns column-major arrays with one image after another, so this is a view.
        images = torch.from_numpy(columns.T.reshape(-1, 1, self.canvas, self.canvas))
        return Split(make_upright(images, labels, self.centered(self.source.read("test"))), labels)


def read_columns(path: Path, *, pixels: int, count: int) -> tuple[NDArray[np.uint8], Tensor]:
    """Read `image` of affNIST's struct, with one image in each column, and the labels.

    Raises:
        DataError: the file cannot be read, or does not have affNIST's structure.
    """
    fields = _fields(path)
    image, label, one_of_n = (fields[name] for name in FIELDS)
    if image.dtype != np.uint8:
        raise DataError(f"{path}: image must be uint8, got {image.dtype}")
    for name, rows in zip(FIELDS, (pixels, 1, 10), strict=True):
        if fields[name].shape != (rows, count):
            raise DataError(f"{path}: {name} must be {rows}x{count}, got {_format_shape(fields[name].shape)}")
    if not np.isin(label, range(10)).all():
        raise DataError(f"{path}: label_int must be 0 … 9, got {np.setdiff1d(label, range(10))[:5].tolist()}")
    if not np.array_equal(one_of_n, np.arange(10)[:, None] == label):
        raise DataError(f"{path}: label_one_of_n must have a 1 at label_int and 0 elsewhere")
    return image, torch.from_numpy(label[0].astype(np.int64))


def make_upright(
    images: UInt8[Tensor, "N 1 H W"], labels: Tensor, originals: Split
) -> UInt8[Tensor, "N 1 H W"]:
    """Return the images, transposed if that makes the mean images of the classes more like the originals'.

    affNIST does not document whether its pixels are in row order, as most readers assume, or in column order.
    """
    means = class_means(Split(images, labels))
    expected = class_means(originals)
    upright, transposed = ((means * reference).sum() for reference in (expected, expected.mT))
    return images if upright >= transposed else images.mT.contiguous()


def class_means(split: Split) -> Tensor:
    """Return the mean image of each class minus the mean over classes, [10, 1, H, W]."""
    sums = torch.stack([split.images[split.labels == label].sum(0) for label in range(10)]).double()
    means = sums / split.labels.bincount(minlength=10).clamp_min(1)[:, None, None, None]
    return means - means.mean(0)


def _fields(path: Path) -> dict[str, Any]:
    try:
        content = loadmat(path, variable_names=[STRUCT])
    except Exception as error:  # scipy raises many kinds for a file that it cannot read
        raise DataError(f"{path} cannot be read as a MATLAB 5 file: {first_line(error)}") from error
    struct = content.get(STRUCT)
    names = getattr(getattr(struct, "dtype", None), "names", None) or ()
    if struct is None or struct.shape != (1, 1) or not set(FIELDS) <= set(names):
        got = f"a struct of {', '.join(names)}" if names else "no struct" if struct is not None else "nothing"
        raise DataError(f"{path}: {STRUCT} must be a struct with {', '.join(FIELDS)}, got {got}")
    return {name: np.atleast_2d(struct[name][0, 0]) for name in FIELDS}


def _format_shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
