"""Find image files: each real folder once, regular files only, and a count of everything passed over."""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from capsexp.errors import DataError
from capsexp.text import a_few, printable

ENDINGS = (
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
HIDDEN = {"__MACOSX", "__pycache__", "@eaDir", "lost+found", "Thumbs.db", "desktop.ini"}
"""Names that systems add to folders; like names that begin with a dot, they are not mentioned."""


class Entry(NamedTuple):
    """An image file."""

    path: str
    size: int
    modified: int
    """Time of the last change, in nanoseconds."""


class Listing(NamedTuple):
    """What a folder directly holds, sorted by name."""

    folders: list[Path]
    images: list[Entry]


class Walk:
    """Lists the folders of one dataset.

    A link to a folder or a file outside of the dataset is followed. A link to something that the dataset
    holds already, or that holds the dataset, is not. Pipes, devices and sockets are never opened.

    Args:
        root: the folder of the dataset.
    """

    def __init__(self, root: Path) -> None:
        self.passed: Counter[str] = Counter()
        """Number of files passed over, by their ending."""
        self.special: list[str] = []
        """Files with the ending of an image that are not regular files."""
        self.links: list[str] = []
        """Links to what the dataset holds already."""
        self._root = os.path.realpath(root)
        self._trees = [self._root]
        self._seen: set[tuple[int, int]] = set()
        self._listings: dict[Path, Listing] = {}

    def listing(self, folder: Path) -> Listing:
        """Return what a folder holds; the second time without looking again.

        Raises:
            DataError: the folder cannot be listed.
        """
        if folder not in self._listings:
            try:
                with os.scandir(folder) as entries:
                    visible = [entry for entry in entries if not is_hidden(entry.name)]
            except OSError as error:
                raise DataError(f"image_folder: {folder} cannot be listed: {error.strerror}") from None
            listing = Listing([], [])
            for entry in sorted(visible, key=lambda entry: entry.name):
                self._sort_in(entry, listing)
            self._listings[folder] = listing
        return self._listings[folder]

    def images(self, folder: Path) -> Iterator[Entry]:
        """Yield all images below a folder, sorted by their folder, then by name."""
        below, waiting = [folder], [folder]
        while waiting:
            folders = self.listing(waiting.pop()).folders
            below += folders
            waiting += folders
        for folder in sorted(below, key=str):
            yield from self.listing(folder).images

    def has_images(self, folder: Path) -> bool:
        """Return whether there is an image anywhere below a folder."""
        return next(self.images(folder), None) is not None

    def notes(self) -> list[str]:
        """Return one line for each kind of entry that was passed over."""
        lines = []
        if self.passed:
            parts = ", ".join(f"{count} {printable(ending)}" for ending, count in self.passed.most_common(10))
            others = sum(count for _, count in self.passed.most_common()[10:])
            more = f" and {others} others" if others else ""
            lines.append(f"files passed over, whose endings are not those of images: {parts}{more}")
        for names, text in (
            (self.special, "not regular files, so never opened"),
            (self.links, "not followed, because they lead nowhere, or to what the dataset holds already"),
        ):
            if names:
                lines.append(f"{text}: {a_few(names)}")
        return lines

    def _sort_in(self, entry: "os.DirEntry[str]", listing: Listing) -> None:
        ending = os.path.splitext(entry.name)[1].lower()
        try:
            status = os.stat(entry.path)
        except OSError:  # a link that leads nowhere; as an image it is listed, so that reading it fails
            if ending in ENDINGS:
                listing.images.append(Entry(entry.path, 0, 0))
            else:
                self.links.append(entry.path)
            return
        if stat.S_ISDIR(status.st_mode):
            if self._is_new(entry, status):
                listing.folders.append(Path(entry.path))
        elif ending not in ENDINGS:
            self.passed[ending or "without an ending"] += 1
        elif not stat.S_ISREG(status.st_mode):
            self.special.append(entry.path)
        elif self._is_new(entry, status):
            listing.images.append(Entry(entry.path, status.st_size, status.st_mtime_ns))

    def _is_new(self, entry: "os.DirEntry[str]", status: os.stat_result) -> bool:
        """Note a folder, or the target of a link; return False if the dataset holds it already.

        Files with several names (hard links) count like copies.
        """
        identity = (status.st_dev, status.st_ino)
        is_new = identity not in self._seen
        is_plain_file = stat.S_ISREG(status.st_mode) and not entry.is_symlink()
        if entry.is_symlink() and is_new:
            real = os.path.realpath(entry.path)
            is_new = not any(_holds(tree, real) for tree in self._trees) and not _holds(real, self._root)
            if is_new and stat.S_ISDIR(status.st_mode):
                self._trees.append(real)
        if is_new and not is_plain_file:
            self._seen.add(identity)
        if not is_new:
            self.links.append(entry.path)
        return is_new


def is_hidden(name: str) -> bool:
    """Return whether a name is one that users do not see, or that a system has added."""
    return name.startswith(".") or name in HIDDEN


def _holds(folder: str, path: str) -> bool:
    """Return whether a real path is a folder or something below it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
