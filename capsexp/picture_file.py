"""Files that matplotlib can draw."""

from pathlib import Path

from capsexp.errors import UserError


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
