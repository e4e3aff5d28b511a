"""Training that ends with the time, and the seconds that every run records."""

import json
import math

import pytest

from capsexp.errors import UserError
from capsexp.schedule import Cosine, Step, Warmup
from capsexp.training import checkpoint, timing, train
from capsexp.training.budget import Budget
from capsexp.training.run_dir import RunDir
from capsexp.training.saved_state import saved_position
from capsexp.training.timing import read_timing

HALF = ("trainer.max_seconds=10", "trainer.max_epochs=null")
STEPS = 11  # in 10 seconds of the clock below: 0.5, 1, 1.5, 0.5, 1, ...
SCHEDULES = (
    "optimizer=adam_warmup",
    "optimizer.lr.steps=0.2",
    "loss=spread",
    "loss.margin.steps=0.7",
    "trainer.ema_decay=0.9",
)
EM = (
    "routing=em",
    "routing.inverse_temperature_ramp={_target_: capsexp.schedule.Linear, start: 0.5, end: 1, steps: 0.9}",
)


def seconds_after(steps):
    return sum(0.5 * (1 + number % 3) for number in range(steps))


@pytest.fixture
def clock(monkeypatch):
    """A clock that only training steps move: step `number` takes half a second times 1 + number % 3."""
    time, real = [12345], train.refuse_non_finite

    def moving(metrics, batch, number, run):
        time[0] += (1 + number % 3) * 500_000_000
        real(metrics, batch, number, run)

    monkeypatch.setattr(timing, "now", lambda: time[0])
    monkeypatch.setattr(train, "refuse_non_finite", moving)
    return time


# The position of schedules


def test_without_a_time_the_position_is_a_number_of_steps():
    position = Budget(30).position(7, 12.5)
    assert position == Step(7, 30)
    assert type(position.total) is int


def test_with_a_time_schedules_see_the_share_of_it():
    budget = Budget(None, 60.0)
    for step, seconds in ((1, 0.25), (7, 12.5), (100, 59.0)):
        number, total = budget.position(step, seconds)
        assert number == step
        assert number / total == pytest.approx(seconds / 60)


def test_the_share_is_never_above_1_and_1_at_the_end():
    budget = Budget(None, 60.0)
    for seconds in (60.0, 60.1, 1000.0):
        assert budget.is_used(3, seconds)
        assert budget.position(3, seconds) == Step(3, 3)
    assert not budget.is_used(3, 59.99)


def test_before_the_first_step_the_share_is_0():
    start = Budget(None, 60.0).position(0, 0.0)
    assert start == Step(0, math.inf)
    assert Cosine(start=0.1, end=0.0, steps=1.0)(start) == 0.1
    assert Warmup(steps=0.5, then=0.1)(start) == 0.0
    assert Warmup(steps=4, then=0.1)(start) == 0.025


def test_of_steps_and_time_the_one_that_is_further_counts():
    budget = Budget(100, 60.0)
    assert budget.position(0, 0.0) == Step(0, 100)
    assert budget.position(50, 6.0) == Step(50, 100)  # a tenth of the time, half of the steps
    assert budget.position(10, 30.0) == Step(10, 20)  # half of the time, a tenth of the steps
    assert budget.is_used(100, 1.0)
    assert budget.is_used(1, 60.0)


# Runs


def test_a_run_ends_with_the_time(clock, tmp_path, train_tiny, metrics_of, final_state):
    train_tiny(tmp_path, *HALF)
    saved = final_state(tmp_path)
    assert saved["step"] == STEPS
    assert saved["seconds"] == seconds_after(STEPS) >= 10 > seconds_after(STEPS - 1)
    assert saved_position(saved) == Step(STEPS, STEPS)
    rates = {
        line["step"]: line["schedule/learning_rate"] for line in metrics_of(tmp_path) if "train/loss" in line
    }
    assert sorted(rates) == [*range(1, STEPS + 1)]


def test_the_last_step_in_the_middle_of_an_epoch_is_validated_and_tested(
    clock, tmp_path, train_tiny, metrics_of
):
    results = train_tiny(tmp_path, "trainer.max_seconds=6", "trainer.max_epochs=null")
    lines = metrics_of(tmp_path)
    assert [line["step"] for line in lines if "validation/accuracy" in line] == [5, 6]
    assert "test/accuracy" in results


def test_schedules_follow_the_time(clock, tmp_path, train_tiny, metrics_of):
    train_tiny(tmp_path, *HALF, "optimizer=sgd")
    for line in metrics_of(tmp_path):
        if "train/loss" in line:
            share = seconds_after(line["step"] - 1) / 10
            expected = 0.05 * 0.5 * (1 + math.cos(math.pi * share))
            assert line["schedule/learning_rate"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "limit", [("trainer.max_epochs=1",), ("trainer.max_epochs=null", "trainer.max_steps=5")]
)
def test_the_limit_that_is_reached_first_ends_the_run_and_says_so(
    limit, clock, tmp_path, train_tiny, final_state, capsys
):
    train_tiny(tmp_path, "trainer.max_seconds=100", *limit)
    assert final_state(tmp_path)["step"] == 5
    out = " ".join(capsys.readouterr().out.split())
    assert "100 seconds of training or 5 steps, whichever ends first" in out
    line = "trainer.max_epochs or trainer.max_steps ended the training at step 5, after 4.5 of 100 seconds"
    assert line in out
    assert ("trainer.max_epochs=null lifts" in out) == (limit == ("trainer.max_epochs=1",))


@pytest.mark.parametrize("routing", [(), EM], ids=["dynamic", "em"])
@pytest.mark.parametrize("step", [1, 4, 9])
def test_a_resumed_run_goes_on_from_the_exact_second_bit_for_bit(
    step, routing, clock, tmp_path, kill_at, train_tiny, whole_run, assert_same_run
):
    overrides = (*HALF, *SCHEDULES, *routing)
    kill_at(step, tmp_path, *overrides)
    clock[0] += 10**13  # the time while the run is stopped does not count
    train_tiny(tmp_path, *overrides)
    assert_same_run(tmp_path, whole_run(*overrides), seconds=True)


def test_the_tested_weights_see_the_share_at_which_they_were_chosen(
    clock, tmp_path, monkeypatch, train_tiny, stop_at
):
    positions, real = {}, train.evaluate

    def watched(model, batches, loss, step, **options):
        positions.setdefault(step, []).append(len(positions))
        return {**real(model, batches, loss, step, **options), "accuracy": 1 / (1 + len(positions))}

    monkeypatch.setattr(train, "evaluate", watched)
    train_tiny(tmp_path, *HALF, "trainer.save_every=1")
    first = Budget(None, 10.0).position(5, seconds_after(5))
    assert [*positions] == [first, Budget(None, 10.0).position(10, seconds_after(10)), Step(STEPS, STEPS)]
    assert len(positions[first]) == 2  # validation chose the weights of step 5, and the test reads them
    assert saved_position(checkpoint.load(tmp_path / "checkpoints" / "best.pt")) == first


def test_another_time_resumes_only_when_forced(clock, tmp_path, train_tiny, final_state):
    train_tiny(tmp_path, *HALF)
    longer = ("trainer.max_seconds=20", "trainer.max_epochs=null")
    with pytest.raises(UserError, match=r"trainer\.max_seconds: was 10, is 20"):
        train_tiny(tmp_path, *longer)
    train_tiny(tmp_path, *longer, "resume=force")
    assert final_state(tmp_path)["seconds"] == seconds_after(21) == 21.0


def test_a_run_of_an_older_version_resumes(tmp_path, kill_at, train_tiny, final_state):
    kill_at(8, tmp_path)
    path = tmp_path / "resolved_config.yaml"
    lines = [line for line in path.read_text().splitlines() if "max_seconds" not in line]
    path.write_text("\n".join(lines))
    train_tiny(tmp_path)
    assert final_state(tmp_path)["step"] == 15


# What is recorded


def test_every_run_records_the_seconds_of_its_training(clock, tmp_path, kill_at, train_tiny, metrics_of):
    kill_at(8, tmp_path)
    train_tiny(tmp_path)
    expected = {step: seconds_after(step) for step in range(1, 16)}
    assert read_timing(tmp_path) == expected
    assert {line["step"] for line in metrics_of(tmp_path)} == {*expected}
    assert RunDir(tmp_path).status()["training_seconds"] == seconds_after(15)


def test_a_time_ends_with_the_steps_that_it_had(clock, tmp_path, train_tiny):
    train_tiny(tmp_path, *HALF)
    status = RunDir(tmp_path).status()
    assert (status["step"], status["total"]) == (STEPS, STEPS)


def test_damaged_lines_of_the_timing_are_left_out(tmp_path):
    good = {"step": 3, "training_seconds": 1.5}
    bad = [
        '{"step": 4}',
        "5",
        "{",
        '{"step": "5", "training_seconds": 2.0}',
        '{"step": 6, "training_seconds": NaN}',
    ]
    (tmp_path / "timing.jsonl").write_text("\n".join([*bad, json.dumps(good), '{"step": 7, "train']))
    assert read_timing(tmp_path) == {3: 1.5}
    assert read_timing(tmp_path / "none") == {}


def test_texts_do_not_name_a_total_that_is_not_known(clock, tmp_path, kill_at, train_tiny, capsys):
    kill_at(8, tmp_path, *HALF)
    train_tiny(tmp_path, *HALF)
    out = " ".join(capsys.readouterr().out.split())
    assert "; 10 seconds of training" in out
    assert "resuming at step 8, after 7.5 of 10 seconds of training" in out
    assert "epoch 1 step 1 " in out
    assert "inf" not in out.replace("info", "")


# Mistakes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.max_seconds=0"], "trainer: max_seconds must be > 0, got 0"),
        (["trainer.max_seconds=-1.5"], "trainer: max_seconds must be > 0, got -1.5"),
        (["trainer.max_seconds=soon"], "trainer.max_seconds: must be int or float or null, got 'soon'"),
        (["trainer.max_seconds=inf"], "trainer.max_seconds: must be finite, got inf"),
        (
            ["trainer.max_epochs=null"],
            "trainer: max_epochs, max_steps or max_seconds must be set: nothing would end the training",
        ),
    ],
)
def test_a_mistake_is_one_line(overrides, message, tiny_components):
    with pytest.raises(UserError) as error:
        tiny_components(*overrides)
    assert error.value.problems == (message,)
