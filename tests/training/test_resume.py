"""Runs that stop at any moment and resume bit for bit."""

import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from capsexp.errors import UserError
from capsexp.schedule import Step
from capsexp.training import checkpoint
from capsexp.training.budget import Budget
from capsexp.training.run_dir import RunDir
from capsexp.training.saved_state import saved_position
from capsexp.training.state import State

STEPS = 15  # of a whole tiny run


def test_a_run_is_calibrated_once_and_not_again_when_it_resumes(tmp_path, monkeypatch, kill_at, train_tiny):
    from capsexp.model.dynamic_routing import CapsNet

    starts = []
    real = CapsNet.calibrate
    monkeypatch.setattr(
        CapsNet, "calibrate", lambda net, images: starts.append(len(images)) or real(net, images)
    )
    kill_at(4, tmp_path, "routing=em")
    train_tiny(tmp_path, "routing=em")
    assert starts == [100]


@pytest.mark.parametrize("step", [1, 2, 4, 5, 9, 14])
def test_a_run_resumed_at_any_step_is_the_same_bit_for_bit(
    step, tmp_path, kill_at, train_tiny, whole_run, assert_same_run
):
    kill_at(step, tmp_path)
    train_tiny(tmp_path)
    assert_same_run(tmp_path, whole_run())


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
def test_every_option_survives_a_resume(overrides, tmp_path, kill_at, train_tiny, whole_run, assert_same_run):
    kill_at(8, tmp_path, *overrides)
    train_tiny(tmp_path, *overrides)
    assert_same_run(tmp_path, whole_run(*overrides))


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(["model=cnn_sabour", "model.conv_channels=[4,4]", "model.hidden=[8,8]"], id="dropout"),
        pytest.param(["model=cluster_small", "trainer.ema_decay=0.9"], id="cluster routing, stairs"),
        pytest.param(
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
            id="matrix capsules, a balanced start, ramps",
        ),
        pytest.param(
            [
                "model=trunk_caps",
                "model.channels=[4,4]",
                "model.strides=[1,2]",
                "model.primary_types=2",
                "model.dense_types=[3]",
                "model.initialisation=orthogonal",
                "model.norm=batch",
                "routing.beta_start=0.5",
                "trainer.ema_decay=0.9",
            ],
            id="Heinsen routing, running means of the trunk",
        ),
        pytest.param(
            ["model=pool", "model.channels=[4,4]", "model.strides=[1,2]", "trainer.accumulate=2"],
            id="the trunk alone",
        ),
        pytest.param(
            [
                "model=vb",
                "model.conv_types=[4]",
                "model.conv_kernels=[2]",
                "model.conv_strides=[1]",
                "trainer.ema_decay=0.9",
            ],
            id="running means of capsule norms, a gain",
        ),
        pytest.param(
            [
                "model=self_routing",
                "model.trunk.stem=4",
                "model.trunk.channels=[4,6]",
                "model.trunk.blocks=[1,1]",
                "model.trunk.strides=[1,2]",
                "model.primary_types=2",
                "model.conv_types=[3]",
                "model.conv_kernels=[3]",
                "model.conv_strides=[1]",
                "trainer.ema_decay=0.9",
            ],
            id="self-routing",
        ),
        pytest.param(
            [
                "model=concurrent",
                "model.trunk.stem=4",
                "model.trunk.channels=[4]",
                "model.trunk.blocks=[1]",
                "model.trunk.strides=[2]",
                "model.primary_types=2",
                "model.conv_types=[3]",
                "model.conv_kernels=[3]",
                "model.conv_strides=[1]",
            ],
            id="concurrent",
        ),
        pytest.param(
            [
                "model=efficient",
                "model.conv_channels=[8,16]",
                "model.conv_kernels=[3,3]",
                "model.conv_strides=[1,2]",
                "trainer.ema_decay=0.9",
            ],
            id="self-attention, batch normalization",
        ),
    ],
)
def test_other_networks_resume_bit_for_bit(network, tmp_path, kill_at, tiny_overrides, assert_same_run):
    from capsexp.config.build import build_components
    from capsexp.config.compose import compose, to_plain
    from capsexp.training.train import train

    overrides = [override for override in tiny_overrides if not override.startswith("model.")]
    settings = to_plain(compose("train", [*overrides, *network], config_dir=None))

    def run(path):
        directory = RunDir(path)
        with directory.locked(), directory.track_status({}):
            train(build_components(settings, plugins=[]), directory, settings)

    run(tmp_path / "whole")
    kill_at(7, tmp_path / "resumed", run=run)
    run(tmp_path / "resumed")
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_a_run_that_dies_between_the_last_step_and_the_test_resumes_bit_for_bit(
    tmp_path, monkeypatch, train_tiny, whole_run, assert_same_run, stop_at
):
    from capsexp.training import train

    real = train.evaluate

    def dying(model, batches, loss, step, **options):
        if step.number == STEPS:
            raise stop_at
        return real(model, batches, loss, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", dying)
        with pytest.raises(stop_at):
            train_tiny(tmp_path)
    train_tiny(tmp_path)
    assert_same_run(tmp_path, whole_run())


# A changed config


def test_a_changed_config_is_refused_unless_forced(tmp_path, train_tiny, metrics_of):
    train_tiny(tmp_path)
    with pytest.raises(UserError, match=r"trainer\.max_epochs: was 3, is 4"):
        train_tiny(tmp_path, "trainer.max_epochs=4")
    train_tiny(tmp_path, "trainer.max_epochs=4", "resume=force")
    assert max(line["step"] for line in metrics_of(tmp_path)) == 20


def test_a_resumed_run_that_is_already_too_long_trains_no_further(
    tmp_path, kill_at, train_tiny, metrics_of, final_state
):
    kill_at(9, tmp_path)  # the checkpoint is of step 8, inside an epoch
    train_tiny(tmp_path, "trainer.max_steps=6", "resume=force")
    assert final_state(tmp_path)["step"] == 8
    assert "test/accuracy" in metrics_of(tmp_path)[-1]


def test_a_checkpoint_has_the_length_of_the_run_with_its_last_config(
    tmp_path, kill_at, train_tiny, final_state
):
    kill_at(9, tmp_path)
    assert saved_position(final_state(tmp_path)) == Step(8, STEPS)
    train_tiny(tmp_path, "trainer.max_epochs=4", "resume=force")
    assert saved_position(final_state(tmp_path)) == Step(20, 20)


def test_an_older_checkpoint_without_the_length_of_its_run_resumes(tiny_components):
    components = tiny_components()
    model = components.new_model()
    state = State(model, components.new_optimizer(model.parameters(), lr=0.1), None, budget=Budget(9))
    state.step = 4
    saved = state.state_dict([{"random": torch.get_rng_state(), "random_cuda": []}])
    assert saved_position(saved) == Step(4, 9)
    del saved["total"]
    assert saved_position(saved) == Step(4, 4)
    state.restore(saved)
    assert state.position == Step(4, 9)


# Damaged files


def test_a_shortened_metrics_file_is_refused(tmp_path, kill_at, train_tiny):
    kill_at(8, tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl is shorter"):
        train_tiny(tmp_path)


def test_a_damaged_last_checkpoint_is_reported_and_the_previous_one_is_used(
    tmp_path, kill_at, train_tiny, whole_run, assert_same_run, capsys
):
    kill_at(9, tmp_path)
    newest = checkpoint.list_saved(tmp_path / "checkpoints")[-1]
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    train_tiny(tmp_path)
    assert f"{newest}: refused" in capsys.readouterr().out
    assert_same_run(tmp_path, whole_run())


def is_saving(path):
    return any((path / "checkpoints").glob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=pytest.mark.soak)])
def test_kill_9_at_any_moment_changes_nothing(kills, tmp_path, tiny_overrides, assert_same_run):
    """Kill a run many times, every second time inside a save, and compare it with an uninterrupted one."""
    overrides = [
        override for override in tiny_overrides if not override.startswith(("model.", "trainer.limit"))
    ]
    # An epoch has 13 steps, and between two kills there are about four.
    overrides += [
        f"trainer.max_epochs={max(6, kills // 2)}",
        "trainer.save_every=1",
        "model.conv_channels=128",
    ]
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"

    def command(path):
        return [sys.executable, "-m", "capsexp", "train", f"run={path}", *overrides]

    subprocess.run(command(quiet), check=True, capture_output=True)
    chance, inside_a_save = random.Random(0), 0
    for number in range(kills):
        process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Starting a process takes far longer than a step: wait until this one has begun to train.
        status = {}
        while process.poll() is None and ("step" not in status or len(status["resumes"]) < number):
            time.sleep(0.002)
            status = RunDir(killed).status()
        if number % 2:
            time.sleep(chance.uniform(0, 0.15))
        else:
            while process.poll() is None and not is_saving(killed):
                pass
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run has ended before it was killed"
        inside_a_save += is_saving(killed)
    done = subprocess.run(command(killed), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # A save takes a tenth of a step, and a kill after it was seen takes microseconds.
    assert inside_a_save >= kills // 4
    assert len(RunDir(killed).status()["resumes"]) == kills
    assert_same_run(killed, quiet)
