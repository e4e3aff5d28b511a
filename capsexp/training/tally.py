"""Which images a network takes for which class: counts by class and by group, and the file that holds them.

RUN/test_errors.json         of the one test at the end
RUN/validation_errors.json   of two validation rounds: the last, and that with the best accuracy
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from capsexp.capsules import Batch
from capsexp.config.components import Components
from capsexp.data.manifest import SPLITS
from capsexp.data.split import Groups
from capsexp.documents import read_json
from capsexp.errors import is_number
from capsexp.schedule import Step
from capsexp.training.parallel import ProcessGroup
from capsexp.training.run_dir import RunDir
from capsexp.training.state import State

TEST, VALIDATION = "test_errors", "validation_errors"
"""Names of the files, without `.json`."""
ROUNDING = 1e-5
"""Largest rounding error of an accuracy that is a mean over batches."""


class Tally:
    """Counts the images of each class and group by the class that a network predicts.

    Args:
        classes: names of the classes.
        groups: of the images; None to count by class only.
    """

    def __init__(self, classes: Sequence[str], groups: Groups | None = None) -> None:
        self._classes, self._groups = classes, groups
        count = 1 if groups is None else len(groups.names)
        # Of group, class and predicted class. Floats: processes may share an image.
        self._counts = torch.zeros(count, len(classes), len(classes), dtype=torch.float64)

    def add(self, batch: Batch, scores: Float[Tensor, "B J"], *, weight: float) -> None:
        """Count the images of a batch.

        Args:
            batch: images of one class each.
            scores: the predicted class has the highest one.
            weight: of each image; less than 1 where several processes count it.
        """
        group = torch.zeros_like(batch.labels) if self._groups is None else self._groups_of(batch.indices)
        places = (group.cpu(), batch.labels.cpu(), scores.argmax(1).cpu())
        self._counts.index_put_(places, torch.tensor(weight, dtype=torch.float64), accumulate=True)

    def sum_over(self, processes: ProcessGroup) -> None:
        """Add the counts of all processes."""
        numbers = {str(place): count for place, count in enumerate(self._counts.flatten().tolist())}
        total = processes.sum(numbers)
        self._counts = torch.tensor(list(total.values()), dtype=torch.float64).view_as(self._counts)

    @property
    def is_empty(self) -> bool:
        """Whether no image has been counted."""
        return not self._counts.any()

    def content(self, **facts: Any) -> dict[str, Any]:
        """Return the counts as plain values, for a JSON file.

        Args:
            **facts: what else the file says, such as the step of the weights.

        Returns:
            The facts; `images` and `errors`; `balanced_accuracy`, the mean over the classes of their
            accuracies; `classes` and `groups` with the name, images and errors of each, and for a group its
            `class` (that of most of its images); `confusion`, images by class and predicted class.
        """
        confusion = self._counts.sum(0)
        images, right = confusion.sum(1), confusion.diagonal()
        shown = images > 0
        balanced = (right[shown] / images[shown]).mean().item() if shown.any() else None
        return {
            **facts,
            "images": round(images.sum().item()),
            "errors": round((images - right).sum().item()),
            "balanced_accuracy": balanced,
            "classes": [
                {"name": name, **_images_and_errors(images[place], right[place])}
                for place, name in enumerate(self._classes)
            ],
            "group": None if self._groups is None else self._groups.kind,
            "groups": [] if self._groups is None else self._group_entries(self._groups),
            "confusion": confusion.round().long().tolist(),
        }

    def _groups_of(self, indices: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        assert self._groups is not None
        return self._groups.of[indices.cpu()]

    def _group_entries(self, groups: Groups) -> list[dict[str, Any]]:
        entries = []
        for name, counts in zip(groups.names, self._counts, strict=True):
            images = counts.sum()
            if images > 0:
                of_class = self._classes[int(counts.sum(1).argmax())]
                entries.append(
                    {"name": name, "class": of_class, **_images_and_errors(images, counts.trace())}
                )
        return entries


def new_tally(components: Components, split: str) -> Tally | None:
    """Return the empty tally of a split of a run; None for a dataset with several classes in an image.

    Args:
        components: of the run.
        split: as for `Dataset.groups`; images of another split are counted by class only.
    """
    dataset = components.dataset
    if dataset.labels_per_image > 1:
        return None
    if split not in SPLITS or (components.trainer.overfit and split == "validation"):
        return Tally(dataset.classes)  # overfitting validates on a batch of the training images
    return Tally(dataset.classes, dataset.groups(split))


def _images_and_errors(images: Tensor, right: Tensor) -> dict[str, int]:
    return {"images": round(images.item()), "errors": round((images - right).item())}


def report_test(run: RunDir, tally: Tally | None, position: Step, components: Components) -> None:
    """Write test_errors.json: the counts of the one test."""
    if tally is not None:
        weights = components.trainer.test
        run.report(TEST, content(tally, "test", position, components, weights=weights))


def complete_test(run: RunDir, errors: dict[str, Any]) -> None:
    """Write test_errors.json of a run that an earlier version has tested, from the same test once more.

    Args:
        run: a run; with the file already, or with another result of its test, nothing is written.
        errors: of the test split, as `content` returns them.
    """
    results = run.status().get("results")
    accuracy = results.get("test/accuracy") if isinstance(results, dict) else None
    is_same = is_number(accuracy) and abs(accuracy - 1 + errors["errors"] / errors["images"]) < ROUNDING
    if is_same and not (run.path / f"{TEST}.json").exists():
        run.report(TEST, errors)


def report_validation(run: RunDir, tally: Tally | None, state: State, components: Components) -> None:
    """Write validation_errors.json: the counts of this round as `last`, of the best one as `best`."""
    if tally is None or tally.is_empty:
        return
    last = content(tally, "validation", state.position, components)
    earlier = _read(run.path / f"{VALIDATION}.json").get("best")
    run.report(VALIDATION, {"last": last, "best": last if state.best_step == state.step else earlier})


def content(tally: Tally, split: str, position: Step, components: Components, **facts: Any) -> dict[str, Any]:
    """Return what `Tally.content` does, with the split, the step of the weights, the crops of an image."""
    crops = components.dataset.preprocess.test_crops
    return tally.content(split=split, step=position.number, total=position.total, crops=crops, **facts)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
