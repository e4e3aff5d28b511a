"""Which folders of a dataset are its splits, under any of their usual names, and which are its classes."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from capsexp.data.image_files import Walk
from capsexp.data.manifest import SPLITS, ListedSplit
from capsexp.errors import DataError
from capsexp.text import a_few

WORDS: dict[str, ListedSplit] = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation"), "validation"),
    **dict.fromkeys(("dev", "development", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "tests", "testing"), "test"),
}
FILLERS = {
    *("data", "dataset", "dir", "examples", "files", "folder", "image", "images", "img", "imgs", "photos"),
    *("pics", "picture", "pictures", "samples", "seg", "set", "sets", "split"),
}
"""Words that may stand beside a split's: training_set, seg_train, Train Data."""

TOKEN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+|\d+")

_PLAIN = {(split, "") for split in WORDS.values()}


class Layout(NamedTuple):
    """The folders that hold the classes of each split."""

    train: Path
    """The only one if the dataset is not divided."""
    validation: Path | None = None
    test: Path | None = None
    notes: tuple[str, ...] = ()
    """Lines for the user."""

    @property
    def is_divided(self) -> bool:
        """Whether there are folders of splits."""
        return self.validation is not None or self.test is not None


class SplitFolder(NamedTuple):
    """A folder whose name is that of a split."""

    path: Path
    split: ListedSplit
    rest: str
    """The other words of the name, such as `flowers` in flowers_train; empty for train and training_set."""


def split_of(name: str) -> tuple[ListedSplit, str] | None:
    """Return the split that a folder's name names, and the other words; None if it names no split.

    Case and separators do not matter, and numbers and words such as `set` and `images` do not count.
    """
    words = _words(name)
    splits = {WORDS[word] for word in words if word in WORDS}
    if splits == {"train", "validation"}:  # train_val is the training split
        splits = {"train"}
    if len(splits) != 1:
        return None
    rest = [word for word in words if word not in WORDS and word not in FILLERS and not word.isdigit()]
    return splits.pop(), " ".join(rest)


def class_folders(walk: Walk, folder: Path) -> dict[str, Path]:
    """Return the folder of each class in alphabetical order; names are in Unicode's composed form.

    Raises:
        DataError: two names differ only in how Unicode writes them.
    """
    classes: dict[str, Path] = {}
    for path in walk.listing(folder).folders:
        name = unicodedata.normalize("NFC", path.name)
        if name in classes:
            raise DataError(f"image_folder: {folder} has two folders that are both named {name}; rename one")
        classes[name] = path
    return dict(sorted(classes.items()))


def find_layout(walk: Walk, root: Path) -> Layout:
    """Find the splits of a dataset.

    Raises:
        DataError: the names of the folders do not say which split is which.
    """
    folders = walk.listing(root).folders
    named = _split_folders(walk, folders)
    if not named:
        if len(folders) > 1:
            _refuse_splits_in_classes(walk, folders)
        return Layout(root)
    others = [path for path in folders if path not in {folder.path for folder in named}]
    others = [path for path in others if walk.has_images(path)]
    holds_folders = {folder.path: bool(walk.listing(folder.path).folders) for folder in named}
    if len(named) == 1 and len(others) > 0 and named[0].split == "train" and not any(holds_folders.values()):
        return Layout(root, notes=(f"{named[0].path.name} is a class, not a split: it holds no folders",))
    return _divided(walk, root, named, others)


def _divided(walk: Walk, root: Path, named: Sequence[SplitFolder], others: Sequence[Path]) -> Layout:
    """Return the layout of a dataset with these folders of splits, and these other folders with images."""
    by_split: dict[ListedSplit, list[str]] = defaultdict(list)
    for folder in named:
        by_split[folder.split].append(folder.path.name)
    for split, names in by_split.items():
        if len(names) > 1:
            raise DataError(
                f"image_folder: {root} has several folders for the {split} split: {a_few(names)}; keep one"
            )
    if "train" not in by_split:
        raise DataError(_lonely(walk, root, named, others))
    if len(by_split) == 1:
        raise DataError(
            f"image_folder: {named[0].path} exists but {_absent(root / 'test')}; add it, or use "
            f"{root}/CLASS/…, for example dataset.path={named[0].path}"
        )
    found = {folder.split: descend(walk, folder) for folder in named}
    _require_classes(walk, {split: path for split, path in found.items() if split != "train"})
    classes = class_folders(walk, found["train"])
    if mixed := [path.name for path in others if path.name in classes]:
        raise DataError(
            f"image_folder: {root} holds the classes {a_few(mixed)} beside the splits "
            f"{a_few([folder.path.name for folder in named])}; move them into a split"
        )
    parts = [f"{split} split: {found[split].relative_to(root)}" for split in SPLITS if split in found]
    notes = [", ".join(parts)]
    if others:
        notes.append(f"not used, being neither a split nor a class: {a_few([path.name for path in others])}")
    return Layout(found["train"], found.get("validation"), found.get("test"), tuple(notes))


def descend(walk: Walk, folder: SplitFolder) -> Path:
    """Follow train/train and seg_train/seg_train down to the folder that holds the classes."""
    path = folder.path
    while True:
        folders, images = walk.listing(path)
        if images or len(folders) != 1:
            return path
        inner = split_of(folders[0].name)
        words = {word for word in _words(folders[0].name) if not word.isdigit()}
        is_filler = bool(words) and words <= FILLERS
        if not is_filler and (inner is None or inner[0] != folder.split):
            return path
        path = folders[0]


def _split_folders(walk: Walk, folders: Sequence[Path]) -> list[SplitFolder]:
    """Return the folders whose names are those of splits.

    A name with other words counts only beside another split with the same words, if both hold folders:
    flowers_train and flowers_test, but not test_tube.
    """
    candidates = [SplitFolder(path, *found) for path in folders if (found := split_of(path.name))]
    plain = [folder for folder in candidates if not folder.rest]
    if plain:
        return plain
    groups: dict[str, list[SplitFolder]] = defaultdict(list)
    for folder in candidates:
        if walk.listing(folder.path).folders:
            groups[folder.rest].append(folder)
    whole = [group for group in groups.values() if "train" in {folder.split for folder in group}]
    whole = [group for group in whole if len({folder.split for folder in group}) > 1]
    return whole[0] if len(whole) == 1 else []


def _lonely(walk: Walk, root: Path, named: Sequence[SplitFolder], others: Sequence[Path]) -> str:
    """Return the message for splits without a training split."""
    names = a_few([folder.path.name for folder in named])
    if others:
        return (
            f"image_folder: {root} holds {names}, named like splits, beside "
            f"{a_few([path.name for path in others])}; move them away, or rename them if they are classes"
        )
    absent = _absent(root / "train")
    return f"image_folder: {named[0].path} exists but {absent}; add it, or use {root}/CLASS/…"


def _absent(path: Path) -> str:
    is_link = path.is_symlink()
    return f"{path} {'is a link to what the dataset holds already' if is_link else 'does not'}"


def _require_classes(walk: Walk, splits: dict[ListedSplit, Path]) -> None:
    for path in splits.values():
        if walk.listing(path).folders:
            continue
        has_images = bool(walk.listing(path).images)
        content = "images, but no class folders, so their classes are unknown" if has_images else "nothing"
        raise DataError(f"image_folder: {path} holds {content}; add the class folders or move it away")


def _refuse_splits_in_classes(walk: Walk, folders: Sequence[Path]) -> None:
    for folder in folders:
        inner = [path for path in walk.listing(folder).folders if split_of(path.name) in _PLAIN]
        if len({split_of(path.name) for path in inner}) > 1:
            raise DataError(
                f"image_folder: {folder} holds {a_few([path.name for path in inner])}, named like splits; "
                f"the splits come first: {folder.parent}/{inner[0].name}/{folder.name}/…"
            )


def _words(name: str) -> list[str]:
    return [part for token in TOKEN.findall(name) for part in _unglued(token.casefold())]


def _unglued(token: str) -> list[str]:
    """Divide `trainset` and `testimages` into the word of a split and the word beside it."""
    if token in WORDS or token in FILLERS:
        return [token]
    for word in WORDS:
        for left, right in ((word, token.removeprefix(word)), (token.removesuffix(word), word)):
            if left + right == token and (left in FILLERS or right in FILLERS):
                return [left, right]
    return [token]
