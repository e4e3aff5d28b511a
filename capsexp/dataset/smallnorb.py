"""smallNORB: toys photographed by two cameras, from many viewpoints and in several lightings; 96x96 gray."""

import copy
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from capsexp.data.cache import cached, content_fingerprint, file_fingerprint
from capsexp.data.checked_files import Progress, RemoteFile, StoredFile, digest
from capsexp.data.manifest import ListedSplit
from capsexp.data.norb_file import check_values, held_out_instances, open_norb
from capsexp.data.preprocess import RESIZE_CHUNK, Preprocess
from capsexp.data.published import USABLE, PublishedDataset
from capsexp.data.split import Groups, Split, SplitName
from capsexp.errors import DataError, refuse

URL = "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/"
FOLDER = "smallnorb/"
STEM: dict[SplitName, str] = {
    "train": "smallnorb-5x46789x9x18x6x2x96x96-training-",
    "test": "smallnorb-5x01235x9x18x6x2x96x96-testing-",
}
CHECKSUMS: dict[tuple[SplitName, str], tuple[str, str]] = {  # of the .mat.gz and of the .mat inside it
    ("train", "dat"): (
        "5ffd6272a07d32695ee1082a26a41a93a37aab8c28da047f8c34ed348d214873",
        "md5:8138a0902307b32dfa0025a36dfa45ec",
    ),
    ("train", "cat"): (
        "2784e542c1922060691090952b6cd6278879a216c90f81476f0f00256d42cdaa",
        "sha256:591ed90c090cb6724593e8de28180bd602095ee8ec82bd1a5ca30b488cd1d06e",
    ),
    ("train", "info"): (
        "de7eb932ebe7a4ee16217fead60660d0eb3d23632c2f4d1c51f88c501c17bf32",
        "sha256:6b4075d3800ba0c6fa8c46a02f672572abe7b93f7ed82fb7668354a99ef03306",
    ),
    ("test", "dat"): (
        "cf7104eed3e51174d2f65b66d1e5878b9da233b886f161b0d88f4510ba2c7474",
        "md5:e9920b7f7b2869a8f1a12e945b2c166c",
    ),
    ("test", "cat"): (
        "ecaf6d5bb8c3bc5eab9cf0258f6d2198dd474e016e374836fc097f2e5ff509ff",
        "sha256:591ed90c090cb6724593e8de28180bd602095ee8ec82bd1a5ca30b488cd1d06e",
    ),
    ("test", "info"): (
        "16adf314226327ee006d1a44db8cfef52773c06c829951d5653a9f6f310248a2",
        "sha256:318f817236b7c97af03cd90e07a9cbb4346e20ef83a1118a61eeb50e3b96db7e",
    ),
}

CAMERAS = {"stereo": slice(0, 2), "left": slice(0, 1), "right": slice(1, 2)}
FACTORS = ("instance", "elevation", "azimuth", "lighting")
FAMILIAR = {"azimuth": (30, 32, 34, 0, 2, 4), "elevation": (0, 1, 2)}
"""Viewpoints of the training images in Table 2 of Hinton et al. 2018."""

REDUCTION = "reduction-1"
"""First word of a cache's key. Change the number when the resizing changes."""


class Setup(NamedTuple):
    """The photographed factors. Each split has all combinations of class and factors."""

    instances: dict[SplitName, tuple[int, ...]]
    elevations: tuple[int, ...]
    """0 is 30 degrees above the horizon; steps of 5 degrees."""
    azimuths: tuple[int, ...]
    """In units of 10 degrees."""
    lightings: tuple[int, ...]
    side: int
    """Height and width of an image."""

    def values(self, split: SplitName) -> tuple[tuple[int, ...], ...]:
        """Return the values of each of `FACTORS`."""
        return (self.instances[split], self.elevations, self.azimuths, self.lightings)


def _name(split: SplitName, kind: str) -> str:
    return f"{STEM[split]}{kind}.mat"


def _file(split: SplitName, kind: str, packed: str, unpacked: str) -> RemoteFile:
    name = _name(split, kind)
    return RemoteFile(f"{FOLDER}{name}.gz", f"{URL}{name}.gz", packed, (StoredFile(FOLDER + name, unpacked),))


class SmallNORB(PublishedDataset):
    """24,300 training and 24,300 test pairs of images in 5 classes, each with 5 instances per split.

    Resized images are cached beside the files as `cache-…`; these files may be deleted. The files of labels
    and factors must have the published checksums. Images with another checksum (a converted copy) are read,
    with a caveat.

    Args:
        root: see `PublishedDataset`.
        download: see `PublishedDataset`.
        cameras: `stereo` for two channels, or one of them.
        validation_instance: training instances of every class set aside for validation: one, some or None.
        viewpoint: the factor limited to familiar values in training: `azimuth` (300 … 40 degrees, a third of
            the images), `elevation` (the lowest three, a third), or None.
        test_views: test images with familiar or novel values of that factor, or all.
        preprocess: see `Dataset`.

    Raises:
        ValueError: no such training instances, or all; familiar or novel views without a `viewpoint`.
    """

    name = "smallnorb"
    classes = ("animal", "human", "airplane", "truck", "car")
    setup = Setup(
        instances={"train": (4, 6, 7, 8, 9), "test": (0, 1, 2, 3, 5)},
        elevations=tuple(range(9)),
        azimuths=tuple(range(0, 36, 2)),
        lightings=tuple(range(6)),
        side=96,
    )
    files = tuple(_file(split, kind, *checksums) for (split, kind), checksums in CHECKSUMS.items())

    def __init__(
        self,
        *,
        root: str,
        download: bool,
        cameras: Literal["stereo", "left", "right"],
        validation_instance: int | Sequence[int] | None,
        viewpoint: Literal["azimuth", "elevation"] | None,
        test_views: Literal["all", "familiar", "novel"],
        preprocess: Preprocess,
    ) -> None:
        self.held_out = held_out_instances(validation_instance, self.setup.instances["train"])
        if viewpoint is None and test_views != "all":
            refuse(f"test_views must be 'all' where viewpoint is null, got {test_views!r}")
        self.channels, self.viewpoint = CAMERAS[cameras], viewpoint
        self.test_views: Literal["all", "familiar", "novel"] = test_views
        size = preprocess.resize or (self.setup.side, self.setup.side)
        self.file_shape = (self.channels.stop - self.channels.start, *size)
        # Random validation images would be neighboring views of training toys.
        super().__init__(root=root, download=download, preprocess=preprocess, validation=0, split_seed=0)

    def read_training(self) -> tuple[Split, Split]:
        """Read the training images without the validation instances, and the images of those."""
        images = self.read("train")
        training, validation = self._split_rows(self.factors("train"))
        return images.take(training), images.take(validation)

    def familiar(self) -> Split | None:
        """Read test images from the viewpoints of training; None without a `viewpoint`."""
        return None if self.viewpoint is None else self.with_test_views("familiar").read("test")

    def with_test_views(self, views: Literal["all", "familiar", "novel"]) -> "SmallNORB":
        """Return the same dataset with other views of the test toys."""
        other = copy.copy(self)
        other.test_views = views
        return other

    def factors(self, split: SplitName) -> Int64[Tensor, "N 4"]:
        """Read the `FACTORS` of the images of `read(split)`, in their order.

        As in the files: the number of the toy in its class; the elevation 0 … 8 for 30 … 70 degrees; the
        azimuth in units of 10 degrees; the lighting 0 … 5. `Batch.indices` are the rows.
        """
        _, factors = self._annotations(split)
        return factors[self._rows(split, factors)]

    def groups(self, split: ListedSplit) -> Groups:
        """Return the toy on each image of a split: an instance of a class, such as `car 9`."""
        part: SplitName = "test" if split == "test" else "train"
        labels, factors = self._annotations(part)
        rows = self._rows(part, factors)
        if split != "test":
            training, validation = self._split_rows(factors[rows])
            rows = rows[validation if split == "validation" else training]
        instances = self.setup.instances[part]
        names = tuple(f"{name} {instance}" for name in self.classes for instance in instances)
        place = torch.searchsorted(torch.tensor(instances), factors[rows, FACTORS.index("instance")])
        return Groups("toy", names, labels[rows] * len(instances) + place)

    def check_test(self) -> int:
        """Verify labels and factors of the test split, open its images, and return their number."""
        self._full_size_images("test")
        return len(self.factors("test"))

    def fingerprints(self) -> dict[str, str]:
        """Return the checksums of labels and factors, and fingerprints of the images, which may be a copy."""
        images = {self.root / FOLDER / _name(split, "dat") for split in STEM}
        present = [path for path in images if path.is_file()]
        return super().fingerprints() | {FOLDER + path.name: content_fingerprint(path) for path in present}

    def prepare(self, progress: Progress) -> None:
        """Download missing files, then write the cache of resized images.

        Raises:
            DataError: a file cannot be downloaded, or is damaged.
        """
        super().prepare(progress)
        for split in STEM:
            progress(f"{split} images", 0, 0)
            self._images(split)

    def caveats(self) -> list[str]:
        """Return a line if images are not the published ones."""
        splits: dict[str, SplitName] = {"training": "train", "test": "test"}
        differing = [name for name, split in splits.items() if not self._has_published_images(split)]
        if not differing:
            return []
        return [
            f"{self.name}: the {' and '.join(differing)} images are not the published ones "
            "(checksum differs: a converted copy?); report this beside any metric"
        ]

    def _problem(self, stored: StoredFile) -> str:
        problem = super()._problem(stored)
        splits = [split for split in STEM if self._path(split) == self.root / stored.name]
        if not problem or not splits or not self._path(splits[0]).is_file():
            return problem
        try:
            self._full_size_images(splits[0])
        except DataError as error:
            return str(error)
        remark = f"does not hold the published images (checksum differs: a converted copy?); {USABLE}"
        return f"{self._path(splits[0])} {remark}"

    def _needs(self, stored: StoredFile, split: SplitName) -> bool:
        return stored.name in (FOLDER + _name(split, "cat"), FOLDER + _name(split, "info"))

    def _load(self, split: SplitName) -> Split:
        labels, factors = self._annotations(split)
        rows = self._rows(split, factors)
        images = self._images(split)[rows.numpy()][:, self.channels]
        return Split(torch.from_numpy(np.ascontiguousarray(images)), labels[rows])

    def _annotations(self, split: SplitName) -> tuple[Int64[Tensor, " N"], Int64[Tensor, "N 4"]]:
        """Read labels and factors of all images of a split, verified."""
        paths = self._verified(split)
        classes, factors = paths[_name(split, "cat")], paths[_name(split, "info")]
        values = [tuple(range(len(self.classes))), *self.setup.values(split)]
        rows = np.empty((prod(map(len, values)), len(values)), np.int64)
        rows[:, 0] = open_norb(classes, dtype="int32", shape=rows[:, 0].shape)
        rows[:, 1:] = open_norb(factors, dtype="int32", shape=rows[:, 1:].shape)
        table = torch.from_numpy(rows)
        check_values(classes, table[:, :1], ["class"], values[:1])
        check_values(factors, table[:, 1:], FACTORS, values[1:])
        distinct = table.unique(dim=0)
        if len(distinct) < len(table):
            raise DataError(
                f"{factors}: must have each combination of class, {', '.join(FACTORS)} once, {len(table)} in "
                f"all, got {len(distinct)} of them"
            )
        return table[:, 0], table[:, 1:]

    def _rows(self, split: SplitName, factors: Int64[Tensor, "N 4"]) -> Int64[Tensor, " M"]:
        """Return the rows of the images with the views of the settings."""
        views = "familiar" if split == "train" else self.test_views
        if self.viewpoint is None or views == "all":
            return torch.arange(len(factors))
        codes = factors[:, FACTORS.index(self.viewpoint)]
        familiar = torch.isin(codes, torch.tensor(FAMILIAR[self.viewpoint]))
        return (familiar if views == "familiar" else ~familiar).nonzero().flatten()

    def _split_rows(self, factors: Int64[Tensor, "N 4"]) -> tuple[Int64[Tensor, " T"], Int64[Tensor, " V"]]:
        """Return the rows for training and those for validation."""
        is_validation = torch.isin(factors[:, FACTORS.index("instance")], torch.tensor(self.held_out))
        return (~is_validation).nonzero().flatten(), is_validation.nonzero().flatten()

    def _images(self, split: SplitName) -> NDArray[np.uint8]:
        """Return all images of a split from both cameras, at their size in memory."""
        full, (height, width) = self._full_size_images(split), self.file_shape[1:]
        if full.shape[2:] == (height, width):
            return full
        path = self._path(split)
        shape = (*full.shape[:2], height, width)
        return cached(
            path.with_name(f"cache-{split}-{height}x{width}.bytes"),
            key=f"{REDUCTION} {file_fingerprint(path)}",
            shape=shape,
            compute=lambda: self._resize(full, shape),
        )

    def _resize(self, full: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
        small = np.empty(shape, np.uint8)
        for start in range(0, len(full), RESIZE_CHUNK):
            chunk = torch.from_numpy(np.array(full[start : start + RESIZE_CHUNK]))
            small[start : start + RESIZE_CHUNK] = self.preprocess.resize_all(chunk).numpy()
        return small

    def _full_size_images(self, split: SplitName) -> NDArray[np.uint8]:
        """Return all images of a split at their published size, read from disk on access."""
        count = len(self.classes) * prod(map(len, self.setup.values(split)))
        return open_norb(self._path(split), dtype="uint8", shape=(count, 2, self.setup.side, self.setup.side))

    def _has_published_images(self, split: SplitName) -> bool:
        path = self._path(split)
        md5 = cached(
            path.with_name(f"cache-{split}-md5.bytes"),
            key=file_fingerprint(path),
            shape=(16,),
            compute=lambda: np.frombuffer(bytes.fromhex(digest(path, "md5")), np.uint8),
        )
        published = {stored.name: stored.checksum for stored in self._stored_files()}
        return published[FOLDER + path.name] == f"md5:{md5.tobytes().hex()}"

    def _path(self, split: SplitName) -> Path:
        return self.root / FOLDER / _name(split, "dat")
