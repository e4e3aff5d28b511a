"""The data of a run, as its directory stores them: classes, shape, and the files of every split.

A run directory holds this as `data.json`. Later commands read it instead of the folder, so a renamed class
folder, an added image or another folder under the same name cannot change what a run was trained on.
"""

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from capsexp.errors import UserError, is_integer
from capsexp.files import read_regular, write_atomic
from capsexp.text import a_few, printable

FILE = "data.json"
"""Name of the manifest in a run directory."""

FORMAT = 1
"""Version of the file; a higher one is of a later capsexp."""

ListedSplit = Literal["train", "validation", "test"]
SPLITS: tuple[ListedSplit, ...] = ("train", "validation", "test")

NAMED = 10
"""Classes that a message names before it counts them."""

SHA256 = re.compile(r"[0-9a-f]{64}")


class ListedFile(NamedTuple):
    """A file of a split."""

    path: str
    """Below the dataset's folder, with `/` between the parts."""
    label: int
    size: int
    """In bytes."""
    sha256: str
    """In hexadecimal."""


@dataclass(frozen=True)
class Manifest:
    """The data of a run."""

    dataset: str
    """Name of the dataset whose files are read; for a derived dataset that of its source."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the labels."""
    file_shape: tuple[int, int, int]
    """Channels, height and width of the images on disk."""
    labels_per_image: int = 1
    folder: str | None = None
    """Absolute path of the folder of the files; None for a dataset without files."""
    reading: Mapping[str, Any] = field(default_factory=dict)
    """What the dataset needs to read one more image in the same way: plain values under names of its own."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Of a dataset whose files are known: a checksum for each file or array, by its name."""
    files: Mapping[ListedSplit, tuple[ListedFile, ...]] = field(default_factory=dict)
    """Of a dataset of a user's own files: those of each split, in order. `train` is without `validation`."""

    def differences(self, now: "Manifest") -> Iterator[str]:
        """Yield one line for each way in which the data are now other than this run's.

        Args:
            now: the data as they are. Only its splits and fingerprints are compared, so it may hold a part.
        """
        where = printable(now.folder or now.dataset)
        if now.dataset != self.dataset:
            yield f"the dataset was {self.dataset}, is {now.dataset}"
        if now.classes != self.classes:
            learned = listing_of(self.classes)
            yield f"{where}: the classes are {listing_of(now.classes)}; this run learned {learned}"
        elif now.files or self.files:
            yield from _file_differences(self.files, now.files, where)
        for name in sorted(self.fingerprints.keys() & now.fingerprints.keys()):
            if self.fingerprints[name] != now.fingerprints[name]:
                yield f"{where}: {name} is not what this run was trained with (another checksum)"

    def save(self, run: Path) -> None:
        """Write the manifest into a run directory, completely or not at all."""
        write_atomic(run / FILE, lambda opened: opened.write(self.to_json().encode()))

    def to_json(self) -> str:
        """Return the text of the file, with one line for each listed file."""
        content = {
            "format": FORMAT,
            "dataset": self.dataset,
            "folder": self.folder,
            "classes": self.classes,
            "file_shape": self.file_shape,
            "labels_per_image": self.labels_per_image,
            "reading": self.reading,
            "fingerprints": self.fingerprints,
        }
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
        splits = (f"{json.dumps(name)}: {_list_of_files(files)}" for name, files in self.files.items())
        lines.append(f'"files": {{{", ".join(splits)}}}')
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def load(cls, run: Path) -> "Manifest | None":
        """Read the manifest of a run directory; None if it has none, as those of earlier versions.

        Raises:
            UserError: the file cannot be read, or is not a manifest.
        """
        path = run / FILE
        try:
            return cls.from_json(read_regular(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}") from None

    @classmethod
    def from_json(cls, text: bytes) -> "Manifest":
        """Parse a manifest that may be damaged or hostile.

        Raises:
            ValueError: it is not a manifest; the message says why.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("it is not JSON") from None
        if not isinstance(content, dict) or not isinstance(content.get("format"), int):
            raise ValueError("it has no format")
        if content["format"] > FORMAT:
            raise ValueError(f"format {content['format']} is of a later version of capsexp")
        return _Reader(content).manifest()


class _Reader:
    """Takes the values of a manifest out of parsed JSON, each checked."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content

    def manifest(self) -> Manifest:
        """Return the manifest.

        Raises:
            ValueError: a value is missing or not as expected.
        """
        classes = tuple(self._texts("classes"))
        _require(len(classes) > 0 and len(set(classes)) == len(classes), "classes")
        shape, labels = self._get("file_shape"), self._get("labels_per_image")
        _require(isinstance(shape, list) and len(shape) == 3 and all(map(_is_size, shape)), "file_shape")
        _require(_is_size(labels), "labels_per_image")
        folder = self._get("folder")
        _require(folder is None or _is_text(folder), "folder")
        reading, files = self._get("reading"), self._get("files")
        _require(isinstance(reading, dict), "reading")
        _require(isinstance(files, dict) and set(files) <= set(SPLITS), "files")
        return Manifest(
            dataset=self._text("dataset"),
            classes=classes,
            file_shape=(shape[0], shape[1], shape[2]),
            labels_per_image=labels,
            folder=folder,
            reading=reading,
            fingerprints=self._fingerprints(),
            files={name: tuple(_listed_files(files[name], len(classes))) for name in SPLITS if name in files},
        )

    def _get(self, key: str) -> Any:
        _require(key in self.content, key)
        return self.content[key]

    def _text(self, key: str) -> str:
        value = self._get(key)
        _require(_is_text(value), key)
        return str(value)

    def _texts(self, key: str) -> list[str]:
        value = self._get(key)
        _require(isinstance(value, list) and all(map(_is_text, value)), key)
        return list(value)

    def _fingerprints(self) -> dict[str, str]:
        value = self._get("fingerprints")
        _require(isinstance(value, dict) and all(map(_is_text, value.values())), "fingerprints")
        return dict(value)


def hashed(path: Path) -> tuple[int, str]:
    """Return size in bytes and sha256 of a file.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
    """
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def digest_of(*arrays: NDArray[Any]) -> str:
    """Return a checksum of arrays, with their types and shapes, as `sha256:HEX`."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return f"sha256:{digest.hexdigest()}"


def listing_of(classes: Sequence[str]) -> str:
    """Return the names of classes for a message."""
    more = f" … ({len(classes)})" if len(classes) > NAMED else ""
    return ", ".join(map(printable, classes[:NAMED])) + more


def _file_differences(
    before: Mapping[ListedSplit, tuple[ListedFile, ...]],
    now: Mapping[ListedSplit, tuple[ListedFile, ...]],
    where: str,
) -> Iterator[str]:
    """Yield a line each for missing, changed, new and moved files of the splits that `now` has."""
    split_of = {file.path: split for split, files in before.items() for file in files}
    found = {file.path: (split, file) for split, files in now.items() for file in files}
    expected = {file.path: file for split in now for file in before.get(split, ())}
    groups = {
        "missing": [path for path in expected if path not in found],
        "changed": [path for path, file in expected.items() if path in found and found[path][1] != file],
        "new": [path for path in found if path not in split_of],
        "in another split": [
            path for path, (split, _) in found.items() if split_of.get(path, split) != split
        ],
    }
    for state, paths in groups.items():
        if paths:
            count = "1 image is" if len(paths) == 1 else f"{len(paths)} images are"
            yield f"{where}: since this run began, {count} {state}: {a_few(paths)}"


def _list_of_files(files: Iterable[ListedFile]) -> str:
    return "[\n" + ",\n".join(json.dumps(list(file)) for file in files) + "\n]"


def _listed_files(entries: Any, classes: int) -> Iterator[ListedFile]:
    _require(isinstance(entries, list), "files")
    for entry in entries:
        _require(isinstance(entry, list) and len(entry) == len(ListedFile._fields), "files")
        path, label, size, sha256 = entry
        _require(_is_text(path) and _is_inside(path), f"the path {path!r}")
        _require(is_integer(label) and 0 <= label < classes, f"the label of {path!r}")
        _require(is_integer(size) and size >= 0, f"the size of {path!r}")
        _require(isinstance(sha256, str) and SHA256.fullmatch(sha256) is not None, f"the sha256 of {path!r}")
        yield ListedFile(path, label, size, sha256)


def _is_inside(path: str) -> bool:
    """Whether a path stays below the folder that it is relative to."""
    parts = PurePosixPath(path).parts
    return len(parts) > 0 and not path.startswith("/") and ".." not in parts and "\0" not in path


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_size(value: Any) -> bool:
    return is_integer(value) and 1 <= value < 2**31


def _require(valid: bool, name: str) -> None:
    if not valid:
        raise ValueError(f"{name} is missing or not as expected")
