"""The first lines of a run."""

import pytest

from capsexp.data.dataset import Dataset
from capsexp.dataset.digits import Digits
from capsexp.training.introduction import describe_data
from capsexp.training.splits import read_splits

CLASSES = "10 classes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)"


def first_line(components):
    return describe_data(components.dataset, read_splits(components))[0]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            [],
            f"digits: {CLASSES}; images of 1x8x8; 1,294 training, 144 validation and 359 test images",
        ),
        (
            ["dataset.validation=0", "trainer.test=none", "dataset.preprocess.crop=6"],
            f"digits: {CLASSES}; images of 1x6x6, 1x8x8 on disk; 1,438 training and 0 validation images",
        ),
        (
            ["dataset=multimnist", "dataset@dataset.source=digits", "dataset.test_partners=2", "loss=margin"],
            f"multimnist: {CLASSES}; images of 1x16x16; 1,294 training, 288 validation and 718 test images",
        ),
    ],
)
def test_a_run_says_classes_shape_and_the_images_of_each_split(tiny_components, overrides, line):
    assert first_line(tiny_components(*overrides)) == line


def test_many_and_long_and_strange_names_of_classes_are_shortened(tiny_components, monkeypatch):
    names = ("an endless name of a class", "\x1b[31mred", *(f"c{number}" for number in range(98)))
    monkeypatch.setattr(Digits, "classes", names)
    expected = r"digits: 100 classes (an endless name of …, \x1b[31mred, c0, c1, c2, c3, c4, c5, c6, c7, …); "
    assert first_line(tiny_components()).startswith(expected)


def test_a_dataset_that_does_not_know_its_test_images_yet(tiny_components, monkeypatch):
    monkeypatch.setattr(Digits, "check_test", Dataset.check_test)
    assert first_line(tiny_components()).endswith("; 1,294 training and 144 validation images")


def test_the_lines_are_printed_and_the_notes_of_the_dataset_follow(tmp_path, train_tiny, monkeypatch, capsys):
    monkeypatch.setattr(Digits, "notes", lambda self: ["digits: drawn on paper"])
    train_tiny(tmp_path, "trainer.max_steps=1", "trainer.limit_train_batches=1")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("digits: 10 classes (")
    assert lines[2] == "digits: drawn on paper"
    assert lines[3].startswith("CapsNet with ")


def test_a_damaged_test_split_ends_a_run_before_its_first_step(tmp_path, train_tiny, monkeypatch, metrics_of):
    def damaged(self):
        raise OSError("damaged")

    monkeypatch.setattr(Digits, "check_test", damaged)
    with pytest.raises(OSError, match="damaged"):
        train_tiny(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
