"""A user's own pictures: one folder per class."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from capsexp.data.dataset import Dataset
from capsexp.data.preprocess import Preprocess
from capsexp.data.split import Split, SplitName, stratified
from capsexp.errors import DataError

GREY_MODES = {"1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I"}
COLOUR_MODES = {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
CAMERA_FORMATS = {"JPEG", "MPO", "TIFF", "WEBP"}
"""Whose EXIF data are heeded. In a PNG they may follow the pixels, so a header alone would not tell."""

ORIENTATION = 0x0112
"""EXIF tag; 5 … 8 exchange height and width."""


class _Picture(NamedTuple):
    path: str
    label: int


class _Header(NamedTuple):
    path: str
    grey: bool
    height: int
    width: int


class ImageFolder(Dataset):
    """Pictures of any size, channels and number of classes, found from the files.

    Either `path/train/CLASS/…` and `path/test/CLASS/…`, or `path/CLASS/…`, of which a share of each class
    is set aside for testing. Folders inside a class folder count as part of it. Files that are no pictures
    by their ending, and names that start with a dot, are passed over. Classes are in alphabetical order.

    One channel if every picture is grey, otherwise three. 16 bits are cut to their upper 8; palettes become
    colours; transparent parts become white; a photograph is turned as its EXIF data say.

    Args:
        path: the folder (`~` is expanded).
        test_share: share of each class set aside for testing, in (0, 1), without `train` and `test` folders.
        test_seed: chooses which ones.
        preprocess: see `Dataset`. Pictures of different sizes need its `resize`.
        validation: see `Dataset`.
        split_seed: see `Dataset`.

    Raises:
        DataError: the folder, a class or a picture is not as described.
        ValueError: `test_share` is out of its range.
    """

    name = "image_folder"

    def __init__(
        self,
        *,
        path: str,
        test_share: float,
        test_seed: int,
        preprocess: Preprocess,
        validation: int | float,
        split_seed: int,
    ) -> None:
        if not 0 < test_share < 1:
            raise ValueError(f"test_share must be in (0, 1), got {test_share}")
        self.folder = Path(path).expanduser()
        self.classes, self._pictures = _find(self.folder, test_share, test_seed)
        headers = [_header(picture.path) for part in self._pictures.values() for picture in part]
        channels = 1 if all(header.grey for header in headers) else 3
        self.stored_shape = (channels, *(preprocess.resize or _common_size(headers)))
        super().__init__(preprocess=preprocess, validation=validation, split_seed=split_seed)

    def problems(self) -> list[str]:
        """Every picture that cannot be decoded, one line each."""
        found = []
        for picture in (p for part in self._pictures.values() for p in part):
            try:
                decode(picture.path, self.stored_shape[0])
            except DataError as error:
                found.append(str(error))
        return found

    def _load(self, part: SplitName) -> Split:
        pictures = self._pictures[part]
        # Resized one by one: the whole set at its size on disk may not fit into memory, or into one tensor.
        images = [
            self.preprocess.resize_all(decode(picture.path, self.stored_shape[0])[None])
            for picture in pictures
        ]
        return Split(torch.cat(images), torch.tensor([picture.label for picture in pictures]))


def _find(
    folder: Path, test_share: float, test_seed: int
) -> tuple[tuple[str, ...], dict[SplitName, list[_Picture]]]:
    """The classes, and the pictures of each part."""
    if not folder.is_dir():
        kind = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"image_folder: path {folder} {kind}; it must hold one folder of pictures per class")
    train, test = folder / "train", folder / "test"
    if train.is_dir() != test.is_dir():
        there, absent = (train, test) if train.is_dir() else (test, train)
        raise DataError(f"image_folder: {there} exists but {absent} does not; give both, or {folder}/CLASS/…")
    if not train.is_dir():
        index = _index(folder)
        return tuple(index), _slices(_scan(folder, index), index, test_share, test_seed)
    index = _index(train)
    if unknown := set(_class_names(test)) - set(index):
        raise DataError(
            f"image_folder: {test} has classes that {train} has not: {', '.join(sorted(unknown))}"
        )
    tested = {name: index[name] for name in _class_names(test)}
    return tuple(index), {"train": _scan(train, index), "test": _scan(test, tested)}


def _class_names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _index(folder: Path) -> dict[str, int]:
    """Label of each class."""
    names = _class_names(folder)
    if len(names) < 2:
        found = f"only the class {names[0]}" if names else "no class folder"
        raise DataError(f"image_folder: {folder} has {found}; at least two are needed, one folder per class")
    return {name: label for label, name in enumerate(names)}


def _scan(folder: Path, index: dict[str, int]) -> list[_Picture]:
    found = make_dataset(str(folder), index, extensions=IMG_EXTENSIONS, allow_empty=True)
    pictures = [_Picture(*item) for item in found if not Path(item[0]).name.startswith(".")]
    filled = {picture.label for picture in pictures}
    if empty := [str(folder / name) for name, label in index.items() if label not in filled]:
        raise DataError(
            f"image_folder: no pictures in {', '.join(empty)} (looked for {', '.join(IMG_EXTENSIONS)})"
        )
    return pictures


def _slices(
    pictures: list[_Picture], index: dict[str, int], share: float, seed: int
) -> dict[SplitName, list[_Picture]]:
    labels = torch.tensor([picture.label for picture in pictures])
    chosen = stratified(labels, share=share, seed=seed)
    for name, label in index.items():
        if bool(chosen[labels == label].all()):
            raise DataError(
                f"image_folder: a test share of {share} leaves no picture of the class {name} for training"
            )
    parts: dict[SplitName, list[_Picture]] = {"train": [], "test": []}
    for picture, is_test in zip(pictures, chosen.tolist(), strict=True):
        parts["test" if is_test else "train"].append(picture)
    return parts


def _header(path: str) -> _Header:
    """What the file says of itself; the pixels are not read."""
    try:
        with Image.open(path) as image:
            (width, height), mode = image.size, image.mode
            if image.format in CAMERA_FORMATS and image.getexif().get(ORIENTATION, 1) >= 5:
                width, height = height, width
    except Exception as error:  # PIL raises many kinds for a file that it cannot read
        raise DataError(f"image_folder: {path} cannot be read as a picture: {error}") from error
    if mode not in GREY_MODES | COLOUR_MODES:
        raise DataError(f"image_folder: {path} has pixels of kind {mode}; convert it to 8 or 16 bits")
    return _Header(path, mode in GREY_MODES, height, width)


def _common_size(headers: Sequence[_Header]) -> tuple[int, int]:
    first = headers[0]
    for header in headers:
        if (header.height, header.width) != (first.height, first.width):
            raise DataError(
                f"image_folder: pictures differ in size (height x width): {first.path} is "
                f"{first.height}x{first.width}, {header.path} is {header.height}x{header.width}; "
                "set dataset.preprocess.resize=[HEIGHT,WIDTH]"
            )
    return (first.height, first.width)


def decode(path: str, channels: int) -> UInt8[Tensor, "C H W"]:
    """A picture file as bytes with 1 or 3 channels, converted as `ImageFolder` says.

    Raises:
        DataError: it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            turned = ImageOps.exif_transpose(image) if image.format in CAMERA_FORMATS else image
            pixels = np.array(_converted(turned, channels))
    except Exception as error:  # PIL raises many kinds for a file that it cannot decode
        raise DataError(f"{path} is damaged and cannot be decoded: {error}") from error
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


def _converted(image: Image.Image, channels: int) -> Image.Image:
    """The picture in bytes with 1 or 3 channels."""
    if image.mode.startswith("I"):
        upper = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(upper.clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image)
    return image.convert("L" if channels == 1 else "RGB")
