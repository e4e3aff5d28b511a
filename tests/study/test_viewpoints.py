from pathlib import Path

import pytest
import torch
from torch import nn

from capsexp.analysis.trained_run import TrainedRun
from capsexp.capsules import Output
from capsexp.data.preprocess import Preprocess
from capsexp.data.split import Split
from capsexp.dataset.smallnorb import SmallNORB
from capsexp.errors import UserError
from capsexp.schedule import Step
from capsexp.study.viewpoints import Viewpoints

PUBLISHED = [{"name": "others", "azimuth": [8.0, 20.0], "elevation": [5.0, 16.0]}]
ELEVATIONS, AZIMUTHS, CLASSES = range(9), range(0, 36, 2), range(5)
ROWS = torch.tensor(
    [(label, 0, up, around, 0) for up in ELEVATIONS for around in AZIMUTHS for label in CLASSES]
)


class Turntable(SmallNORB):
    """Every view of one toy of each class; the three pixels of an image are label, elevation and azimuth."""

    def __init__(self, viewpoint):
        super().__init__(
            root="unused",
            download=False,
            cameras="left",
            validation_instance=None,
            viewpoint=viewpoint,
            test_views="all" if viewpoint is None else "novel",
            preprocess=Preprocess.identity(),
        )

    def read(self, split):
        assert (split, self.test_views) == ("test", "all")
        images = torch.zeros(len(ROWS), 1, 1, 3, dtype=torch.uint8)
        images[:, 0, 0, 0] = ROWS[:, 0]
        images[:, 0, 0, 1], images[:, 0, 0, 2] = ROWS[:, 2], ROWS[:, 3]
        return Split(images, ROWS[:, 0])

    def factors(self, split):
        return ROWS[:, 1:]


class Guesser(nn.Module):
    """Correct exactly if `knows(elevation, azimuth)`."""

    def __init__(self, knows):
        super().__init__()
        self.weight, self.knows = nn.Parameter(torch.zeros(3)), knows

    def forward(self, images, labels=None):
        label, up, around = (images[:, 0, 0] * 255).round().long().T
        known = torch.tensor([self.knows(*view) for view in zip(up.tolist(), around.tolist(), strict=True)])
        scores = nn.functional.one_hot(torch.where(known, label, (label + 1) % 5), 5).float()
        return Output(scores, scores)


@pytest.fixture
def run_of(tiny_components):
    def make(knows, *, viewpoint="azimuth", name="run", limit=None):
        components = tiny_components("trainer.batch_size=7")._replace(dataset=Turntable(viewpoint))
        return TrainedRun(Guesser(knows), components, path=Path(name), step=Step(1, 1), limit=limit)

    return make


def familiar_azimuth(around):
    return around >= 30 or around <= 4


def test_errors_are_those_of_familiar_and_novel_views(run_of):
    run = run_of(lambda up, around: familiar_azimuth(around) or around == 6)
    numbers, figures, table = Viewpoints(others=[], published=PUBLISHED)(run)
    assert numbers["familiar_error"] == 0
    assert numbers["novel_error"] == pytest.approx(11 / 12)
    assert numbers["error"] == pytest.approx(11 / 18)
    assert numbers["published"] == [{"name": "others", "azimuth": [8.0, 20.0]}]
    assert (numbers["pictures"], numbers["parameters"]) == (810, 3)
    assert set(figures) == {"viewpoints"}
    assert table.row_count == 2


def test_accuracy_by_degrees(run_of):
    run = run_of(lambda up, around: up in (0, 8) or around == 34, viewpoint="elevation")
    row = Viewpoints(others=[], published=PUBLISHED)(run).numbers["runs"][0]
    assert list(row["accuracy_by_azimuth"]) == list(range(0, 360, 20))
    assert row["accuracy_by_azimuth"][340] == 1
    assert row["accuracy_by_azimuth"][60] == pytest.approx(2 / 9)
    assert list(row["accuracy_by_elevation"]) == list(range(30, 75, 5))
    assert row["accuracy_by_elevation"][30] == row["accuracy_by_elevation"][70] == 1
    assert row["accuracy_by_elevation"][50] == pytest.approx(1 / 18)
    assert row["familiar_error"] == pytest.approx(2 / 3 * 17 / 18)


def test_runs_are_compared_with_the_difference_of_their_familiar_errors(monkeypatch, run_of):
    run = run_of(lambda up, around: True, name="caps")
    other = run_of(lambda up, around: around > 0, name="cnn")
    monkeypatch.setattr(run, "other_run", {"out/cnn": other}.get)
    numbers, _, table = Viewpoints(others=["out/cnn"], published=PUBLISHED)(run)
    assert [run["run"] for run in numbers["runs"]] == ["caps", "cnn"]
    assert numbers["largest_familiar_difference"] == pytest.approx(1 / 6)
    assert table.row_count == 3


def test_under_a_limit_views_still_belong_to_their_images(run_of):
    run = run_of(lambda up, around: familiar_azimuth(around), limit=400)
    numbers = Viewpoints(others=[], published=PUBLISHED)(run).numbers
    assert numbers["pictures"] == 400
    assert (numbers["familiar_error"], numbers["novel_error"]) == (0, 1)


def test_a_run_on_all_views_has_accuracies_and_no_novel_ones(run_of):
    run = run_of(lambda up, around: up == 0, viewpoint=None)
    numbers, _, table = Viewpoints(others=[], published=PUBLISHED)(run)
    assert numbers["error"] == pytest.approx(8 / 9)
    assert "novel_error" not in numbers
    assert table.row_count == 1


def test_runs_on_other_views_or_another_dataset_are_refused(monkeypatch, trained_run, run_of):
    run = run_of(lambda up, around: True)
    monkeypatch.setattr(run, "other_run", lambda run: run_of(lambda up, around: True, viewpoint=None))
    with pytest.raises(UserError, match=r"^study\.others: the runs must be trained on the same views, got "):
        Viewpoints(others=["x"], published=PUBLISHED)(run)
    with pytest.raises(UserError, match=r"^study=viewpoints is for runs on smallnorb.*is one on digits$"):
        Viewpoints(others=[], published=PUBLISHED)(trained_run())


@pytest.mark.parametrize("row", [{"name": "others"}, {**PUBLISHED[0], "azimuth": [1.0]}])
def test_a_published_row_must_be_complete(row):
    with pytest.raises(ValueError, match=r"^published must give name, azimuth"):
        Viewpoints(others=[], published=[row])
