import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsexp.schedule import (
    Constant,
    Cosine,
    Exponential,
    Linear,
    Saturating,
    Sigmoid,
    Stairs,
    Step,
    Warmup,
    as_schedule,
)

RAMPS = (Linear, Cosine)
AUTHORS = {"start": 0.001, "decay": 0.96, "every": 2000, "minimum": 1e-6}
numbers = st.floats(-1e3, 1e3)
steps = st.one_of(st.integers(1, 1000), st.floats(0.001, 1.0))


@given(value=numbers, number=st.integers(0, 10**6))
def test_a_constant_never_moves(value, number):
    assert Constant(value=value)(Step(number, 10)) == value


@pytest.mark.parametrize(
    ("number", "value"), [(0, 0.001), (2000, 0.001 * 0.96), (1000, 0.001 * 0.96**0.5), (10**6, 1e-6)]
)
def test_exponential_has_the_rates_of_the_authors_code(number, value):
    assert Exponential(**AUTHORS)(Step(number, 10)) == pytest.approx(value, rel=1e-12)


@given(number=st.integers(0, 10**6))
def test_exponential_never_rises_and_never_falls_below_its_minimum(number):
    rate = Exponential(**AUTHORS)
    assert rate(Step(number, 10)) >= rate(Step(number + 1, 10)) >= 1e-6


def test_exponential_without_decay_is_constant():
    assert Exponential(start=0.5, decay=1, every=1, minimum=0)(Step(10**6, 1)) == 0.5


@pytest.mark.parametrize(
    ("ramp", "quarter"), [(Linear, 1.75), (Cosine, 1 + 0.5 * (1 + math.cos(math.pi / 4)))]
)
@pytest.mark.parametrize(
    ("length", "total"), [(100, 7), (0.5, 200), (1.0, 100)], ids=["steps", "half", "whole"]
)
def test_a_ramp_goes_from_its_start_to_its_end_and_stays(ramp, quarter, length, total):
    value = ramp(start=2.0, end=1.0, steps=length)
    expected = {0: 2.0, 25: quarter, 50: 1.5, 100: 1.0, 101: 1.0, 10**6: 1.0}
    for number, there in expected.items():
        assert value(Step(number, total)) == pytest.approx(there, abs=1e-12)


@pytest.mark.parametrize(("length", "total"), [(700_000, 7), (1.0, 700_000), (0.5, 1_400_000)])
@pytest.mark.parametrize(
    ("number", "value"),
    [
        (0, 0.214),
        (50_000, 0.237),
        (100_000, 0.294),
        (200_000, 0.595),
        (300_000, 0.896),
        (700_000, 0.990),
        (2_000_000, 0.990),
    ],
)
def test_sigmoid_has_the_margins_of_the_authors_code(number, value, length, total):
    margin = Sigmoid(start=0.2, end=0.99, steps=length)(Step(number, total))
    assert margin == pytest.approx(value, abs=5e-4)
    assert margin == pytest.approx(0.2 + 0.79 / (1 + math.exp(-min(10, number / 50_000 - 4))), rel=1e-12)


@pytest.mark.parametrize(
    ("number", "value"),
    [(0, 5.0e-4), (1, 9.75e-4), (2, 1.426e-3), (3, 1.855e-3), (4, 2.262e-3), (10**4, 0.01)],
)
def test_saturating_has_the_inverse_temperatures_of_the_authors(number, value):
    assert Saturating(limit=0.01, decay=0.95)(Step(number, 3)) == pytest.approx(value, rel=1e-3)


def test_saturating_without_decay_is_constant():
    assert Saturating(limit=0.5, decay=0)(Step(0, 1)) == Saturating(limit=0.5, decay=0)(Step(9, 1)) == 0.5


@pytest.mark.parametrize(("at", "total"), [([10, 30], 7), ([0.25, 0.75], 40)], ids=["steps", "shares"])
def test_stairs_apply_the_factor_from_each_point_on(at, total):
    rate = Stairs(start=2.0, factor=0.1, at=at)
    expected = {0: 2.0, 9: 2.0, 10: 0.2, 29: 0.2, 30: 0.02, 10**6: 0.02}
    assert {number: rate(Step(number, total)) for number in expected} == pytest.approx(expected)


def test_stairs_without_a_point_are_constant():
    assert Stairs(start=2.0, factor=0.1, at=[])(Step(9, 10)) == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 0}, "factor must be > 0, got 0"),
        ({"start": math.nan}, "start must be finite, got nan"),
        (
            {"at": [0.5, 1.5]},
            r"at must be an integer >= 1 \(steps\) or a fraction in \(0, 1\] of the run, got 1.5",
        ),
        ({"at": [20, 10]}, r"at must be steps, or fractions of the run, in ascending order, got \[20, 10\]"),
        ({"at": [10, 0.5]}, r"in ascending order, got \[10, 0.5\]"),
        ({"at": [1, 0.5]}, r"in ascending order, got \[1, 0.5\]"),
    ],
)
def test_stairs_refuse_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        Stairs(**{"start": 1.0, "factor": 0.1, "at": [0.5]} | change)


@pytest.mark.parametrize("ramp", [*RAMPS, Sigmoid])
@given(start=numbers, end=numbers, length=steps, number=st.integers(0, 2000), total=st.integers(1, 1000))
def test_a_ramp_stays_between_its_ends(ramp, start, end, length, number, total):
    value = ramp(start=start, end=end, steps=length)(Step(number, total))
    slack = 1e-9 * max(abs(start), abs(end))
    assert min(start, end) - slack <= value <= max(start, end) + slack


@pytest.mark.parametrize("ramp", RAMPS)
@given(percent=st.integers(1, 100), number=st.integers(0, 300))
def test_a_float_length_is_a_fraction_of_the_steps_of_the_run(ramp, percent, number):
    share = ramp(start=0.0, end=1.0, steps=percent / 100)
    counted = ramp(start=0.0, end=1.0, steps=2 * percent)
    assert share(Step(number, 200)) == pytest.approx(counted(Step(number, 1)), abs=1e-9)


@pytest.mark.parametrize("ramp", RAMPS)
def test_one_is_a_single_step_and_one_point_zero_the_whole_run(ramp):
    assert ramp(start=0.0, end=1.0, steps=1)(Step(1, 100)) == 1.0
    assert ramp(start=0.0, end=1.0, steps=1.0)(Step(1, 100)) < 0.02


def test_a_ramp_over_a_fraction_of_no_steps_is_at_its_end():
    assert Linear(start=0.0, end=1.0, steps=0.5)(Step(0, 0)) == 1.0


@pytest.mark.parametrize(("length", "total"), [(4, 1000), (0.25, 16)])
def test_warmup_counts_the_step_that_is_about_to_be_taken(length, total):
    rate = Warmup(steps=length, then=2.0)
    assert [rate(Step(number, total)) for number in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_warmup_multiplies_the_schedule_after_it():
    then = Linear(start=1.0, end=0.0, steps=10)
    rate = Warmup(steps=2, then=then)
    assert rate(Step(0, 10)) == 0.5 * then(Step(0, 10))
    assert rate(Step(7, 10)) == then(Step(7, 10))


def test_a_number_is_a_constant_schedule_and_a_schedule_itself():
    assert as_schedule(0.25)(Step(3, 10)) == 0.25
    schedule = Linear(start=0.0, end=1.0, steps=1)
    assert as_schedule(schedule) is schedule


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_constant_is_finite(value):
    with pytest.raises(ValueError, match=f"value must be finite, got {value}"):
        Constant(value=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": 0}, r"decay must be in \(0, 1\], got 0"),
        ({"decay": 1.5}, r"decay must be in \(0, 1\], got 1.5"),
        ({"every": 0}, "every must be > 0, got 0"),
        ({"every": -1}, "every must be > 0, got -1"),
        ({"every": math.nan}, "every must be > 0, got nan"),
        ({"start": 1e-7}, "start must be >= minimum"),
        ({"minimum": math.nan}, "minimum must be >= 0, got nan"),
        ({"start": math.inf}, "start must be finite, got inf"),
    ],
)
def test_exponential_refuses_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        Exponential(**AUTHORS | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": 1}, r"decay must be in \[0, 1\), got 1"),
        ({"decay": -0.5}, r"decay must be in \[0, 1\), got -0.5"),
        ({"decay": math.nan}, r"decay must be in \[0, 1\), got nan"),
        ({"limit": math.inf}, "limit must be finite, got inf"),
    ],
)
def test_saturating_refuses_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        Saturating(**{"limit": 0.01, "decay": 0.95} | change)


@pytest.mark.parametrize("length", [0, -1, 0.0, -0.5, 1.5, 100.0, math.nan, True])
@pytest.mark.parametrize("make", [*RAMPS, Sigmoid, Warmup])
def test_a_ramp_refuses_a_wrong_length(make, length):
    arguments = {"then": 1.0} if make is Warmup else {"start": 0.0, "end": 1.0}
    message = r"steps must be an integer >= 1 \(steps\) or a fraction in \(0, 1\] of the run, got " + str(
        length
    )
    with pytest.raises(ValueError, match=message):
        make(steps=length, **arguments)


@pytest.mark.parametrize("make", [*RAMPS, Sigmoid])
@pytest.mark.parametrize("end", ["start", "end"])
def test_a_ramp_refuses_an_end_that_is_not_finite(make, end):
    arguments = {"start": 0.0, "end": 1.0, "steps": 1} | {end: math.nan}
    with pytest.raises(ValueError, match=f"{end} must be finite, got nan"):
        make(**arguments)
