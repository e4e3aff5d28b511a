"""Errors by class and by group: what is counted, and the files of a run."""

import json

import pytest
import torch

from capsexp.capsules import Batch
from capsexp.data.split import Groups
from capsexp.dataset.digits import Digits
from capsexp.training.parallel import SINGLE
from capsexp.training.tally import Tally

LABELS = torch.tensor([0, 0, 0, 1, 1, 2])
PREDICTED = torch.tensor([0, 1, 0, 1, 1, 0])
TOYS = Groups("toy", ("a 0", "a 1", "b 0", "c 0", "c 1"), torch.tensor([0, 1, 1, 2, 2, 3]))


def batch_of(places):
    images = torch.zeros(len(places), 1, 2, 2)
    return Batch(images, LABELS[places], images, places)


def scores_of(places):
    return torch.nn.functional.one_hot(PREDICTED[places], 3).float()


def counted(groups=None):
    tally = Tally(("a", "b", "c"), groups)
    for places in (torch.arange(4), torch.arange(4, 6)):
        tally.add(batch_of(places), scores_of(places), weight=1.0)
    tally.sum_over(SINGLE)
    return tally


def test_images_and_errors_of_each_class_and_the_confusion():
    content = counted().content(split="test")
    assert (content["split"], content["images"], content["errors"]) == ("test", 6, 2)
    assert content["confusion"] == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert content["classes"] == [
        {"name": "a", "images": 3, "errors": 1},
        {"name": "b", "images": 2, "errors": 0},
        {"name": "c", "images": 1, "errors": 1},
    ]
    assert content["balanced_accuracy"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert (content["group"], content["groups"]) == (None, [])


def test_groups_are_counted_where_the_dataset_knows_them():
    content = counted(TOYS).content()
    assert content["group"] == "toy"
    assert content["groups"] == [
        {"name": "a 0", "class": "a", "images": 1, "errors": 0},
        {"name": "a 1", "class": "a", "images": 2, "errors": 1},
        {"name": "b 0", "class": "b", "images": 2, "errors": 0},
        {"name": "c 0", "class": "c", "images": 1, "errors": 1},
    ]  # no image of c 1
    assert content["confusion"] == counted().content()["confusion"]


def test_images_that_several_processes_count_are_shared():
    tally = Tally(("a", "b", "c"))
    for _ in range(3):
        tally.add(batch_of(torch.arange(6)), scores_of(torch.arange(6)), weight=1 / 3)
    assert tally.content() == counted().content()


def test_a_class_without_images_does_not_count_in_the_balanced_accuracy():
    tally = Tally(("a", "b", "c"))
    assert tally.is_empty
    assert tally.content()["balanced_accuracy"] is None
    places = torch.arange(5)
    tally.add(batch_of(places), scores_of(places), weight=1.0)
    assert tally.content()["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)


def errors_of(path, split):
    return json.loads((path / f"{split}_errors.json").read_text())


def test_a_run_leaves_the_errors_of_its_test(tmp_path, train_tiny):
    results = train_tiny(tmp_path, "trainer.limit_eval_batches=2", "trainer.test=last")
    errors = errors_of(tmp_path, "test")
    assert (errors["split"], errors["weights"], errors["step"], errors["total"]) == ("test", "last", 15, 15)
    assert (errors["images"], errors["crops"]) == (200, 1)
    assert 1 - errors["errors"] / 200 == pytest.approx(results["test/accuracy"], abs=1e-6)
    assert [entry["name"] for entry in errors["classes"]] == list("0123456789")
    assert sum(map(sum, errors["confusion"])) == 200


def test_the_errors_of_the_best_weights_are_those_of_the_step_that_validation_chose(tmp_path, train_tiny):
    train_tiny(tmp_path, "trainer.limit_eval_batches=1")
    best = json.loads((tmp_path / "status.json").read_text())["best"]
    assert errors_of(tmp_path, "test")["step"] == best["step"]
    validation = errors_of(tmp_path, "validation")
    assert validation["last"]["step"] == 15
    assert validation["best"]["step"] == best["step"]
    assert 1 - validation["best"]["errors"] / 100 == pytest.approx(best["accuracy"], abs=1e-6)


def test_a_resumed_run_leaves_the_same_files(tmp_path, train_tiny, kill_at, whole_run):
    kill_at(11, tmp_path / "run")
    train_tiny(tmp_path / "run")
    whole = whole_run()
    for split in ("test", "validation"):
        assert errors_of(tmp_path / "run", split) == errors_of(whole, split)


def test_several_labels_per_image_are_not_counted(tmp_path, train_tiny):
    train_tiny(
        tmp_path,
        *("dataset=multimnist", "dataset@dataset.source=digits", "dataset.test_partners=2", "loss=margin"),
        *("trainer.max_epochs=1", "trainer.limit_train_batches=1"),
    )
    assert not list(tmp_path.glob("*_errors.json"))


def test_overfitting_validates_on_training_images_without_groups(tmp_path, train_tiny, monkeypatch):
    monkeypatch.setattr(Digits, "groups", lambda self, split: pytest.fail(split))
    train_tiny(tmp_path, "trainer.overfit=true", "trainer.max_epochs=1", "trainer.test=none")
    assert errors_of(tmp_path, "validation")["last"]["images"] == 100


@pytest.fixture
def tested(tmp_path, capsexp, tiny_overrides):
    arguments = ("train", *tiny_overrides, "trainer.max_epochs=1", "run=run")
    assert capsexp(*arguments)[0] == 0
    return tmp_path / "run"


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_eval_adds_the_file_to_a_run_of_an_earlier_version(at_home, tested, capsexp):
    file = tested / "test_errors.json"
    before = json.loads(file.read_text())
    file.unlink()
    assert capsexp("eval", "run=run", "trainer.limit_eval_batches=3")[0] == 0
    assert not file.exists()  # not the images of the run's test
    assert capsexp("eval", "run=run")[0] == 0
    assert json.loads(file.read_text()) == before
    line = json.loads((tested / "evaluations.jsonl").read_text().splitlines()[-1])
    assert line["errors"] == before
