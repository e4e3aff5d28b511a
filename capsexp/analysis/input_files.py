"""The image files that `capsexp predict` is given."""

from collections.abc import Sequence
from pathlib import Path

from capsexp.data.image_files import ENDINGS, Walk
from capsexp.errors import UserError


def find_images(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files to classify.

    Args:
        names: files and folders. Of a folder all images are taken, also of folders below it; hidden names and
            files without the ending of an image are passed over.

    Returns:
        The files, those of a folder sorted, and lines that say what was passed over.

    Raises:
        UserError: names that do not exist, and folders without an image.
    """
    files: list[str] = []
    notes, problems = [], []
    for name in names:
        path = Path(name)
        if not path.is_dir():
            problems += [] if path.exists() else [f"{name}: there is no such file"]
            files.append(name)
            continue
        walk = Walk(path)
        images = [entry.path for entry in walk.images(path)]
        if not images:
            problems.append(f"{name}: there is no image in this folder (looked for {', '.join(ENDINGS)})")
        files += images
        notes += [f"{name}: {note}" for note in walk.notes()]
    if problems:
        raise UserError(*problems)
    return files, notes
