"""A folder of images as a run stores it, and as it is now."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from capsexp.data.decode import Reading
from capsexp.data.find_images import FoundImages, ImageFile
from capsexp.data.image_files import Walk
from capsexp.data.image_splits import class_folders, find_layout
from capsexp.data.manifest import SPLITS, ListedFile, ListedSplit, Manifest, hashed
from capsexp.data.threads import map_files
from capsexp.errors import DataError


def found_in(manifest: Manifest) -> FoundImages:
    """Return what a run found in its folder.

    Raises:
        DataError: what the manifest says about reading the images is damaged.
    """
    try:
        reading = Reading.from_plain(dict(manifest.reading))
    except (TypeError, ValueError) as error:
        raise DataError(f"image_folder: the data.json of the run is damaged: {error}") from None
    listed = {split: manifest.files.get(split, ()) for split in SPLITS}
    if not listed["train"] or not listed["test"] or manifest.file_shape[0] not in (1, 3):
        raise DataError("image_folder: the data.json of the run does not describe a folder of images")
    files = {
        split: [ImageFile(file.path, file.label, file.size) for file in listed[split]] for split in SPLITS
    }
    return FoundImages(manifest.classes, files, manifest.file_shape, reading)


def listed_now(
    folder: Path, files: Mapping[ListedSplit, Sequence[ImageFile]], splits: Sequence[ListedSplit]
) -> dict[ListedSplit, tuple[ListedFile, ...]]:
    """Return size and checksum of the files of some splits, without those that do not exist.

    Raises:
        DataError: there is no such folder, or files cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"image_folder: path {folder} does not exist; name it with dataset.path=FOLDER")

    def listed(file: ImageFile) -> ListedFile | None:
        path = folder / file.path
        try:
            return ListedFile(file.path, file.label, *hashed(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None

    present = {}
    for split in splits:
        entries = map_files(listed, files.get(split, []))
        present[split] = tuple(entry for entry in entries if entry is not None)
    return present


def classes_now(folder: Path) -> tuple[str, ...]:
    """Return the classes of a folder, or none if its folders cannot be understood."""
    walk = Walk(folder)
    try:
        return tuple(class_folders(walk, find_layout(walk, folder).train))
    except DataError:
        return ()


def added_files(folder: Path, files: Mapping[ListedSplit, Sequence[ImageFile]]) -> list[str]:
    """Return the images in the class folders of a dataset that are not among these files."""
    walk = Walk(folder)
    try:
        layout = find_layout(walk, folder)
        splits = [path for path in (layout.train, layout.validation, layout.test) if path is not None]
        places = [place for split in splits for place in class_folders(walk, split).values()]
        entries = [entry for place in places for entry in walk.images(place)]
    except DataError:
        return []
    known = {file.path for listed in files.values() for file in listed}
    paths = (Path(entry.path).relative_to(folder).as_posix() for entry in entries)
    return [path for path in paths if path not in known]
