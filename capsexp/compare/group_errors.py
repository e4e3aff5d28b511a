"""Errors by class and by group of a run: its test_errors.json and validation_errors.json."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from capsexp.compare.fields import get_count, get_number
from capsexp.documents import damage, read_json
from capsexp.errors import Notes

ROUNDING = 1e-5
"""Largest rounding error of an accuracy that is a mean over batches."""


class Part(NamedTuple):
    """The images of a class or of a group."""

    name: str
    of_class: str
    """The class; of a class its own name."""
    images: int
    errors: int


class Errors(NamedTuple):
    """What a network gets wrong on a split."""

    classes: tuple[Part, ...]
    group: str | None
    """What a group is, such as `toy`; None without groups."""
    groups: tuple[Part, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Images by class and predicted class."""

    @property
    def images(self) -> int:
        """All images."""
        return sum(part.images for part in self.classes)

    @property
    def errors(self) -> int:
        """All images that are taken for another class."""
        return sum(part.errors for part in self.classes)

    @property
    def balanced_accuracy(self) -> float:
        """Mean over the classes of their accuracies; classes without images do not count."""
        shares = [1 - part.errors / part.images for part in self.classes if part.images]
        return sum(shares) / len(shares)


def test_errors(run: Path, accuracy: float | None, notes: Notes) -> Errors | None:
    """Return the errors of a run's test; None where there are none, or those of another test.

    Args:
        run: the run directory.
        accuracy: on the test split, from status.json.
        notes: collects warnings about files.
    """
    errors = _read(run / "test_errors.json", (), notes)
    if errors is None or accuracy is None:
        return None
    if abs(1 - errors.errors / errors.images - accuracy) > ROUNDING:
        notes.warning(f"{run}/test_errors.json is not used: it is not of the test in status.json")
        return None
    return errors


def validation_errors(run: Path, notes: Notes) -> Errors | None:
    """Return the errors of a run's last validation; None where there are none."""
    return _read(run / "validation_errors.json", ("last",), notes)


def _read(file: Path, keys: Sequence[str], notes: Notes) -> Errors | None:
    try:
        content = read_json(file)
        for key in keys:
            content = content[key]
        return _errors(content)
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = damage(error)
    except (ValueError, LookupError, TypeError):
        reason = "it holds no errors by class"
    notes.warning(f"{file} cannot be read: {reason}")
    return None


def _errors(content: Mapping[str, Any]) -> Errors:
    """Return what a file holds.

    Raises:
        ValueError, LookupError, TypeError: it holds something else.
    """
    classes = tuple(_parts(content["classes"]))
    groups, group = tuple(_parts(content["groups"])), content["group"]
    confusion = tuple(tuple(int(count) for count in row) for row in content["confusion"])
    if not any(part.images for part in classes) or any(len(row) != len(classes) for row in confusion):
        raise ValueError("no images")
    if groups and (not isinstance(group, str) or sum(part.images for part in groups) != content["images"]):
        raise ValueError("groups without some images")
    return Errors(classes, group if groups else None, groups, confusion)


def _parts(entries: Iterable[Mapping[str, Any]]) -> Iterable[Part]:
    for entry in entries:
        name, of_class = entry["name"], entry.get("class", entry["name"])
        images, errors = get_count(entry, "images"), get_count(entry, "errors")
        if not (isinstance(name, str) and isinstance(of_class, str)):
            raise TypeError("a name is no text")
        if images is None or errors is None or errors > images or get_number(entry, "images") is None:
            raise ValueError(f"{name}: no numbers of images and errors")
        yield Part(name, of_class, images, errors)
