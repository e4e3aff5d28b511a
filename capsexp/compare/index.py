"""An index of what the runs of a folder say, beside them: `.capsexp-index`.

Reading a run's files takes a millisecond, mostly of YAML. The index holds what they said together with their
size, inode and times, and counts only as long as these are the same. It is written in folders that hold many
runs and belong to the user, and may be deleted at any time. One that is damaged, or of another version of
capsexp, is read as empty.
"""

import contextlib
import functools
import hashlib
import json
import os
import stat
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from capsexp.compare.fields import Files
from capsexp.config.settings import Published
from capsexp.documents import parse_json
from capsexp.errors import UserError
from capsexp.files import read_regular, write_atomic

NAME = ".capsexp-index"
READERS = (
    "compare/fields.py",
    "compare/index.py",
    "compare/runs.py",
    "config/saved.py",
    "config/settings.py",
)
"""The code that turns files into entries. After a change of it the index is read as empty."""
MIN_RUNS = 50
"""Folders with fewer runs have no index; it is written when so many runs are not in it."""
SETTLED_SECONDS = 2.0
"""A file that was changed less long ago may change again within the resolution of its times."""
LARGEST = 2**28  # bytes
LARGEST_RUN = 2**18  # bytes of the files of a run
INDEXED = ("status.json", "resolved_config.yaml", "env.json", "command.txt")
ENDED = ("finished", "failed", "interrupted")

Signature = list[list[int] | None]
"""Device, inode, size and times in ns of each indexed file; None for a missing one."""


class Index:
    """The index of one folder.

    Args:
        folder: a folder of runs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: dict[str, Any] = {}
        self._changed = 0
        with contextlib.suppress(OSError, ValueError):
            self._entries = _read(folder / NAME)

    def get(self, name: str, signature: Signature) -> Files | None:
        """Return what the files of a run say; None if that is not known, or they have changed since."""
        entry = self._entries.get(name)
        if not isinstance(entry, dict) or entry.get("signature") != signature:
            return None
        try:
            return _files(entry)
        except (LookupError, TypeError, ValueError):
            return None

    def add(self, name: str, signature: Signature, files: Files) -> None:
        """Add a run that has ended, unless its files may still change unnoticed."""
        latest = max((max(stated[3:]) for stated in signature if stated), default=0)
        size = sum(stated[2] for stated in signature if stated)
        is_settled = time.time_ns() - latest > SETTLED_SECONDS * 1e9
        is_plain = size <= LARGEST_RUN and all(map(_survives_json, files.settings.values()))
        if is_settled and is_plain and files.status["status"] in ENDED:
            self._entries[name] = {"signature": signature, **files._asdict()}
            self._changed += 1

    def write(self, names: Collection[str]) -> None:
        """Write the index of the runs that still exist, if it has changed enough. Never an error.

        Args:
            names: the runs in the folder.
        """
        if self._changed < MIN_RUNS:
            return
        with contextlib.suppress(OSError, ValueError, UserError):
            if _is_own(self._folder) and _is_own_or_free(self._folder / NAME):
                entries = {name: entry for name, entry in self._entries.items() if name in names}
                body = json.dumps(entries).encode()
                content = b"%s\n%s" % (_head(body), body)
                write_atomic(self._folder / NAME, lambda file: file.write(content))


def signature(path: Path) -> Signature | None:
    """Return what changes whenever a file of a run changes; None if one cannot be looked at."""
    result: Signature = []
    for name in INDEXED:
        try:
            status = os.stat(os.path.join(path, name))
        except FileNotFoundError:
            result.append(None)
            continue
        except OSError:
            return None
        times = (status.st_mtime_ns, status.st_ctime_ns)
        result.append([status.st_dev, status.st_ino, status.st_size, *times])
    return result


def _files(entry: Mapping[str, Any]) -> Files:
    """Return what an entry says.

    Raises:
        LookupError, TypeError, ValueError: it is no entry.
    """
    status, paper, version = dict(entry["status"]), entry["paper"], entry["version"]
    if status["status"] not in ENDED:
        raise ValueError("no status of a run that has ended")
    return Files(
        status=status,
        settings=dict(entry["settings"]),
        paper=None
        if paper is None
        else Published(float(paper[0]), None if paper[1] is None else float(paper[1])),
        command=str(entry["command"]),
        version=None if version is None else str(version),
    )


def _survives_json(value: Any) -> bool:
    """Whether a setting is the same after a way through JSON, whose keys are always strings."""
    if isinstance(value, list):
        return all(map(_survives_json, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _survives_json(item) for key, item in value.items())
    return True


def _read(file: Path) -> dict[str, Any]:
    """Return the entries of an index.

    Raises:
        OSError: there is no file that this user has written.
        ValueError: it is damaged, or of another version.
    """
    if not _is_own(file.parent) or not _is_own_or_free(file):
        raise PermissionError(f"{file} is not ours")
    head, _, body = read_regular(file, limit=LARGEST).partition(b"\n")
    if head != _head(body):
        raise ValueError(f"{file} is damaged")
    entries = parse_json(body)
    if not isinstance(entries, dict):
        raise ValueError(f"{file} is damaged")
    return entries


def _head(body: bytes) -> bytes:
    """Return the first line of an index: the checksums of the code that wrote it and of its content."""
    checksum = hashlib.blake2b(body, digest_size=16).hexdigest()
    return f"capsexp index {_code()} {checksum}".encode()


@functools.cache
def _code() -> str:
    package = Path(__file__).parents[1]
    code = b"".join((package / name).read_bytes() for name in READERS)
    return hashlib.blake2b(code, digest_size=16).hexdigest()


def _is_own(folder: Path) -> bool:
    """Whether a folder belongs to this user, and is no link to another place."""
    status = os.lstat(folder)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _is_own_or_free(file: Path) -> bool:
    """Whether a name is free, or that of a file of this user, not of a link."""
    if not os.path.lexists(file):
        return True
    status = os.lstat(file)
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
