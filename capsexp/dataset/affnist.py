"""affNIST: MNIST at random places for training, affine transforms of it for testing; 40x40, grey."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from scipy.io import loadmat
from torch import Tensor

from capsexp.data.dataset import Dataset
from capsexp.data.download import Progress, digest
from capsexp.data.placed import PlacedDataset
from capsexp.data.preprocess import Preprocess
from capsexp.data.split import Split
from capsexp.errors import DataError, first_line

URL = "https://www.cs.toronto.edu/~tijmen/affNIST/32x/apply_affine/test.mat.zip"
FILE = "affNIST/test.mat"
STRUCT = "affNISTdata"
FIELDS = ("image", "label_int", "label_one_of_n")


class AffNIST(PlacedDataset):
    """60,000 training pictures, of which 5,000 are for validation, and 320,000 affNIST test pictures.

    The file of the test pictures has no published checksum, so it is neither downloaded nor ever called
    verified; its structure is checked in full. The other test pictures are the 10,000 of MNIST.

    Args:
        root: the data root (`~` is expanded), in which the file is affNIST/test.mat.
        source: see `PlacedDataset`.
        canvas: see `PlacedDataset`; that of the file is 40.
        placement_seed: see `PlacedDataset`.
        test_pictures: `affine` for the file, or `expanded` for the familiar ones, which do not need it.
        preprocess: see `PlacedDataset`.

    Raises:
        ValueError: the source's pictures are not those that the file is of.
    """

    name = "affnist"
    transforms = 32
    """Of each of MNIST's test pictures."""
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
            raise ValueError(
                f"source must have grey pictures in 10 classes, got {source.raw_shape[0]} channels and "
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
        """Names, below the data root, of the files that are not there."""
        needed = self.test_pictures == "affine" and not self.path.is_file()
        return [*self.source.missing_files(), *([FILE] if needed else [])]

    def require_files(self) -> None:
        """Refuse to start without the files.

        Raises:
            DataError: one is missing; says where it is to be had.
        """
        self.source.require_files()
        if FILE in self.missing_files():
            raise DataError(
                f"{self.path} is missing: get {URL} by hand and unpack it into {self.path.parent} (no "
                "checksum is published, so it is not downloaded here), or do without it: "
                "dataset.test_pictures=expanded"
            )

    def prepare(self, progress: Progress) -> None:
        """Get what is missing of MNIST.

        Raises:
            DataError: the file of the test pictures is missing, or something else cannot be had.
        """
        self.source.prepare(progress)
        self.require_files()

    def problems(self) -> list[str]:
        """Every missing or damaged file, one line each, and what stays unverified."""
        return [*self.source.problems(), *(self._file_problems() if self.test_pictures == "affine" else [])]

    def caveats(self) -> list[str]:
        """A line that the test pictures could not be compared with a checksum."""
        if self.test_pictures == "expanded":
            return self.source.caveats()
        line = f"{self.name}: no checksum of {FILE} is published; its structure alone was checked"
        return [*self.source.caveats(), line]

    def _file_problems(self) -> list[str]:
        if not self.path.is_file():
            return [f"{self.path} is missing; it is in {URL}"]
        try:
            self._affine()
        except DataError as error:
            return [str(error)]
        found = digest(self.path, "sha256")
        return [
            f"{self.path} has the structure of affNIST's test part, but no checksum is published to "
            f"compare it with (sha256 {found}); it can be used, but say so beside any figure"
        ]

    def _affine(self) -> Split:
        self.require_files()
        columns, labels = read_columns(
            self.path, pixels=self.canvas**2, count=self.transforms * self.originals
        )
        # loadmat's arrays go down the columns: one picture after another, so this is a view.
        images = torch.from_numpy(columns.T.reshape(-1, 1, self.canvas, self.canvas))
        return Split(upright(images, labels, self._centred(self.source.read("test"))), labels)


def read_columns(path: Path, *, pixels: int, count: int) -> tuple[NDArray[np.uint8], Tensor]:
    """The `image` of affNIST's struct, one picture in each column, and their classes.

    Raises:
        DataError: the file cannot be read, or is not as affNIST's are.
    """
    fields = _fields(path)
    image, label, one_of_n = (fields[name] for name in FIELDS)
    if image.dtype != np.uint8:
        raise DataError(f"{path}: image must be uint8, got {image.dtype}")
    for name, rows in zip(FIELDS, (pixels, 1, 10), strict=True):
        if fields[name].shape != (rows, count):
            raise DataError(f"{path}: {name} must be {rows}x{count}, got {_times(fields[name].shape)}")
    if not np.isin(label, range(10)).all():
        raise DataError(f"{path}: label_int must be 0 … 9, got {np.setdiff1d(label, range(10))[:5].tolist()}")
    if not np.array_equal(one_of_n, np.arange(10)[:, None] == label):
        raise DataError(f"{path}: label_one_of_n must have a 1 at label_int and 0 elsewhere; it has not")
    return image, torch.from_numpy(label[0].astype(np.int64))


def upright(images: UInt8[Tensor, "N 1 H W"], labels: Tensor, originals: Split) -> UInt8[Tensor, "N 1 H W"]:
    """The pictures, mirrored at the diagonal if that makes their classes more like the originals.

    Nothing published says whether affNIST's pixels go along rows, as most readers have it, or down columns.
    """
    means = class_means(Split(images, labels))
    expected = class_means(originals)
    along, down = ((means * one).sum() for one in (expected, expected.mT))
    return images if along >= down else images.mT.contiguous()


def class_means(split: Split) -> Tensor:
    """The mean picture of each class less that of all, [10, 1, H, W]."""
    sums = torch.stack([split.images[split.labels == label].sum(0) for label in range(10)]).double()
    means = sums / split.labels.bincount(minlength=10).clamp_min(1)[:, None, None, None]
    return means - means.mean(0)


def _fields(path: Path) -> dict[str, Any]:
    try:
        found = loadmat(path, variable_names=[STRUCT])
    except Exception as error:  # scipy raises many kinds for a file that it cannot read
        raise DataError(f"{path} cannot be read as a MATLAB 5 file: {first_line(error)}") from error
    struct = found.get(STRUCT)
    names = getattr(getattr(struct, "dtype", None), "names", None) or ()
    if struct is None or struct.shape != (1, 1) or not set(FIELDS) <= set(names):
        got = f"a struct of {', '.join(names)}" if names else "no struct" if struct is not None else "nothing"
        raise DataError(f"{path}: {STRUCT} must be a struct with {', '.join(FIELDS)}, got {got}")
    return {name: np.atleast_2d(struct[name][0, 0]) for name in FIELDS}


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
