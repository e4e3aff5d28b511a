"""Find the run directories below a folder."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from capsexp.errors import Notes

MAX_FOLDERS = 200_000  # that are searched for runs


def default_root() -> Path:
    """Return $CAPSEXP_OUTPUTS, or `outputs` if it is not set."""
    return Path(os.environ.get("CAPSEXP_OUTPUTS", "outputs"))


def find(root: Path, notes: Notes) -> Iterator[Path]:
    """Yield the run directories at or below a folder. Does not descend into run directories.

    Links are followed, but each folder is visited once, and none above the root.
    """
    visited = {_identity(path) for path in (root, *Path(os.path.realpath(root)).parents)}
    waiting, scanned = [root], 0
    while waiting:
        folder = waiting.pop()
        if is_run(folder):
            yield folder
            continue
        if (scanned := scanned + 1) > MAX_FOLDERS:
            notes.warning(f"{root}: searched {MAX_FOLDERS} folders and left out the others")
            return
        below = [(_identity(path), path) for path in _subfolders(folder, notes)]
        new = [path for identity, path in below if identity not in visited]
        visited.update(identity for identity, _ in below)
        waiting += reversed(new)


def is_run(folder: Path) -> bool:
    """Whether a folder has a file of a run; it may be damaged, but is no folder."""
    for name in ("status.json", "resolved_config.yaml"):
        file = os.path.join(folder, name)
        if os.path.lexists(file) and not os.path.isdir(file):
            return True
    return False


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _subfolders(folder: Path, notes: Notes) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name[0] != "." and _is_folder(entry)]
    except OSError as error:
        notes.warning(str(error))
        return []
    return [folder / name for name in sorted(names, key=_natural_key)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def find_all(roots: Iterable[Path], notes: Notes) -> list[Path]:
    """Return the run directories at or below some folders, each once. A folder without runs is an error."""
    found: dict[str, Path] = {}
    for root in roots:
        paths = list(find(root, notes)) if root.is_dir() else []
        for path in paths:
            found.setdefault(os.path.realpath(path), path)
        if not root.exists():
            notes.error(f"{root}: no such directory")
        elif not root.is_dir():
            notes.error(f"{root} is a file, not a run directory")
        elif not paths and (root / "sweep.json").exists():
            notes.warning(f"{root}: this sweep has no runs yet")
        elif not paths:
            notes.error(f"{root}: no runs at or below this folder")
    return list(found.values())


def _natural_key(name: str) -> list[Any]:
    """Return a sort key that puts 10 after 9."""
    return [int(text) if index % 2 else text for index, text in enumerate(re.split(r"(\d+)", name))]
