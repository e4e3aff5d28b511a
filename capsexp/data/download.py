"""Files of published data sets: download, check, unpack. Nothing unverified is ever put in place.

A file comes over https only, to `NAME.part`, is checked against its sha256 and then renamed, so a file
with its final name is whole. An exclusive lock in the data root keeps two processes from doing it twice.
"""

import gzip
import hashlib
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from capsexp.errors import DataError
from capsexp.files import locked, replace_durably

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in all; 0 if unknown)."""

LOCK = ".capsexp.lock"
BLOCK = 1 << 20
TIMEOUT = 60.0
"""Seconds without an answer after which a download is given up."""


class StoredFile(NamedTuple):
    """A file as it is read: `name` below the data root, and its checksum."""

    name: str
    checksum: str
    """`sha256:HEX`, or `md5:HEX` where only that has been published."""


class RemoteFile(NamedTuple):
    """A file as it is published, and what lies on disk once it is unpacked (.gz, .tar.gz) or just there."""

    name: str
    """Below the data root."""
    url: str
    sha256: str
    contents: tuple[StoredFile, ...]


def missing_files(root: Path, files: Sequence[RemoteFile]) -> list[StoredFile]:
    """The files under `root` that are not there."""
    return [stored for remote in files for stored in remote.contents if not (root / stored.name).is_file()]


def verify(path: Path, checksum: str) -> None:
    """Check a file against its checksum.

    Args:
        path: the file.
        checksum: `sha256:HEX` or `md5:HEX`.

    Raises:
        DataError: it differs, or cannot be read.
    """
    algorithm, expected = checksum.split(":")
    found = digest(path, algorithm)
    if found != expected:
        raise DataError(
            f"{path} is damaged or incomplete: expected {algorithm} {expected}, found {found} "
            f"({path.stat().st_size} bytes); delete it and prepare the data set again"
        )


def digest(path: Path, algorithm: str) -> str:
    """Of a file, in hexadecimal digits; `algorithm` as `hashlib` calls it.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, algorithm).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def download_all(
    root: Path, files: Sequence[RemoteFile], *, dataset: str, online: bool, progress: Progress | None
) -> None:
    """Put everything in place: unpack archives that are there, download the others.

    Args:
        root: the data root.
        files: all of the data set; those that are in place are left alone.
        dataset: its name, for messages.
        online: whether missing files may be downloaded.
        progress: called now and then.

    Raises:
        DataError: files are missing and may not, or cannot, be downloaded; a file is damaged.
    """
    if not online:
        _require_local(root, files, dataset)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / LOCK, wait=True):
            _discard_leftovers(root)
            # Looked at again: another process may have done it while this one waited.
            for remote in files:
                if missing_files(root, [remote]):
                    _obtain_one(root, remote, progress or _silent)
    except OSError as error:
        raise DataError(f"cannot prepare {dataset} under {root}: {error}") from error


def fetch(remote: RemoteFile, root: Path, progress: Progress) -> Path:
    """Download one file to its place, whole and checked, or not at all.

    Raises:
        DataError: the address is not https, does not answer, or gives something else.
    """
    path = root / remote.name
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _stream(remote, part, progress)
        verify(part, f"sha256:{remote.sha256}")
        _put_in_place(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _require_local(root: Path, files: Sequence[RemoteFile], dataset: str) -> None:
    absent = [r for r in files if missing_files(root, [r]) and not (root / r.name).is_file()]
    if absent:
        names = ", ".join(stored.name for stored in missing_files(root, absent))
        urls = ", ".join(remote.url for remote in absent)
        folders = ", ".join(dict.fromkeys(str((root / remote.name).parent) for remote in absent))
        raise DataError(
            f"data set {dataset} is not complete under {root}: missing {names}; get it with "
            f"`capsexp data prepare {dataset}` or dataset.download=true (from {urls}), or put these files "
            f"into {folders} by hand, as they are or unpacked, "
            "or say where it lies with data_root=FOLDER or the environment variable CAPSEXP_DATA"
        )


def _obtain_one(root: Path, remote: RemoteFile, progress: Progress) -> None:
    archive = root / remote.name
    if archive.is_file():
        verify(archive, f"sha256:{remote.sha256}")
    else:
        fetch(remote, root, progress)
    if any(stored.name != remote.name for stored in remote.contents):
        progress(f"unpacking {remote.name}", 0, 0)
        _unpack(archive, root, remote.contents)


def _unpack(archive: Path, root: Path, contents: Sequence[StoredFile]) -> None:
    """Unpack into a folder of its own, check every file there, then move each to its place."""
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=root) as folder:
        try:
            _extract(archive, Path(folder), contents)
        except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"{archive} cannot be unpacked: {error}") from error
        for stored in contents:
            verify(Path(folder) / stored.name, stored.checksum)
        for stored in contents:
            (root / stored.name).parent.mkdir(parents=True, exist_ok=True)
            _put_in_place(Path(folder) / stored.name, root / stored.name)


def _extract(archive: Path, folder: Path, contents: Sequence[StoredFile]) -> None:
    if archive.name.endswith(".tar.gz"):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    else:
        target = folder / contents[0].name
        target.parent.mkdir(parents=True)
        with gzip.open(archive) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, BLOCK)


def _stream(remote: RemoteFile, part: Path, progress: Progress) -> None:
    try:
        with _open(remote.url) as answer, part.open("wb") as sink:
            total, done = int(answer.headers.get("Content-Length") or 0), 0
            while block := answer.read(BLOCK):
                sink.write(block)
                done += len(block)
                progress(f"downloading {remote.name}", done, total)
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise DataError(
            f"cannot download {remote.url}: {error}; put the file at {part.with_suffix('')} "
            "by hand, or say where the data lie with data_root=FOLDER or CAPSEXP_DATA"
        ) from error


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to https."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: Any,
        code: int,
        msg: str,
        headers: Any,
        newurl: str,
    ) -> urllib.request.Request | None:
        _require_https(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str) -> Any:
    _require_https(url)
    return urllib.request.build_opener(_HttpsOnly).open(url, timeout=TIMEOUT)


def _require_https(url: str) -> None:
    if urlsplit(url).scheme != "https":
        raise DataError(f"refusing to download over anything but https, got {url}")


def _discard_leftovers(root: Path) -> None:
    """Half-unpacked folders of a process that was killed; only to be called under the lock."""
    for folder in root.glob(".unpack-*"):
        shutil.rmtree(folder)


def _put_in_place(source: Path, target: Path) -> None:
    with source.open("rb") as file:
        os.fsync(file.fileno())
    replace_durably(source, target)


def _silent(what: str, done: int, total: int) -> None:
    pass
