"""Download, verify and unpack the files of published datasets.

A file is downloaded over https to `NAME.part`, verified by its sha256 and then renamed, so a file with its
final name is complete. An exclusive lock in the data root keeps two processes from doing the same work.
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
from capsexp.files import replace_durably
from capsexp.locks import locked

Progress = Callable[[str, int, int], None]
"""Called with (activity, bytes done, bytes in total or 0 if unknown)."""

LOCK = ".capsexp.lock"
BLOCK = 1 << 20
TIMEOUT = 60.0
"""Seconds without a response after which a download fails."""


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


def missing_files(root: Path, files: Sequence[RemoteFile]) -> list[StoredFile]:
    """Return the files that are missing under `root`."""
    return [stored for remote in files for stored in remote.contents if not (root / stored.name).is_file()]


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
            f"({path.stat().st_size} bytes); delete it and prepare the dataset again"
        )


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


def download_all(
    root: Path, files: Sequence[RemoteFile], *, dataset: str, online: bool, progress: Progress | None
) -> None:
    """Make all files available: unpack the archives on disk, download the others.

    Args:
        root: the data root.
        files: all files of the dataset; those on disk are not touched.
        dataset: its name, for messages.
        online: whether missing files may be downloaded.
        progress: called during downloading and unpacking.

    Raises:
        DataError: files are missing and may not or cannot be downloaded; or a file is damaged.
    """
    if not online:
        _require_local(root, files, dataset)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / LOCK, wait=True):
            _discard_leftovers(root)
            # Checked under the lock: another process may have downloaded it while this one waited.
            for remote in files:
                if missing_files(root, [remote]):
                    _download_or_unpack(root, remote, progress or _no_progress)
    except OSError as error:
        raise DataError(f"cannot prepare {dataset} under {root}: {error}") from error


def fetch(remote: RemoteFile, root: Path, progress: Progress) -> Path:
    """Download and verify one file. On an error nothing is left.

    Raises:
        DataError: the address is not https or does not respond, or the file has another checksum.
    """
    path = root / remote.name
    partial = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _stream(remote, partial, progress)
        verify(partial, f"sha256:{remote.sha256}")
        _move(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _require_local(root: Path, files: Sequence[RemoteFile], dataset: str) -> None:
    missing = [r for r in files if missing_files(root, [r]) and not (root / r.name).is_file()]
    if missing:
        names = ", ".join(stored.name for stored in missing_files(root, missing))
        urls = ", ".join(remote.url for remote in missing)
        folders = ", ".join(dict.fromkeys(str((root / remote.name).parent) for remote in missing))
        raise DataError(
            f"dataset {dataset} is not complete under {root}: missing {names}; download it with "
            f"`capsexp data prepare {dataset}` or dataset.download=true (from {urls}), or put these files "
            f"into {folders} by hand, packed or unpacked, "
            "or set data_root=FOLDER or the environment variable CAPSEXP_DATA to where they are"
        )


def _download_or_unpack(root: Path, remote: RemoteFile, progress: Progress) -> None:
    archive = root / remote.name
    if archive.is_file():
        verify(archive, f"sha256:{remote.sha256}")
    else:
        fetch(remote, root, progress)
    if any(stored.name != remote.name for stored in remote.contents):
        progress(f"unpacking {remote.name}", 0, 0)
        _unpack(archive, root, remote.contents)


def _unpack(archive: Path, root: Path, contents: Sequence[StoredFile]) -> None:
    """Unpack into a temporary folder, verify every file there, then move each to its final place."""
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=root) as folder:
        try:
            _extract(archive, Path(folder), contents)
        except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"{archive} cannot be unpacked: {error}") from error
        for stored in contents:
            verify(Path(folder) / stored.name, stored.checksum)
        for stored in contents:
            (root / stored.name).parent.mkdir(parents=True, exist_ok=True)
            _move(Path(folder) / stored.name, root / stored.name)


def _extract(archive: Path, folder: Path, contents: Sequence[StoredFile]) -> None:
    if archive.name.endswith(".tar.gz"):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    else:
        target = folder / contents[0].name
        target.parent.mkdir(parents=True)
        with gzip.open(archive) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, BLOCK)


def _stream(remote: RemoteFile, partial: Path, progress: Progress) -> None:
    try:
        with open_url(remote.url) as response, partial.open("wb") as sink:
            total, done = int(response.headers.get("Content-Length") or 0), 0
            while block := response.read(BLOCK):
                sink.write(block)
                done += len(block)
                progress(f"downloading {remote.name}", done, total)
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise DataError(
            f"cannot download {remote.url}: {error}; put the file at {partial.with_suffix('')} "
            "by hand, or set data_root=FOLDER or CAPSEXP_DATA to where the data are"
        ) from error


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Refuses redirects to anything but https."""

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


def open_url(url: str) -> Any:
    """Open an https address for reading.

    Raises:
        DataError: the address, or a redirect, is not https.
    """
    _require_https(url)
    return urllib.request.build_opener(_HttpsOnly).open(url, timeout=TIMEOUT)


def _require_https(url: str) -> None:
    if urlsplit(url).scheme != "https":
        raise DataError(f"refusing to download over anything but https, got {url}")


def _discard_leftovers(root: Path) -> None:
    """Remove the temporary folders of killed processes. Call it only while holding the lock."""
    for folder in root.glob(".unpack-*"):
        shutil.rmtree(folder)


def _move(source: Path, target: Path) -> None:
    with source.open("rb") as file:
        os.fsync(file.fileno())
    replace_durably(source, target)


def _no_progress(activity: str, done: int, total: int) -> None:
    pass
