"""A user's own images: one folder per class."""

import dataclasses
import weakref
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capsexp.data.dataset import Dataset
from capsexp.data.decode import Reading
from capsexp.data.find_images import BackgroundChoice, Draws, FoundImages, find_images
from capsexp.data.image_manifest import added_files, classes_now, found_in, listed_now
from capsexp.data.image_reader import ReadImages, read_images
from capsexp.data.image_survey import LOST
from capsexp.data.manifest import SPLITS, ListedSplit, Manifest
from capsexp.data.preprocess import Preprocess
from capsexp.data.split import Split, SplitName
from capsexp.data.threads import refuse
from capsexp.errors import DataError, require_literal, require_positive
from capsexp.text import a_few


class ImageFolder(Dataset):
    """Images whose size, channels and classes are read from the files.

    Either `path/train/CLASS/…` with `path/test/CLASS/…` or `path/validation/CLASS/…` or both, under any of
    their usual names, or `path/CLASS/…`. Images for a split without a folder are drawn from the training
    images, each by its own name, so that added images move no others. Folders inside a class folder belong to
    that class. Hidden files and folders are skipped, and files without the ending of an image are counted.
    Classes are in alphabetical order.

    One channel if every image is grayscale, otherwise three. Gray of more than 8 bits is scaled by one value
    for all images; palettes become colors; transparent areas become white, or black if images would lose
    their contrast; the EXIF orientation of a photograph is applied; of an animation the first frame is read.

    Args:
        path: the folder (`~` is expanded).
        test_share: share of each class drawn for testing, in (0, 1), if there is no folder of test images.
        test_seed: chooses which.
        background: what is behind transparent pixels; `auto` is white, or black if images lose their contrast
            on white.
        white_level: the value of white in images of 16 or 32 bits and in floating point; None: the smallest
            of 1, 255, 1023, 4095, 16383, 65535 (…) that no image exceeds.
        preprocess: see `Dataset`. Images of different sizes need its `resize`.
        validation: see `Dataset`; if there is a folder of validation images, only whether it is 0 matters.
        split_seed: see `Dataset`.

    Raises:
        DataError: the folder, a class or an image is not as described.
        ValueError: a setting is out of range.
    """

    name = "image_folder"
    folder: Path
    has_known_files = lists_files = True

    def __init__(
        self,
        *,
        path: str,
        test_share: float,
        test_seed: int,
        background: BackgroundChoice,
        white_level: int | float | None,
        preprocess: Preprocess,
        validation: int | float,
        split_seed: int,
    ) -> None:
        if not 0 < test_share < 1:
            raise ValueError(f"test_share must be in (0, 1), got {test_share}")
        if not path.strip():
            raise ValueError("path must name a folder, got an empty text")
        require_literal(BackgroundChoice, background=background)
        require_positive(white_level=white_level)
        folder = Path(path).expanduser()
        found = find_images(
            folder,
            Draws(test_share, test_seed, validation, split_seed),
            resize=preprocess.resize,
            background=background,
            white_level=white_level,
        )
        self._use(folder, found, preprocess=preprocess, validation=validation, split_seed=split_seed)

    @classmethod
    def from_manifest(cls, *, manifest: Manifest, **settings: Any) -> "ImageFolder":
        """Return the dataset of a run: with the classes and the files that it stored; see `Dataset`."""
        dataset = cls.__new__(cls)
        dataset.stored = manifest
        names = ("preprocess", "validation", "split_seed")
        folder = Path(settings["path"]).expanduser()
        dataset._use(folder, found_in(manifest), **{name: settings[name] for name in names})
        return dataset

    def _use(
        self,
        folder: Path,
        found: FoundImages,
        *,
        preprocess: Preprocess,
        validation: int | float,
        split_seed: int,
    ) -> None:
        self.folder, self.found = folder, found
        self.classes = found.classes
        self.file_shape = (found.file_shape[0], *(preprocess.resize or found.file_shape[1:]))
        super().__init__(preprocess=preprocess, validation=validation, split_seed=split_seed)
        self._seen = _seen_before(self)

    def manifest(self, splits: Sequence[ListedSplit] = SPLITS) -> Manifest:
        """Return the files of some splits with their checksums, and the classes, as they are now."""
        files = listed_now(self.folder, self.found.files, splits)
        all_there = all(len(files[split]) == len(self.found.files.get(split, ())) for split in splits)
        return dataclasses.replace(
            super().manifest(splits),
            classes=self.classes if all_there else classes_now(self.folder) or self.classes,
            file_shape=self.found.file_shape,
            reading=self.reading._asdict(),
            files=files,
        )

    def caveats(self) -> list[str]:
        """Return a line if the folder has images that the run does not know."""
        added = added_files(self.folder, self.found.files) if self.stored is not None else []
        if not added:
            return []
        count = "1 image was" if len(added) == 1 else f"{len(added)} images were"
        return [f"{self.name}: {count} added to {self.folder} later and not used: {a_few(added)}"]

    def require_files(self) -> None:
        """Decode every image of every split, and keep those to train on until they are read.

        Raises:
            DataError: a line for each image that cannot be decoded; or no image has any contrast.
        """
        self.require_stored(SPLITS)
        self._look_at("train", "validation", "test")

    def problems(self) -> list[str]:
        """Return one line for every image that cannot be decoded, or one if no image has any contrast."""
        try:
            self.require_files()
        except DataError as error:
            return [problem.removeprefix(f"{self.name}: ") for problem in error.problems]
        return []

    def read_training(self) -> tuple[Split, Split]:
        """Read the training images and the validation images.

        Raises:
            DataError: a line for each image that cannot be decoded; or no image has any contrast.
        """
        self.require_stored(("train", "validation"))
        self._look_at("train", "validation")
        return self._read("train"), self._read("validation")

    @property
    def reading(self) -> Reading:
        """How the images become bytes; `capsexp predict` reads others in the same way."""
        return self.found.reading

    def check_test(self) -> int:
        """Decode the test images, unless that is done already, and return their number.

        Raises:
            DataError: a line for each image that cannot be decoded.
        """
        self.require_stored(("test",))
        self._look_at("test")
        return len(self.found.files["test"])

    def notes(self) -> list[str]:
        """Return lines about how the folder is read, and about images that a check has found strange."""
        return [f"{self.name}: {line}" for line in (*self.found.notes, *self._seen.notes())]

    def _load(self, split: SplitName) -> Split:
        return self._read(split)

    def _look_at(self, *splits: ListedSplit) -> None:
        """Decode the splits that were not decoded before."""
        problems = []
        for split in splits:
            if split not in self._seen.plain:
                result = self._decode(split, keep=split != "test")
                problems += result.problems
                if result.problems:
                    continue
                self._seen.plain[split] = result.plain
                self._seen.contrast = max(self._seen.contrast, result.contrast)
                self._seen.digests[split] = result.digests
                if split != "test":
                    self._seen.images[split] = result.images
        refuse(problems)
        plain = {path: color for split in splits for path, color in self._seen.plain[split].items()}
        count = sum(len(self.found.files[split]) for split in splits)
        if "train" in splits and len(plain) == count and len(set(plain.values())) == 1:
            color = "; ".join([f"color {next(iter(plain.values()))}", *self.found.notes])
            raise DataError(
                f"image_folder: no image in {self.folder} has any contrast: all pixels of all {count} images "
                f"have the {color}"
            )

    def _read(self, split: ListedSplit) -> Split:
        images = self._seen.images.pop(split, None)
        if images is None:
            result = self._decode(split, keep=True)
            refuse(result.problems)
            images = result.images
        return Split(
            images, torch.tensor([file.label for file in self.found.files[split]], dtype=torch.int64)
        )

    def _decode(self, split: ListedSplit, *, keep: bool) -> ReadImages:
        paths = [str(self.folder / file.path) for file in self.found.files[split]]
        return read_images(paths, self.raw_shape, self.found.reading, self.preprocess, keep=keep)


class _Seen:
    """What was seen of a folder's images."""

    def __init__(self) -> None:
        self.plain: dict[ListedSplit, dict[str, tuple[int, ...]]] = {}
        """The images of one color, of each split that was decoded."""
        self.contrast = 0
        """The largest difference of two bytes of one channel in one image."""
        self.digests: dict[ListedSplit, dict[bytes, str]] = {}
        """The other images, by a hash of their pixels."""
        self.images: dict[ListedSplit, Tensor] = {}
        """Decoded images that are still to be read. Each split is taken out once, to save memory."""

    def notes(self) -> list[str]:
        """Return lines about images without contrast, and about copies in two splits."""
        plain = [path for split in self.plain.values() for path in split]
        lines = [f"images that show only one color: {len(plain)} ({a_few(plain)})"] if plain else []
        if 0 < self.contrast < LOST:
            lines.append(
                f"images have little contrast: no two pixels of one differ by more than {self.contrast}"
            )
        return lines + self._copies()

    def _copies(self) -> list[str]:
        """Return a line about test and validation images that are training images, too."""
        train = self.digests.get("train", {})
        others = [self.digests[split] for split in self.digests if split != "train"]
        paths = [other[digest] for other in others for digest in other if digest in train]
        text = (
            f"images for validation or testing that are training images, too: {len(paths)} ({a_few(paths)})"
        )
        return [text] if paths else []


_SEEN: "weakref.WeakValueDictionary[Hashable, _Seen]" = weakref.WeakValueDictionary()
"""A command builds its dataset twice, for the checks and for the run: images are decoded once for both."""


def _seen_before(dataset: ImageFolder) -> _Seen:
    """Return what another object for the same, unchanged files has seen, or nothing."""
    found = dataset.found
    files = tuple((split, tuple(files)) for split, files in found.files.items())
    key = (str(dataset.folder), files, found.reading, dataset.raw_shape)
    seen = _SEEN.get(key)
    if seen is None:
        seen = _SEEN[key] = _Seen()
    return seen
