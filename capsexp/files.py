"""Files that are there whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from capsexp.errors import UserError


def write_atomic(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file so that it appears under its name complete and on disk, or not at all."""
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(new, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        replace_durably(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def make_folder(path: Path) -> None:
    """Make a folder, and those that it lies in.

    Raises:
        UserError: that cannot be done.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {path}: {error.strerror}") from None


def replace_durably(source: Path, target: Path) -> None:
    """Give a file that is complete and on disk its name, so that the name survives a power cut too."""
    os.replace(source, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def require_picture_file(file: Path, *, option: str) -> None:
    """Check the name of a picture before the work that it is to show.

    Raises: UserError: a format that matplotlib does not know, or a folder that is not there.
    """
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if file.suffix.removeprefix(".") not in known:
        raise UserError(f"{option}: must be a picture file ({', '.join(sorted(known))}), got {file}")
    if not file.absolute().parent.is_dir():
        raise UserError(f"{option}: there is no folder {file.absolute().parent}")
