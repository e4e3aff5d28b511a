import json
import math
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from capsexp.errors import RunStopped, UserError
from capsexp.schedule import Step
from capsexp.training import checkpoint
from capsexp.training.run_dir import RunDir
from capsexp.training.train import gradients

STEPS = 15  # of a whole tiny run


def final_state(path):
    return checkpoint.load(path / "checkpoints" / "last.pt")


def assert_same_run(path, other):
    """Weights, optimiser, random state and metrics.jsonl, bit for bit."""
    assert (path / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert_same(final_state(path), final_state(other))


def test_a_run_starts_balanced_once_and_not_again_when_it_goes_on(tmp_path, monkeypatch, train_tiny):
    from capsexp.model.dynamic_routing import CapsNet

    starts = []
    real = CapsNet.calibrate
    monkeypatch.setattr(
        CapsNet, "calibrate", lambda net, images: starts.append(len(images)) or real(net, images)
    )
    killed_at(4, monkeypatch, train_tiny, tmp_path, "routing=em")
    train_tiny(tmp_path, "routing=em")
    assert starts == [100]


def assert_same(a, b, at="state"):
    assert type(a) is type(b), at
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            assert_same(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), at
        for place, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{at}[{place}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), at
    else:
        assert a == b, at


class StopAt(Exception):  # noqa: N818
    pass


def killed_at(step, monkeypatch, train_tiny, path, *overrides):
    """A run that dies without a word before optimiser step `step` + 1."""
    from capsexp.training import train

    real = train.gradients

    def dying(model, loss, batch, position, settings, **options):
        if position.number == step:
            raise StopAt
        return real(model, loss, batch, position, settings, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, "gradients", dying)
        with pytest.raises(StopAt):
            train_tiny(path, *overrides)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Uninterrupted runs by their overrides, each made once."""
    made = {}

    def get(train_tiny, *overrides):
        if overrides not in made:
            path = tmp_path_factory.mktemp("whole") / "run"
            train_tiny(path, *overrides)
            made[overrides] = path
        return made[overrides]

    return get


@pytest.mark.parametrize("step", [1, 2, 4, 5, 9, 14])
def test_a_run_resumed_at_any_step_is_the_same_bit_for_bit(
    step, tmp_path, monkeypatch, train_tiny, whole_run
):
    killed_at(step, monkeypatch, train_tiny, tmp_path)
    train_tiny(tmp_path)
    assert_same_run(tmp_path, whole_run(train_tiny))


@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer.ema_decay=0.9", "trainer.accumulate=3", "trainer.grad_clip=0.1"),
        ("optimizer=sgd", "routing.prior=learned", "routing.bias=true", "dataset.preprocess.shift=1"),
        ("dataset.validation=0", "trainer.test=last"),
        ("dataset=multimnist", "dataset@dataset.source=digits", "trainer.accumulate=2"),
    ],
    ids=[
        "average, microbatches, clipping",
        "momentum, learned prior, augmentation",
        "no validation",
        "pairs",
    ],
)
def test_whatever_is_switched_on_survives_a_resume(overrides, tmp_path, monkeypatch, train_tiny, whole_run):
    killed_at(8, monkeypatch, train_tiny, tmp_path, *overrides)
    train_tiny(tmp_path, *overrides)
    assert_same_run(tmp_path, whole_run(train_tiny, *overrides))


@pytest.mark.parametrize(
    "network",
    [
        ["model=cnn_sabour", "model.conv_channels=[4,4]", "model.hidden=[8,8]"],
        [
            "model=em_routing",
            "model.conv_types=[4]",
            "model.conv_kernels=[2]",
            "model.conv_strides=[1]",
            "routing.inverse_temperature_ramp="
            "{_target_: capsexp.schedule.Linear, start: 0.5, end: 1, steps: 0.9}",
            "trainer.ema_decay=0.9",
            "trainer.accumulate=3",
        ],
    ],
    ids=["dropout", "matrix capsules, a balanced start, ramps"],
)
def test_other_networks_go_on_as_if_nothing_had_been(network, tmp_path, monkeypatch, tiny_overrides):
    from capsexp.config.build import build_components
    from capsexp.config.compose import compose, to_plain
    from capsexp.training.train import train

    overrides = [text for text in tiny_overrides if not text.startswith("model.")]
    settings = to_plain(compose("train", [*overrides, *network], config_dir=None))

    def run(path):
        directory = RunDir(path)
        with directory.locked(), directory.track_status({}):
            train(build_components(settings, plugins=[]), directory, settings)

    run(tmp_path / "whole")
    killed_at(7, monkeypatch, run, tmp_path / "resumed")
    run(tmp_path / "resumed")
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_a_death_between_the_last_step_and_the_test_is_made_good(
    tmp_path, monkeypatch, train_tiny, whole_run
):
    from capsexp.training import train

    real = train.evaluate

    def dying(model, batches, loss, step, **options):
        if step.number == STEPS:
            raise StopAt
        return real(model, batches, loss, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", dying)
        with pytest.raises(StopAt):
            train_tiny(tmp_path)
    train_tiny(tmp_path)
    assert_same_run(tmp_path, whole_run(train_tiny))


def test_the_test_set_is_read_once_and_last(tmp_path, monkeypatch, train_tiny):
    from capsexp.dataset.digits import Digits

    reads = []
    real = Digits.read
    monkeypatch.setattr(Digits, "read", lambda self, part: (reads.append(part), real(self, part))[1])
    train_tiny(tmp_path)
    assert reads == ["train", "test"]


def test_the_record_has_every_figure_and_no_time(tmp_path, train_tiny, metrics_of):
    results = train_tiny(tmp_path)
    lines = metrics_of(tmp_path)
    steps = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    told = {"loss", "margin", "reconstruction", "accuracy", "gradient_norm", "coupling_entropy/class_caps"}
    assert {f"train/{name}" for name in told} <= steps[0].keys()
    assert {"schedule/learning_rate", "schedule/reconstruction_weight"} <= steps[0].keys()
    assert steps[0]["train/loss"] == pytest.approx(
        steps[0]["train/margin"] + steps[0]["train/reconstruction"]
    )
    assert sum("validation/accuracy" in line for line in lines) == 3
    assert lines[-1]["test/accuracy"] == results["test/accuracy"]
    assert not any("second" in key or "time" in key for line in lines for key in line)


def test_the_learning_rate_follows_its_schedule(tmp_path, train_tiny, metrics_of, tiny_parts):
    train_tiny(tmp_path, "optimizer.lr.every=1")
    rates = [line["schedule/learning_rate"] for line in metrics_of(tmp_path) if "train/loss" in line]
    assert rates == pytest.approx([0.001 * 0.96**step for step in range(STEPS)])


def test_the_best_checkpoint_is_that_of_the_best_validation(tmp_path, train_tiny, metrics_of):
    train_tiny(tmp_path, "trainer.max_epochs=4")
    validated = {
        line["step"]: line["validation/accuracy"]
        for line in metrics_of(tmp_path)
        if "validation/accuracy" in line
    }
    best = max(validated, key=lambda step: (validated[step], -step))
    assert checkpoint.step_of(tmp_path / "checkpoints" / "best.pt") == best


def test_max_steps_ends_a_run_in_the_middle_of_an_epoch(tmp_path, train_tiny, metrics_of):
    train_tiny(tmp_path, "trainer.max_steps=7")
    assert max(line["step"] for line in metrics_of(tmp_path)) == 7


def test_an_unfinished_config_change_is_refused_and_force_takes_it(tmp_path, train_tiny, metrics_of):
    train_tiny(tmp_path)
    with pytest.raises(UserError, match=r"trainer\.max_epochs: was 3, is 4"):
        train_tiny(tmp_path, "trainer.max_epochs=4")
    train_tiny(tmp_path, "trainer.max_epochs=4", "resume=force")
    assert max(line["step"] for line in metrics_of(tmp_path)) == 20


def test_a_resumed_run_that_is_already_too_long_trains_no_further(
    tmp_path, monkeypatch, train_tiny, metrics_of
):
    killed_at(9, monkeypatch, train_tiny, tmp_path)  # the checkpoint is of step 8, inside an epoch
    train_tiny(tmp_path, "trainer.max_steps=6", "resume=force")
    assert final_state(tmp_path)["step"] == 8
    assert "test/accuracy" in metrics_of(tmp_path)[-1]


def test_layers_are_told_of_at_the_steps_that_are_logged(tmp_path, train_tiny, metrics_of):
    train_tiny(tmp_path, "trainer.max_epochs=1", "trainer.log_every=2")
    rows = [row for row in metrics_of(tmp_path) if "train/accuracy" in row]
    assert [row["step"] for row in rows] == [2, 4, 5]
    for row in rows:
        assert 0 <= row["train/coupling_entropy/class_caps"] <= 1
        assert 0 <= row["train/active/primary_caps"] <= 1


def test_what_is_told_of_layers_changes_nothing_else(tiny_parts):
    components = tiny_parts()
    batch = next(components.batches(components.dataset.read("train"), limit=None).training(0))
    told = []
    for layers in (True, False):
        torch.manual_seed(0)
        model = components.new_model()
        told.append(gradients(model, components.loss, batch, Step(0, 1), components.trainer, layers=layers))
    assert told[1] == {name: told[0][name] for name in told[1]}
    assert {name.partition("/")[0] for name in told[0].keys() - told[1].keys()} == {
        *("activation", "active", "coupling_entropy")
    }


def test_parts_of_a_batch_give_the_gradient_of_the_whole(tiny_parts):
    components = tiny_parts()
    components.trainer.batch_size = 101
    torch.manual_seed(0)
    model = components.new_model()
    batch = next(components.batches(components.dataset.read("train"), limit=None).training(0))
    told, grads = [], []
    for count in (1, 3):
        components.trainer.accumulate = count
        told.append(gradients(model, components.loss, batch, Step(0, 1), components.trainer))
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    assert told[0] == pytest.approx(told[1], rel=1e-5)
    for whole, summed in zip(*grads, strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-7)


def test_clipping_limits_the_gradient_and_reports_the_norm_before(tmp_path, train_tiny, metrics_of):
    train_tiny(tmp_path / "free", "optimizer=sgd", "optimizer.momentum=0", "optimizer.nesterov=false")
    train_tiny(
        tmp_path / "cut",
        "optimizer=sgd",
        "optimizer.momentum=0",
        "optimizer.nesterov=false",
        "trainer.grad_clip=1e-8",
    )
    free, cut = metrics_of(tmp_path / "free"), metrics_of(tmp_path / "cut")
    assert cut[0]["train/gradient_norm"] == free[0]["train/gradient_norm"] > 1e-8
    assert cut[4]["train/loss"] != free[4]["train/loss"]
    first, last = (final_state(tmp_path / name)["model"]["conv.weight"] for name in ("cut", "free"))
    assert not torch.equal(first, last)


def test_the_moving_average_is_what_gets_validated_and_tested(tmp_path, train_tiny, tiny_parts):
    from capsexp.analysis.trained_run import load_model

    train_tiny(tmp_path, "trainer.ema_decay=0.5", "trainer.test=last")
    saved = final_state(tmp_path)
    model, _ = load_model(tiny_parts("trainer.ema_decay=0.5"), tmp_path, weights="last")
    weight = model.state_dict()["conv.weight"]
    assert torch.equal(weight, saved["average"]["module.conv.weight"])
    assert not torch.equal(weight, saved["model"]["conv.weight"])


def test_one_batch_can_be_learnt_by_heart(tmp_path, train_tiny, metrics_of):
    overrides = ["trainer=overfit", "model.conv_channels=32", "model.primary_types=8"]
    overrides += ["trainer.max_epochs=60", "trainer.batch_size=32", "trainer.limit_train_batches=1"]
    overrides += ["trainer.validate_every=60", "trainer.images_every=100", "trainer.save_every=100"]
    train_tiny(tmp_path, *overrides, "optimizer.lr.start=0.005")
    lines = metrics_of(tmp_path)
    accuracy = next(line["validation/accuracy"] for line in lines if "validation/accuracy" in line)
    assert accuracy == 1.0
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.1 * losses[0]


def test_bfloat16_trains_close_to_float32(tmp_path, train_tiny, metrics_of):
    train_tiny(tmp_path / "half", "trainer.precision=bfloat16")
    train_tiny(tmp_path / "full")
    half, full = (metrics_of(tmp_path / name)[0]["train/loss"] for name in ("half", "full"))
    assert half != full
    assert half == pytest.approx(full, rel=0.02)


@pytest.mark.parametrize(("wrong", "term"), [(math.nan, "margin"), (math.inf, "margin")])
def test_a_loss_that_is_no_number_ends_the_run_before_the_weights_change(
    wrong, term, tmp_path, monkeypatch, train_tiny
):
    from capsexp.loss.margin import Margin

    real = Margin.__call__

    def poisoned(self, output, batch, step):
        terms = real(self, output, batch, step)
        return {**terms, term: terms[term] * wrong} if step.number == 7 and torch.is_grad_enabled() else terms

    monkeypatch.setattr(Margin, "__call__", poisoned)
    with pytest.raises(RunStopped, match=rf"step 7: .*{term} is (nan|inf).*step-00000006\.pt") as stopped:
        train_tiny(tmp_path)
    assert stopped.value.exit_code == 1
    report = json.loads((tmp_path / "non_finite.json").read_text())
    assert report["step"] == 7
    assert term in report["values"]
    assert len(report["indices"]) == 100
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["step"] == 6
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["status"] == "failed"
    assert "margin" in status["error"]


def test_a_gradient_that_is_no_number_ends_the_run(tmp_path, monkeypatch, train_tiny):
    from capsexp.training import train

    monkeypatch.setattr(train, "gradient_norm", lambda model, largest: math.nan)
    with pytest.raises(RunStopped, match=r"step 0: gradient_norm is nan.*there is no checkpoint yet"):
        train_tiny(tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_next_step_and_the_run_goes_on_as_if_nothing_had_been(
    number, code, tmp_path, monkeypatch, train_tiny, whole_run
):
    from capsexp.training import train

    real = train.gradients

    def signalled(model, loss, batch, position, settings, **options):
        if position.number == 6:
            os.kill(os.getpid(), number)
        return real(model, loss, batch, position, settings, **options)

    assert threading.current_thread() is threading.main_thread()
    with monkeypatch.context() as patch:
        patch.setattr(train, "gradients", signalled)
        with pytest.raises(RunStopped, match=f"{signal.Signals(number).name}: stopped at step 7") as stopped:
            train_tiny(tmp_path)
    assert stopped.value.exit_code == code
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["status"] == "interrupted"
    assert status["exit_code"] == code
    assert final_state(tmp_path)["step"] == 7
    train_tiny(tmp_path)
    assert_same_run(tmp_path, whole_run(train_tiny))


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path, monkeypatch, train_tiny):
    from capsexp.training import train

    def signalled(model, loss, batch, position, settings, **options):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(train, "gradients", signalled)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path)
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "interrupted"


def test_signals_behave_as_before_after_a_run(tmp_path, train_tiny):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train_tiny(tmp_path, "trainer.max_steps=1")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_profile_tells_what_the_steps_spent(tmp_path, train_tiny):
    train_tiny(tmp_path, "trainer.profile=true", "trainer.max_epochs=2")
    assert "aten::" in (tmp_path / "profile.txt").read_text()
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_a_metrics_file_cut_by_hand_is_refused(tmp_path, monkeypatch, train_tiny):
    killed_at(8, monkeypatch, train_tiny, tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl is shorter"):
        train_tiny(tmp_path)


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path, monkeypatch, train_tiny, whole_run, capsys
):
    killed_at(9, monkeypatch, train_tiny, tmp_path)
    newest = checkpoint.saved(tmp_path / "checkpoints")[-1]
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    train_tiny(tmp_path)
    assert f"{newest}: refused" in capsys.readouterr().out
    assert_same_run(tmp_path, whole_run(train_tiny))


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_nothing(tmp_path, tiny_overrides):
    """Ten kills and more, some inside a save; the same command each time; then compare with one quiet run."""
    import random
    import time

    overrides = [text for text in tiny_overrides if not text.startswith(("model.", "trainer.limit"))]
    overrides += ["trainer.max_epochs=6", "trainer.save_every=1", "model.conv_channels=128"]
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"

    def command(path):
        return [sys.executable, "-m", "capsexp", "train", f"run={path}", *overrides]

    subprocess.run(command(quiet), check=True, capture_output=True)
    chance, kills, inside_a_save, code = random.Random(0), 0, 0, None
    while code is None:
        process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        # Steps take milliseconds beside the start of a process: wait for the first sign of this one's work.
        told = {}
        while process.poll() is None and ("step" not in told or len(told["resumes"]) < kills):
            time.sleep(0.002)
            told = RunDir(killed).status()
        if kills % 2 == 0:
            deadline = time.monotonic() + 2
            while process.poll() is None and time.monotonic() < deadline:
                if any((killed / "checkpoints").glob(".*.tmp")):
                    inside_a_save += 1
                    break
        else:
            time.sleep(chance.uniform(0, 0.15))
        if kills < 8 and process.poll() is None:
            process.kill()
            kills += 1
            process.wait()
            process.stderr.close()
        else:
            _, errors = process.communicate()
            code = process.returncode
            assert code == 0, errors.decode()
    assert kills >= 7
    assert inside_a_save >= 2
    assert len(RunDir(killed).status()["resumes"]) == kills
    assert_same_run(killed, quiet)


@pytest.mark.compile
def test_a_compiled_run_learns_like_a_plain_one_and_its_checkpoints_are_the_same_kind(
    tmp_path, train_tiny, metrics_of
):
    train_tiny(tmp_path / "plain", "trainer.max_steps=3")
    train_tiny(tmp_path / "compiled", "trainer.max_steps=3", "trainer.compile=true")
    plain, compiled = (metrics_of(tmp_path / name) for name in ("plain", "compiled"))
    assert compiled[2]["train/loss"] == pytest.approx(plain[2]["train/loss"], rel=1e-4)
    names = [set(final_state(tmp_path / name)["model"]) for name in ("plain", "compiled")]
    assert names[0] == names[1]


def test_without_validation_pictures_the_last_weights_are_the_best(tmp_path, train_tiny):
    train_tiny(tmp_path, "dataset.validation=0", "trainer.max_epochs=2")
    checkpoints = tmp_path / "checkpoints"
    assert (checkpoints / "best.pt").resolve() == (checkpoints / "last.pt").resolve()
