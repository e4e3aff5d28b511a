import math
from typing import Literal

import pytest

from capsexp.errors import UserError, first_line, require_at_least_1, require_literal, require_positive


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.class_dim=0", "model: class_dim must be >= 1, got 0"),
        ("model.primary_types=0", "model: primary_types must be >= 1, got 0"),
        ("model.primary_stride=0", "model: primary_stride must be >= 1, got 0"),
        ("model.conv_channels=-1", "model: conv_channels must be >= 1, got -1"),
        ("model.conv_kernel=0", "model: conv_kernel must be >= 1, got 0"),
        ("model.primary_dim=0", "model: primary_dim must be >= 1, got 0"),
        ("model.primary_kernel=-2", "model: primary_kernel must be >= 1, got -2"),
        ("model.decoder.hidden=[8,0]", r"hidden must be a list of numbers >= 1, got \[8, 0\]"),
        ("trainer.keep_every=0", "trainer: keep_every must be >= 1, got 0"),
    ],
)
def test_a_size_below_1_is_one_line(override, line, tiny_components):
    with pytest.raises(UserError, match=line) as caught:
        tiny_components(override)
    assert len(caught.value.problems) == 1


def test_a_list_must_not_be_empty():
    with pytest.raises(ValueError, match=r"hidden must be a list of numbers >= 1, got \[\]"):
        require_at_least_1(hidden=[])
    require_at_least_1(hidden=[1, 2], steps=None, count=1)


def test_a_number_must_be_positive_and_finite():
    for wrong in (0, -1.5, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"factor must be > 0, got {wrong}"):
            require_positive(factor=wrong)
    require_positive(factor=1e-9, other=None)


def test_an_option_must_be_one_of_its_literal():
    with pytest.raises(ValueError, match="padding must be one of valid, same, got full"):
        require_literal(Literal["valid", "same"], padding="full")
    require_literal(Literal["valid", "same"], padding="same")


def test_the_message_has_all_problems():
    error = UserError("first", "second")
    assert error.problems == ("first", "second")
    assert str(error) == "first\nsecond"
    assert error.exit_code == 2


def test_the_first_line_of_an_error_is_never_empty():
    assert first_line(ValueError("\nfirst\nsecond")) == "first"
    assert first_line(ValueError()) == "ValueError"
