"""The image files that `capsexp predict` is given."""

import os
from collections.abc import Sequence
from pathlib import Path

from capsexp.data.image_files import ENDINGS, Walk
from capsexp.errors import UserError
from capsexp.text import printable


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
        if not os.path.isdir(name):
            problems += [] if os.path.exists(name) else [f"{printable(name)}: there is no such file"]
            files.append(name)
            continue
        walk = Walk(Path(name))
        images = [entry.path for entry in walk.images(Path(name))]
        if not images:
            problems.append(
                f"{printable(name)}: there is no image in this folder (looked for {', '.join(ENDINGS)})"
            )
        files += images
        notes += [f"{name}: {note}" for note in walk.notes()]
    if problems:
        raise UserError(*problems)
    return files, notes
