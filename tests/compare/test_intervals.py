"""Errors by toy, and how far a mean test error would move with other toys."""

import json

import numpy as np
import pytest

from capsexp.compare import group_errors
from capsexp.compare.group_errors import Errors, Part, validation_errors
from capsexp.compare.intervals import error_interval, gap_interval
from capsexp.errors import Notes

TOYS = 5
IMAGES = 40


def errors_of(*counts):
    """Errors of a run whose classes have five toys of 40 images each."""
    groups = tuple(
        Part(f"{name} {toy}", name, IMAGES, counts[5 * place + toy])
        for place, name in enumerate("ab")
        for toy in range(TOYS)
    )
    classes = tuple(
        Part(name, name, TOYS * IMAGES, sum(counts[5 * place : 5 * place + 5]))
        for place, name in enumerate("ab")
    )
    return Errors(classes, "toy", groups, ((0, 0), (0, 0)))


FIRST = errors_of(0, 0, 40, 0, 0, 2, 3, 4, 3, 2)
SECOND = errors_of(0, 0, 20, 0, 0, 2, 3, 4, 3, 2)


def test_the_mean_is_that_of_the_errors_and_the_interval_holds_it():
    interval = error_interval([FIRST, SECOND])
    assert interval.mean == pytest.approx(100 * (54 + 34) / 2 / 400)
    assert 0 < interval.low < interval.mean < interval.high


def test_the_interval_is_that_of_a_bootstrap_by_hand():
    """Toys are drawn within each class, with all of their images."""
    generator = np.random.default_rng(7)
    errors = np.array([part.errors for part in FIRST.groups]).reshape(2, 5)
    drawn = [
        100 * sum(generator.choice(row, 5).sum() for row in errors) / (2 * TOYS * IMAGES)
        for _ in range(20_000)
    ]
    interval = error_interval([FIRST])
    assert [interval.low, interval.high] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.6)


def test_the_same_interval_at_every_call_and_of_repeated_seeds():
    assert error_interval([FIRST]) == error_interval([FIRST]) == error_interval([FIRST, FIRST])


def test_equal_toys_have_no_uncertainty():
    interval = error_interval([errors_of(*[4] * 10)])
    assert (interval.low, interval.mean, interval.high) == pytest.approx((10, 10, 10))


def test_a_gap_is_paired_over_toys():
    """What both get wrong cancels in every draw, although each error alone is uncertain."""
    easier = errors_of(*[max(0, part.errors - 1) for part in FIRST.groups])
    gap = gap_interval([FIRST], [easier])
    assert gap.mean == pytest.approx(100 * (54 - 48) / 400)
    assert gap.high - gap.low < 0.3 * (error_interval([FIRST]).high - error_interval([FIRST]).low)
    assert gap_interval([FIRST], [FIRST]).high == 0


def test_without_groups_or_with_other_toys_there_is_no_interval():
    assert error_interval([]) is None
    assert error_interval([FIRST._replace(groups=(), group=None)]) is None
    other = FIRST._replace(groups=(FIRST.groups[0]._replace(name="c 0"), *FIRST.groups[1:]))
    assert error_interval([FIRST, other]) is None
    assert gap_interval([FIRST], [other]) is gap_interval([FIRST], []) is None


CONTENT = {
    "images": 30,
    "errors": 6,
    "classes": [{"name": "a", "images": 20, "errors": 1}, {"name": "b", "images": 10, "errors": 5}],
    "group": None,
    "groups": [],
    "confusion": [[19, 1], [5, 5]],
}


def test_errors_of_a_test_are_read_and_those_of_another_are_not(tmp_path):
    notes = Notes()
    (tmp_path / "test_errors.json").write_text(json.dumps(CONTENT))
    errors = group_errors.test_errors(tmp_path, 0.8, notes)
    assert (errors.images, errors.errors, errors.confusion) == (30, 6, ((19, 1), (5, 5)))
    assert errors.balanced_accuracy == pytest.approx((0.95 + 0.5) / 2)
    assert group_errors.test_errors(tmp_path, None, notes) is None
    assert notes == Notes()
    assert group_errors.test_errors(tmp_path, 0.7, notes) is None
    assert notes.warnings == [
        f"{tmp_path}/test_errors.json is not used: it is not of the test in status.json"
    ]


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        json.dumps({**CONTENT, "classes": []}),
        json.dumps({**CONTENT, "classes": [{"name": "a", "images": 3, "errors": 4}]}),
        json.dumps({**CONTENT, "classes": [{"name": 1, "images": 3, "errors": 1}]}),
        json.dumps({**CONTENT, "confusion": [[1]]}),
        json.dumps({**CONTENT, "group": "toy", "groups": [{"name": "a 0", "images": 3, "errors": 1}]}),
    ],
)
def test_a_damaged_file_is_reported_and_not_used(tmp_path, content):
    notes = Notes()
    (tmp_path / "test_errors.json").write_text(content)
    assert group_errors.test_errors(tmp_path, 0.8, notes) is None
    assert len(notes.warnings) == 1
    assert notes.warnings[0].startswith(f"{tmp_path}/test_errors.json cannot be read: ")


def test_the_last_validation_is_read(tmp_path):
    assert validation_errors(tmp_path, Notes()) is None
    (tmp_path / "validation_errors.json").write_text(json.dumps({"last": CONTENT, "best": None}))
    assert validation_errors(tmp_path, Notes()).errors == 6
