"""Files that a user names, as with `-o`: written through links, and into devices and pipes."""

import errno
import os
from pathlib import Path

from capsexp.errors import UserError
from capsexp.files import write_atomic


def require_figure_file(file: Path, *, option: str) -> None:
    """Check the file name of a figure before the work whose result it will show.

    Raises:
        UserError: matplotlib does not know the format, or the folder does not exist.
    """
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if file.suffix.removeprefix(".") not in known:
        raise UserError(f"{option}: must be an image file ({', '.join(sorted(known))}), got {file}")
    if not file.absolute().parent.is_dir():
        raise UserError(f"{option}: there is no folder {file.absolute().parent}")
    require_output(file)


def write_output(path: Path, content: bytes) -> None:
    """Write a file that the user named, complete or not at all; through links, and into devices and pipes.

    Raises:
        UserError: it cannot be written.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            with open(path, "wb") as file:
                file.write(content)
            return
        require_output(path)
        write_atomic(Path(os.path.realpath(path)), lambda file: file.write(content))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def require_output(path: Path) -> None:
    """Check that a file that the user named can be written, before the work whose result it will hold.

    Raises:
        UserError: it is a folder, has no folder, or the system refuses.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    if target.is_symlink():  # `realpath` follows all others
        raise UserError(f"cannot write {path}: {os.strerror(errno.ELOOP)}")
    if not target.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {target.parent}")
    if target.exists() and not os.access(target, os.W_OK):
        raise UserError(f"cannot write {path}: {os.strerror(errno.EACCES)}")
