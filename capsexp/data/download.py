"""Download, verify and unpack the files of published datasets.

A file is downloaded over https to `NAME.part`, verified by its sha256 and then renamed, so a file with its
final name is complete. An exclusive lock in the data root keeps two processes from doing the same work.
"""

import shutil
import urllib.error
import urllib.request
from collections.abc import Collection, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from capsexp.data.checked_files import (
    BLOCK,
    Progress,
    RemoteFile,
    lacking_files,
    move,
    on_disk,
    take,
    unpack,
    verify,
)
from capsexp.errors import DataError
from capsexp.locks import locked

LOCK = ".capsexp.lock"
TIMEOUT = 60.0
"""Seconds without a response after which a download fails."""


def download_all(
    root: Path,
    files: Sequence[RemoteFile],
    *,
    dataset: str,
    online: bool,
    progress: Progress | None,
    damaged: Collection[str] = (),
) -> None:
    """Make all files available: take those that are on disk in some form, download the others.

    Args:
        root: the data root.
        files: all files of the dataset; those on disk are not touched, unless they are damaged.
        dataset: its name, for messages.
        online: whether missing and damaged files may be downloaded.
        progress: called during downloading and unpacking.
        damaged: names of files on disk to replace.

    Raises:
        DataError: files are missing or damaged and may not or cannot be downloaded; it names all of them.
    """
    lacking = [remote for remote in files if lacking_files(root, remote, damaged)]
    if not lacking:
        return
    if not online and not any(on_disk(root, remote) for remote in lacking):
        raise _incomplete(root, lacking, damaged, dataset)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / LOCK, wait=True):
            _discard_leftovers(root)
            # Checked under the lock: another process may have downloaded it while this one waited.
            report = progress or _no_progress
            lacking = [remote for remote in lacking if not take(root, remote, damaged, report)]
            if lacking and not online:
                raise _incomplete(root, lacking, damaged, dataset)
            _download(root, lacking, report)
    except OSError as error:
        raise DataError(f"cannot prepare {dataset} under {root}: {error}") from error


def _download(root: Path, files: Sequence[RemoteFile], progress: Progress) -> None:
    for number, remote in enumerate(files):
        try:
            fetch(remote, root, progress)
            if remote.is_archive:
                unpack(root / remote.name, root, remote, progress)
        except DataError as error:
            waiting = ", ".join(other.name for other in files[number + 1 :])
            raise DataError(f"{error}; not downloaded yet: {waiting}" if waiting else str(error)) from error


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
        move(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _incomplete(root: Path, files: Sequence[RemoteFile], damaged: Collection[str], dataset: str) -> DataError:
    """Return the error that names all missing and damaged files, and what helps."""
    lacking = [stored for remote in files for stored in lacking_files(root, remote, damaged)]
    missing = ", ".join(stored.name for stored in lacking if not (root / stored.name).is_file())
    wrong = dict.fromkeys(path for remote in files for path in on_disk(root, remote))
    sizes = ", ".join(f"{path.relative_to(root)} ({path.stat().st_size} bytes)" for path in wrong)
    problems = [f"missing {missing}"] if missing else []
    problems += [f"damaged or not the published file: {sizes}"] if sizes else []
    urls = ", ".join(remote.url for remote in files)
    folders = ", ".join(dict.fromkeys(str((root / remote.name).parent) for remote in files))
    return DataError(
        f"dataset {dataset} is not complete under {root}: {'; '.join(problems)}; download it with "
        f"`capsexp data prepare {dataset}` or dataset.download=true (from {urls}), or put these files "
        f"into {folders} by hand, packed or unpacked, "
        "or set data_root=FOLDER or the environment variable CAPSEXP_DATA to where they are"
    )


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


def _no_progress(activity: str, done: int, total: int) -> None:
    pass
