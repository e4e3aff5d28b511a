"""smallNORB: toys photographed by two cameras from many sides, in several lights; 96x96, grey."""

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

from capsexp.data.cache import cached, fingerprint
from capsexp.data.download import Progress, RemoteFile, StoredFile, digest
from capsexp.data.norb_file import open_norb
from capsexp.data.preprocess import RESIZE_CHUNK, Preprocess
from capsexp.data.published import PublishedDataset
from capsexp.data.split import Split, SplitName
from capsexp.errors import DataError

URL = "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/"
FOLDER = "smallnorb/"
STEM: dict[SplitName, str] = {
    "train": "smallnorb-5x46789x9x18x6x2x96x96-training-",
    "test": "smallnorb-5x01235x9x18x6x2x96x96-testing-",
}
CHECKSUMS: dict[tuple[SplitName, str], tuple[str, str]] = {  # of the .mat.gz, and of the .mat inside it
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
"""Viewpoints of the training pictures in Table 2 of Hinton et al. 2018."""

REDUCTION = "reduction-1"
"""SplitName of a cache's key; another number for another way to make pictures smaller."""


class Setup(NamedTuple):
    """What was photographed: in each part all instances of all classes, from everywhere, in every light."""

    instances: dict[SplitName, tuple[int, ...]]
    elevations: tuple[int, ...]
    """0 for 30 degrees above the horizon, then steps of 5 degrees."""
    azimuths: tuple[int, ...]
    """In units of 10 degrees."""
    lightings: tuple[int, ...]
    side: int
    """Height and width of a picture."""

    def values(self, part: SplitName) -> tuple[tuple[int, ...], ...]:
        """Those that each of `FACTORS` takes."""
        return (self.instances[part], self.elevations, self.azimuths, self.lightings)


def _name(part: SplitName, kind: str) -> str:
    return f"{STEM[part]}{kind}.mat"


def _file(part: SplitName, kind: str, packed: str, unpacked: str) -> RemoteFile:
    name = _name(part, kind)
    return RemoteFile(f"{FOLDER}{name}.gz", f"{URL}{name}.gz", packed, (StoredFile(FOLDER + name, unpacked),))


class SmallNORB(PublishedDataset):
    """24,300 training and 24,300 test pairs of pictures in 5 classes, each with 5 instances per part.

    Reduced pictures are kept beside the files as `cache-…`, which may be deleted. Classes and factors must be
    the published ones to the byte; pictures that are not (a converted copy) are read, with a remark.

    Args:
        root: see `PublishedDataset`.
        download: see `PublishedDataset`.
        cameras: `stereo` for two channels, or one of them.
        validation_instance: the training instance, of every class, that is set aside for validation.
        viewpoint: what is limited to familiar values in training: `azimuth` (300 … 40 degrees, a third),
            `elevation` (the lowest three, a third), or nothing.
        test_views: test pictures with familiar or novel values of it, or all.
        preprocess: see `Dataset`.

    Raises:
        ValueError: no such training instance; familiar or novel views of nothing.
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
    files = tuple(_file(part, kind, *checksums) for (part, kind), checksums in CHECKSUMS.items())

    def __init__(
        self,
        *,
        root: str,
        download: bool,
        cameras: Literal["stereo", "left", "right"],
        validation_instance: int | None,
        viewpoint: Literal["azimuth", "elevation"] | None,
        test_views: Literal["all", "familiar", "novel"],
        preprocess: Preprocess,
    ) -> None:
        instances = self.setup.instances["train"]
        if validation_instance is not None and validation_instance not in instances:
            named = ", ".join(map(str, instances))
            raise ValueError(f"validation_instance must be null or one of {named}, got {validation_instance}")
        if viewpoint is None and test_views != "all":
            raise ValueError(f"test_views must be 'all' where viewpoint is null, got {test_views!r}")
        self.channels, self.validation_instance = CAMERAS[cameras], validation_instance
        self.viewpoint = viewpoint
        self.test_views: Literal["all", "familiar", "novel"] = test_views
        size = preprocess.resize or (self.setup.side, self.setup.side)
        self.stored_shape = (self.channels.stop - self.channels.start, *size)
        # A slice by chance would hold neighbouring views of toys that training has seen.
        super().__init__(root=root, download=download, preprocess=preprocess, validation=0, split_seed=0)

    def read_training(self) -> tuple[Split, Split]:
        """The training part without the instance set aside for validation, and that instance's pictures."""
        split = self.read("train")
        training, validation = self._division(self.factors("train"))
        return split.take(training), split.take(validation)

    def familiar(self) -> Split | None:
        """Test toys from the viewpoints of training; None without a `viewpoint`."""
        return None if self.viewpoint is None else self.with_test_views("familiar").read("test")

    def with_test_views(self, views: Literal["all", "familiar", "novel"]) -> "SmallNORB":
        """The same set with other views of the test toys."""
        other = copy.copy(self)
        other.test_views = views
        return other

    def factors(self, part: SplitName) -> Int64[Tensor, "N 4"]:
        """The `FACTORS` of the pictures that `read(part)` gives, in their order.

        As in the files: the number of the toy in its class; the elevation 0 … 8 for 30 … 70 degrees; the
        azimuth in units of 10 degrees; the lighting 0 … 5. `Batch.indices` are the rows.
        """
        _, factors = self._annotations(part)
        return factors[self._chosen(part, factors)]

    def training_factors(self) -> tuple[Int64[Tensor, "N 4"], Int64[Tensor, "M 4"]]:
        """The same for each of the two splits that `read_training` gives."""
        factors = self.factors("train")
        training, validation = self._division(factors)
        return factors[training], factors[validation]

    def prepare(self, progress: Progress) -> None:
        """Get what is missing, then make the reduced pictures.

        Raises:
            DataError: a file cannot be had, or is not what it should be.
        """
        super().prepare(progress)
        for part in STEM:
            progress(f"{part} pictures", 0, 0)
            self._pictures(part)

    def caveats(self) -> list[str]:
        """A line where pictures are not the published ones."""
        parts: dict[str, SplitName] = {"training": "train", "test": "test"}
        others = [name for name, part in parts.items() if not self._has_published_pictures(part)]
        if not others:
            return []
        return [
            f"{self.name}: the {' and '.join(others)} pictures are not the published ones "
            "(checksum differs: a converted copy?); say so beside any figure"
        ]

    def _problem(self, stored: StoredFile) -> str:
        problem = super()._problem(stored)
        parts = [part for part in STEM if self._path(part) == self.root / stored.name]
        if not problem or not parts or not self._path(parts[0]).is_file():
            return problem
        try:
            self._full_pictures(parts[0])
        except DataError as error:
            return str(error)
        return (
            f"{self._path(parts[0])} does not hold the published pictures (checksum differs: a converted "
            "copy?); it can be used, but say so beside any figure"
        )

    def _needs(self, stored: StoredFile, part: SplitName) -> bool:
        return stored.name in (FOLDER + _name(part, "cat"), FOLDER + _name(part, "info"))

    def _load(self, part: SplitName) -> Split:
        labels, factors = self._annotations(part)
        chosen = self._chosen(part, factors)
        images = self._pictures(part)[chosen.numpy()][:, self.channels]
        return Split(torch.from_numpy(np.ascontiguousarray(images)), labels[chosen])

    def _annotations(self, part: SplitName) -> tuple[Int64[Tensor, " N"], Int64[Tensor, "N 4"]]:
        """Classes and factors of all pictures of a part, verified."""
        paths = self._verified(part)
        classes, factors = paths[_name(part, "cat")], paths[_name(part, "info")]
        values = [tuple(range(len(self.classes))), *self.setup.values(part)]
        rows = np.empty((prod(map(len, values)), len(values)), np.int64)
        rows[:, 0] = open_norb(classes, dtype="int32", shape=rows[:, 0].shape)
        rows[:, 1:] = open_norb(factors, dtype="int32", shape=rows[:, 1:].shape)
        table = torch.from_numpy(rows)
        _require_values(classes, table[:, :1], ["class"], values[:1])
        _require_values(factors, table[:, 1:], FACTORS, values[1:])
        distinct = table.unique(dim=0)
        if len(distinct) < len(table):
            raise DataError(
                f"{factors}: must have each combination of class, {', '.join(FACTORS)} once, {len(table)} in "
                f"all, got {len(distinct)} of them"
            )
        return table[:, 0], table[:, 1:]

    def _chosen(self, part: SplitName, factors: Int64[Tensor, "N 4"]) -> Int64[Tensor, " M"]:
        """Rows of the pictures whose views are asked for."""
        views = "familiar" if part == "train" else self.test_views
        if self.viewpoint is None or views == "all":
            return torch.arange(len(factors))
        codes = factors[:, FACTORS.index(self.viewpoint)]
        familiar = torch.isin(codes, torch.tensor(FAMILIAR[self.viewpoint]))
        return (familiar if views == "familiar" else ~familiar).nonzero().flatten()

    def _division(self, factors: Int64[Tensor, "N 4"]) -> tuple[Int64[Tensor, " T"], Int64[Tensor, " V"]]:
        """Rows for training, and those for validation."""
        aside = torch.zeros(len(factors), dtype=torch.bool)
        if self.validation_instance is not None:
            aside = factors[:, FACTORS.index("instance")] == self.validation_instance
        return (~aside).nonzero().flatten(), aside.nonzero().flatten()

    def _pictures(self, part: SplitName) -> NDArray[np.uint8]:
        """All pictures of a part by both cameras, at the size that they have in memory."""
        full, (height, width) = self._full_pictures(part), self.stored_shape[1:]
        if full.shape[2:] == (height, width):
            return full
        path = self._path(part)
        shape = (*full.shape[:2], height, width)
        return cached(
            path.with_name(f"cache-{part}-{height}x{width}.bytes"),
            key=f"{REDUCTION} {fingerprint(path)}",
            shape=shape,
            compute=lambda: self._reduced(full, shape),
        )

    def _reduced(self, full: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
        small = np.empty(shape, np.uint8)
        for start in range(0, len(full), RESIZE_CHUNK):
            chunk = torch.from_numpy(np.array(full[start : start + RESIZE_CHUNK]))
            small[start : start + RESIZE_CHUNK] = self.preprocess.resize_all(chunk).numpy()
        return small

    def _full_pictures(self, part: SplitName) -> NDArray[np.uint8]:
        """All pictures of a part as they are published; on the disk until they are looked at."""
        count = len(self.classes) * prod(map(len, self.setup.values(part)))
        return open_norb(self._path(part), dtype="uint8", shape=(count, 2, self.setup.side, self.setup.side))

    def _has_published_pictures(self, part: SplitName) -> bool:
        path = self._path(part)
        found = cached(
            path.with_name(f"cache-{part}-md5.bytes"),
            key=fingerprint(path),
            shape=(16,),
            compute=lambda: np.frombuffer(bytes.fromhex(digest(path, "md5")), np.uint8),
        )
        published = {stored.name: stored.checksum for stored in self._stored()}
        return published[FOLDER + path.name] == f"md5:{found.tobytes().hex()}"

    def _path(self, part: SplitName) -> Path:
        return self.root / FOLDER / _name(part, "dat")


def _require_values(
    path: Path, table: Int64[Tensor, "N F"], names: Sequence[str], values: Sequence[Sequence[int]]
) -> None:
    """Each column takes exactly its values.

    Raises:
        DataError: one takes another, or not all.
    """
    for column, name, allowed in zip(table.T, names, values, strict=True):
        found = column.unique().tolist()
        if found != list(allowed):
            raise DataError(f"{path}: the values of {name} must be {list(allowed)}, got {found[:40]}")
