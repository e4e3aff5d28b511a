"""Everything that a folder of images decides: classes, files of each split, shape, and how they are read."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from capsexp.data.decode import Reading
from capsexp.data.image_files import ENDINGS, Entry, Walk
from capsexp.data.image_splits import Layout, class_folders, find_layout
from capsexp.data.image_survey import survey
from capsexp.data.manifest import ListedSplit
from capsexp.data.preprocess import Shape
from capsexp.data.split import draw_by_name
from capsexp.errors import DataError
from capsexp.text import a_few

BackgroundChoice = Literal["auto", "white", "black"]
ByClass = dict[str, list[Entry]]


class ImageFile(NamedTuple):
    """An image file and its label."""

    path: str
    """Below the folder of the dataset, with `/` between the parts."""
    label: int
    size: int
    """In bytes."""
    modified: int = 0
    """Time of the last change, in nanoseconds."""


class FoundImages(NamedTuple):
    """All that reading the images needs to know: plain values."""

    classes: tuple[str, ...]
    files: Mapping[ListedSplit, Sequence[ImageFile]]
    """Of each split, in order. `train` is without `validation`, which may be empty."""
    file_shape: Shape
    reading: Reading
    notes: tuple[str, ...] = ()
    """Lines for the user."""


class Draws(NamedTuple):
    """How images are drawn for splits that have no folder."""

    test_share: float
    test_seed: int
    validation: int | float
    """A count, or a share; 0 for none, even if there is a folder."""
    split_seed: int


def find_images(
    folder: Path,
    draws: Draws,
    *,
    resize: tuple[int, int] | None,
    background: BackgroundChoice,
    white_level: int | float | None,
) -> FoundImages:
    """Find the images of a folder, and decide how they are read.

    Args:
        folder: `CLASS/…`, or `train/CLASS/…` with `test` or `validation` beside it; see `image_splits`.
        draws: used for a split without a folder.
        resize: see `survey`.
        background: see `survey`.
        white_level: see `survey`.

    Raises:
        DataError: the folder, a class or images are not as described, one line each.
        ValueError: the draws leave no image to train on.
    """
    if not folder.is_dir():
        kind = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"image_folder: path {folder} {kind}; it must hold one folder of images per class")
    walk = Walk(folder)
    layout = find_layout(walk, folder)
    classes = tuple(_classes(walk, layout.train))
    splits, notes = _splits(walk, layout, draws)
    entries = [entry for by_class in splits.values() for images in by_class.values() for entry in images]
    found = survey(entries, resize=resize, background=background, white_level=white_level)
    label = {name: number for number, name in enumerate(classes)}
    files = {
        split: [
            ImageFile(_below(folder, entry), label[name], entry.size, entry.modified)
            for name in classes
            for entry in by_class.get(name, [])
        ]
        for split, by_class in splits.items()
    }
    lines = (*layout.notes, *notes, *_loose(walk, folder, layout), *walk.notes(), *found.notes)
    return FoundImages(classes, files, (found.channels, *found.size), found.reading, lines)


def _classes(walk: Walk, folder: Path) -> dict[str, Path]:
    """Return the folder of each class of the training split."""
    classes = class_folders(walk, folder)
    if len(classes) >= 2:
        return classes
    content = f"only the class {next(iter(classes))}" if classes else "no class folder"
    inner = next(iter(classes.values()), None)
    hint = f"; did you mean dataset.path={inner}?" if inner and len(walk.listing(inner).folders) > 1 else ""
    raise DataError(
        f"image_folder: {folder} has {content}; at least two are needed, one folder per class{hint}"
    )


def _splits(walk: Walk, layout: Layout, draws: Draws) -> tuple[dict[ListedSplit, ByClass], list[str]]:
    """Return the images of each split by class, and lines for the user."""
    train = _images(walk, _classes(walk, layout.train))
    notes = []
    if layout.test is not None:
        test = _images(walk, _known_classes(walk, layout, layout.test))
    else:
        train, test = _without(train, _draw_test(train, layout.train, draws))
        if layout.is_divided:
            notes.append(f"test split: a share of {draws.test_share} of each class in {layout.train.name}")
    if layout.validation is None:
        train, validation = _without(train, _draw_validation(train, layout.train, draws))
    elif draws.validation == 0:
        validation = {}
        notes.append(f"{layout.validation.name} is not used: dataset.validation=0")
    else:
        validation = _images(walk, _known_classes(walk, layout, layout.validation))
        notes.append(f"validation images come from {layout.validation.name}; dataset.validation is not used")
    return {"train": train, "validation": validation, "test": test}, notes


def _loose(walk: Walk, folder: Path, layout: Layout) -> list[str]:
    """Return a line about images that are in no class folder."""
    places = {folder, *(path for path in (layout.train, layout.validation, layout.test) if path is not None)}
    paths = [entry.path for place in sorted(places) for entry in walk.listing(place).images]
    return [f"not used, being in no class folder: {a_few(paths)}"] if paths else []


def _known_classes(walk: Walk, layout: Layout, folder: Path) -> dict[str, Path]:
    classes = class_folders(walk, folder)
    if unknown := set(classes) - set(class_folders(walk, layout.train)):
        raise DataError(
            f"image_folder: {folder} has classes that {layout.train} does not have: "
            f"{', '.join(sorted(unknown))}"
        )
    return classes


def _images(walk: Walk, classes: Mapping[str, Path]) -> ByClass:
    images = {name: list(walk.images(path)) for name, path in classes.items()}
    if empty := [str(classes[name]) for name, found in images.items() if not found]:
        raise DataError(f"image_folder: no images in {', '.join(empty)} (looked for {', '.join(ENDINGS)})")
    return images


def _draw_test(train: ByClass, folder: Path, draws: Draws) -> set[str]:
    drawn: set[str] = set()
    for name, entries in train.items():
        if len(entries) < 2:
            raise DataError(
                f"image_folder: a test share of {draws.test_share} leaves no image of the class {name} for "
                "training"
            )
        drawn |= _draw([entries], folder, draws.test_share, draws.test_seed, "test_share")
    return drawn


def _draw_validation(train: ByClass, folder: Path, draws: Draws) -> set[str]:
    if draws.validation == 0:
        return set()
    return _draw(train.values(), folder, draws.validation, draws.split_seed, "validation")


def _draw(
    classes: Iterable[Sequence[Entry]], folder: Path, amount: int | float, seed: int, purpose: str
) -> set[str]:
    """Return the paths of the entries that are drawn, by their paths below the folder of the classes."""
    names = [{_below(folder, entry): entry.path for entry in entries} for entries in classes]
    drawn = draw_by_name([list(of_class) for of_class in names], amount=amount, seed=seed, purpose=purpose)
    return {path for of_class in names for name, path in of_class.items() if name in drawn}


def _without(images: ByClass, drawn: set[str]) -> tuple[ByClass, ByClass]:
    """Return the images that are not drawn, and those that are."""
    rest = {name: [entry for entry in images[name] if entry.path not in drawn] for name in images}
    taken = {name: [entry for entry in images[name] if entry.path in drawn] for name in images}
    return rest, taken


def _below(folder: Path, entry: Entry) -> str:
    return Path(entry.path).relative_to(folder).as_posix()
