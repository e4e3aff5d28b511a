"""A user's own images: one folder per class."""

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

GRAY_MODES = {"1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I"}
COLOR_MODES = {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
CAMERA_FORMATS = {"JPEG", "MPO", "TIFF", "WEBP"}
"""Formats whose EXIF orientation is applied. A PNG may have EXIF data after its pixels."""

ORIENTATION = 0x0112
"""EXIF tag; the values 5 … 8 swap height and width."""


class ImageFile(NamedTuple):
    """An image file and its label."""

    path: str
    label: int


class _Header(NamedTuple):
    path: str
    is_gray: bool
    height: int
    width: int


class ImageFolder(Dataset):
    """Images whose size, channels and classes are read from the files.

    Either `path/train/CLASS/…` and `path/test/CLASS/…`, or `path/CLASS/…`, of which a share of each class
    is set aside for testing. Folders inside a class folder belong to that class. Files without the suffix of
    an image and names that start with a dot are skipped. Classes are in alphabetical order.

    One channel if every image is grayscale, otherwise three. 16 bits are cut to their upper 8; palettes
    become colors; transparent areas become white; the EXIF orientation of a photograph is applied.

    Args:
        path: the folder (`~` is expanded).
        test_share: share of each class set aside for testing, in (0, 1), if there is no `test` folder.
        test_seed: chooses which ones.
        preprocess: see `Dataset`. Images of different sizes need its `resize`.
        validation: see `Dataset`.
        split_seed: see `Dataset`.

    Raises:
        DataError: the folder, a class or an image is not as described.
        ValueError: `test_share` is out of range.
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
        self.classes, self.image_files = _find(self.folder, test_share, test_seed)
        headers = [_header(file.path) for files in self.image_files.values() for file in files]
        channels = 1 if all(header.is_gray for header in headers) else 3
        self.file_shape = (channels, *(preprocess.resize or _common_size(headers)))
        super().__init__(preprocess=preprocess, validation=validation, split_seed=split_seed)

    def problems(self) -> list[str]:
        """Return one line for every image that cannot be decoded."""
        problems = []
        for file in (file for files in self.image_files.values() for file in files):
            try:
                decode(file.path, self.file_shape[0])
            except DataError as error:
                problems.append(str(error))
        return problems

    def _load(self, split: SplitName) -> Split:
        files = self.image_files[split]
        # Resized one by one: the dataset at its size on disk may not fit into memory, or into one tensor.
        images = [self.preprocess.resize_all(decode(file.path, self.file_shape[0])[None]) for file in files]
        return Split(torch.cat(images), torch.tensor([file.label for file in files]))


def _find(
    folder: Path, test_share: float, test_seed: int
) -> tuple[tuple[str, ...], dict[SplitName, list[ImageFile]]]:
    """Find the classes and the image files of each split."""
    if not folder.is_dir():
        kind = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"image_folder: path {folder} {kind}; it must hold one folder of images per class")
    train, test = folder / "train", folder / "test"
    if train.is_dir() != test.is_dir():
        present, missing = (train, test) if train.is_dir() else (test, train)
        raise DataError(
            f"image_folder: {present} exists but {missing} does not; add it, or use {folder}/CLASS/…"
        )
    if not train.is_dir():
        index = _index(folder)
        return tuple(index), _split_files(_scan(folder, index), index, test_share, test_seed)
    index = _index(train)
    if unknown := set(_class_names(test)) - set(index):
        raise DataError(
            f"image_folder: {test} has classes that {train} does not have: {', '.join(sorted(unknown))}"
        )
    test_index = {name: index[name] for name in _class_names(test)}
    return tuple(index), {"train": _scan(train, index), "test": _scan(test, test_index)}


def _class_names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _index(folder: Path) -> dict[str, int]:
    """Return the label of each class."""
    names = _class_names(folder)
    if len(names) < 2:
        content = f"only the class {names[0]}" if names else "no class folder"
        raise DataError(
            f"image_folder: {folder} has {content}; at least two are needed, one folder per class"
        )
    return {name: label for label, name in enumerate(names)}


def _scan(folder: Path, index: dict[str, int]) -> list[ImageFile]:
    items = make_dataset(str(folder), index, extensions=IMG_EXTENSIONS, allow_empty=True)
    files = [ImageFile(*item) for item in items if not Path(item[0]).name.startswith(".")]
    filled = {file.label for file in files}
    if empty := [str(folder / name) for name, label in index.items() if label not in filled]:
        raise DataError(
            f"image_folder: no images in {', '.join(empty)} (looked for {', '.join(IMG_EXTENSIONS)})"
        )
    return files


def _split_files(
    files: list[ImageFile], index: dict[str, int], share: float, seed: int
) -> dict[SplitName, list[ImageFile]]:
    labels = torch.tensor([file.label for file in files])
    chosen = stratified(labels, share=share, seed=seed)
    for name, label in index.items():
        if bool(chosen[labels == label].all()):
            raise DataError(
                f"image_folder: a test share of {share} leaves no image of the class {name} for training"
            )
    splits: dict[SplitName, list[ImageFile]] = {"train": [], "test": []}
    for file, is_test in zip(files, chosen.tolist(), strict=True):
        splits["test" if is_test else "train"].append(file)
    return splits


def _header(path: str) -> _Header:
    """Read size and mode from the header, without the pixels."""
    try:
        with Image.open(path) as image:
            (width, height), mode = image.size, image.mode
            if image.format in CAMERA_FORMATS and image.getexif().get(ORIENTATION, 1) >= 5:
                width, height = height, width
    except Exception as error:  # PIL raises many types of errors for a file that it cannot read
        raise DataError(f"image_folder: {path} cannot be read as an image: {error}") from error
    if mode not in GRAY_MODES | COLOR_MODES:
        raise DataError(f"image_folder: {path} has pixels of mode {mode}; convert it to 8 or 16 bits")
    return _Header(path, mode in GRAY_MODES, height, width)


def _common_size(headers: Sequence[_Header]) -> tuple[int, int]:
    first = headers[0]
    for header in headers:
        if (header.height, header.width) != (first.height, first.width):
            raise DataError(
                f"image_folder: images differ in size (height x width): {first.path} is "
                f"{first.height}x{first.width}, {header.path} is {header.height}x{header.width}; "
                "set dataset.preprocess.resize=[HEIGHT,WIDTH]"
            )
    return (first.height, first.width)


def decode(path: str, channels: int) -> UInt8[Tensor, "C H W"]:
    """Read an image file as bytes with 1 or 3 channels, converted as described in `ImageFolder`.

    Raises:
        DataError: the file cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image) if image.format in CAMERA_FORMATS else image
            pixels = np.array(_convert(upright, channels))
    except Exception as error:  # PIL raises many types of errors for a file that it cannot decode
        raise DataError(f"{path} is damaged and cannot be decoded: {error}") from error
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image to bytes with 1 or 3 channels."""
    if image.mode.startswith("I"):
        upper = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(upper.clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image.convert("L" if channels == 1 else "RGB")
