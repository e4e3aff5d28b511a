"""Published files: their checksums, and how they get from what lies on disk to where they are read.

A file put there by hand may have the other form's name: unpacked by the browser and still called `.gz`, or
packed without `.gz`. Its content decides.
"""

import gzip
import hashlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from capsexp.errors import DataError
from capsexp.files import replace_durably

Progress = Callable[[str, int, int], None]
"""Called with (activity, bytes done, bytes in total or 0 if unknown)."""

BLOCK = 1 << 20


class StoredFile(NamedTuple):
    """A file that is read: its name below the data root, and its checksum."""

    name: str
    checksum: str
    """`sha256:HEX`, or `md5:HEX` where only that is published."""


class RemoteFile(NamedTuple):
    """A published file, and the files on disk after unpacking it (.gz, .tar.gz) or storing it as it is."""

    name: str
    """Below the data root."""
    url: str
    sha256: str
    contents: tuple[StoredFile, ...]

    @property
    def is_archive(self) -> bool:
        """Whether it must be unpacked."""
        return any(stored.name != self.name for stored in self.contents)


def missing_files(root: Path, files: Sequence[RemoteFile]) -> list[StoredFile]:
    """Return the files that are missing under `root`."""
    return [stored for remote in files for stored in lacking_files(root, remote, ())]


def lacking_files(root: Path, remote: RemoteFile, damaged: Collection[str]) -> list[StoredFile]:
    """Return the contents of a published file that are missing under `root`, or known to be damaged."""
    return [
        stored for stored in remote.contents if stored.name in damaged or not (root / stored.name).is_file()
    ]


def verify(path: Path, checksum: str) -> None:
    """Compare a file with its checksum.

    Args:
        path: the file.
        checksum: `sha256:HEX` or `md5:HEX`.

    Raises:
        DataError: the checksum differs, or the file cannot be read.
    """
    algorithm, expected = checksum.split(":")
    actual = digest(path, algorithm)
    if actual != expected:
        raise DataError(
            f"{path} is damaged or incomplete: expected {algorithm} {expected}, found {actual} "
            f"({path.stat().st_size} bytes)"
        )


def matches(path: Path, checksum: str) -> bool:
    """Whether a file exists, can be read and has this checksum."""
    try:
        verify(path, checksum)
    except DataError:
        return False
    return True


def digest(path: Path, algorithm: str) -> str:
    """Return the hash of a file in hexadecimal; `algorithm` is the name of a `hashlib` algorithm.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, algorithm).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def is_gzip(path: Path) -> bool:
    """Whether a file exists and begins as a gzip file does."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(2) == b"\x1f\x8b"
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def on_disk(root: Path, remote: RemoteFile) -> list[Path]:
    """Return the files on disk that may hold a published file, whatever their form."""
    stored = [content.name for content in remote.contents] if len(remote.contents) == 1 else []
    names = dict.fromkeys(
        [remote.name, *stored, remote.name.removesuffix(".gz"), *(f"{n}.gz" for n in stored)]
    )
    return [root / name for name in names if (root / name).is_file()]


def take(root: Path, remote: RemoteFile, damaged: Collection[str], progress: Progress) -> bool:
    """Put the contents of a published file in place from what is on disk; return whether they all are there.

    Args:
        root: the data root.
        remote: the published file.
        damaged: names of contents on disk that are not to be trusted.
        progress: called during unpacking.

    Raises:
        DataError: an archive with the right checksum cannot be unpacked.
    """
    if all(matches(root / stored.name, stored.checksum) for stored in lacking_files(root, remote, damaged)):
        return True
    for path in on_disk(root, remote):
        if len(remote.contents) == 1 and matches(path, remote.contents[0].checksum):
            _put(path, root / remote.contents[0].name)
            return True
        if remote.is_archive and (matches(path, f"sha256:{remote.sha256}") or _is_plain_tar(path, remote)):
            unpack(path, root, remote, progress)
            return True
    return False


def unpack(archive: Path, root: Path, remote: RemoteFile, progress: Progress) -> None:
    """Unpack into a temporary folder, verify every file there, then move each to its final place.

    Raises:
        DataError: the archive cannot be unpacked, or a file in it has another checksum.
    """
    progress(f"unpacking {archive.name}", 0, 0)
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=root) as folder:
        try:
            _extract(archive, Path(folder), remote)
        except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"{archive} cannot be unpacked: {error}") from error
        for stored in remote.contents:
            verify(Path(folder) / stored.name, stored.checksum)
        for stored in remote.contents:
            move(Path(folder) / stored.name, root / stored.name)


def move(source: Path, target: Path) -> None:
    """Move a complete file to its final name, so that it survives a power cut; the folder is made."""
    with source.open("rb") as file:
        os.fsync(file.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(source, target)


def _put(source: Path, target: Path) -> None:
    """Copy a file to its final name."""
    copy = target.with_name(f"{target.name}.part")
    try:
        shutil.copyfile(source, copy)
        move(copy, target)
    finally:
        copy.unlink(missing_ok=True)


def _is_plain_tar(path: Path, remote: RemoteFile) -> bool:
    """Whether this is a .tar.gz that was unpacked halfway, to a .tar; its contents are verified later."""
    return remote.name.endswith(".tar.gz") and not is_gzip(path) and tarfile.is_tarfile(path)


def _extract(archive: Path, folder: Path, remote: RemoteFile) -> None:
    if remote.name.endswith(".tar.gz"):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    else:
        target = folder / remote.contents[0].name
        target.parent.mkdir(parents=True)
        with gzip.open(archive) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, BLOCK)
