import contextlib
import io
import json
import re
import shutil
import subprocess
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
import torch

from capsexp.analysis.speed import measure
from capsexp.config.build import build_components
from capsexp.config.compose import compose, to_plain
from capsexp.dataset.digits import Digits
from capsexp.training import memory, train
from capsexp.training.memory import OutOfMemoryError, explain_out_of_memory, is_out_of_memory, peak_resident

OLD_RUN = Path(__file__).parents[1] / "config" / "old_run"


def raises(error):
    def allocate(*arguments, **keywords):
        raise error

    return allocate


ERRORS = {
    "torch, CPU": lambda: torch.empty(2**58),
    "NumPy": lambda: np.empty(2**58),
    "Python": lambda: bytearray(2**62),
    "CUDA": raises(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")),
    "CUDA driver": raises(RuntimeError("CUDA error: out of memory")),
    "cuBLAS": raises(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")
    ),
    "MPS": raises(RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)")),
    "C++": raises(RuntimeError("std::bad_alloc")),
    "macOS": raises(RuntimeError("[enforce fail] . DefaultCPUAllocator: not enough memory: you tried")),
    "system": raises(OSError(12, "Cannot allocate memory")),
}


def components_and_config(*overrides):
    config = to_plain(compose("train", ["device=cpu", *overrides], config_dir=None))
    return build_components(config, plugins=[]), config


def explained(allocate, *overrides, training=True):
    """The message for a run whose allocation fails."""
    explaining = explain_out_of_memory(*components_and_config(*overrides), training=training)
    with pytest.raises(OutOfMemoryError) as caught, explaining:
        allocate()
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ERRORS)
def test_the_errors_of_every_allocator_are_known(name):
    with pytest.raises((MemoryError, RuntimeError, OSError)) as caught:
        ERRORS[name]()
    assert is_out_of_memory(caught.value)


def test_an_explanation_is_one_line_with_parts_settings_and_the_allocators_words():
    message = explained(ERRORS["torch, CPU"])
    assert re.match(r"out of memory, with a peak of [\d,]+ MiB\. The largest part", message)
    assert "To make them smaller: " in message
    assert "; the allocator says: " in message


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError(2, "No such file"), KeyError()],
)
def test_other_errors_are_unchanged(error):
    with (
        pytest.raises(type(error)) as caught,
        explain_out_of_memory(*components_and_config(), training=True),
    ):
        raise error
    assert caught.value is error


LARGE_IMAGES = ["model=dynamic_routing", "dataset.preprocess.resize=224", "trainer.batch_size=2"]
CASES = {
    "class capsules": (
        ["model.decoder=null", "model.primary_types=8", *LARGE_IMAGES],
        r"The largest part: [\d,]+ parameters of class_caps with gradients and optimizer, [\d,]+ MiB\.",
        ["dataset.preprocess.resize=112", "model.primary_stride=4", "model.primary_types=4"],
    ),
    "decoder": (
        ["model.decoder.hidden=[8,20000]", "model.primary_types=1", "dataset.preprocess.resize=100"],
        r"The largest part: [\d,]+ parameters of decoder with gradients and optimizer, [\d,]+ MiB\.",
        ["model.decoder=null", "dataset.preprocess.resize=50"],
    ),
    "kernels": (
        ["model.conv_channels=4000", "trainer.batch_size=1"],
        r"The largest part: [\d,]+ parameters of primary_caps with gradients and optimizer, [\d,]+ MiB\.",
        ["model.conv_channels=2000", "model.primary_types=4"],
    ),
    "fully connected": (
        [
            "model=cnn_sabour",
            "model.conv_channels=[4,4]",
            "model.hidden=[500]",
            "dataset.preprocess.resize=64",
        ],
        r"The largest parts?: .*8,\d+,\d+ parameters of layers with gradients and optimizer, 1\d\d MiB",
        ["dataset.preprocess.resize=32", "model.hidden=[250]"],
    ),
    "batch": (
        ["trainer.batch_size=5000", "model.conv_channels=32"],
        r"The largest part: the outputs of the layers for a batch of 5000 images, [\d,]+ MiB\.",
        ["trainer.batch_size=2500", "trainer.accumulate=2", "dataset.preprocess.resize=4"],
    ),
    "votes": (
        ["model.votes_mib=40000", "model.class_dim=500", "trainer.batch_size=5000", "model.decoder=null"],
        r"the votes of class_caps for 5000 images, [\d,]+ MiB",
        ["model.votes_mib=6103", "trainer.batch_size=2500"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_message_names_what_is_large_and_what_makes_that_smaller(name):
    overrides, part, settings = CASES[name]
    message = explained(ERRORS["Python"], *overrides)
    assert re.search(part, message)
    advice = message.partition("To make them smaller: ")[2].partition(";")[0].split(", ")
    assert [setting for setting in settings if setting not in ", ".join(advice)] == []
    assert ("trainer.batch_size" in message) is (name in ("batch", "votes"))


def test_a_batch_is_not_blamed_for_parameters_and_parameters_not_for_a_batch():
    assert "batch" not in explained(ERRORS["NumPy"], *LARGE_IMAGES).partition("the allocator")[0]
    assert "parameters" not in explained(ERRORS["NumPy"], "trainer.batch_size=5000")


def test_without_training_there_are_no_gradients_and_no_pieces_of_a_batch():
    for overrides in (LARGE_IMAGES, ["trainer.batch_size=5000"]):
        message = explained(ERRORS["NumPy"], *overrides, training=False)
        assert "gradients" not in message
        assert "accumulate" not in message


def test_images_that_are_too_many_to_read_are_named(monkeypatch):
    monkeypatch.setattr(Digits, "_load", raises(MemoryError("no room")))
    message = explained(
        lambda: components_and_config()[0].dataset.read("train"), "dataset.preprocess.resize=[20,30]"
    )
    assert "The largest part: the images of dataset digits, which are kept in memory." in message
    assert "To make them smaller: dataset.preprocess.resize=[10,15]; the allocator says: no room" in message


def test_a_network_whose_sizes_cannot_be_computed_leaves_general_advice(monkeypatch):
    monkeypatch.setattr(memory, "memory_parts", raises(TypeError("no fake tensors")))
    message = explained(ERRORS["NumPy"])
    assert (
        "Try trainer.batch_size=1, smaller images (dataset.preprocess.resize) or a smaller network" in message
    )
    assert message.endswith("(its sizes cannot be computed: no fake tensors)")


@pytest.mark.parametrize(
    ("command", "work"),
    [
        (["eval"], "capsexp.analysis.evaluate_run.evaluate_run"),
        (["predict", "digit.png"], "capsexp.analysis.predict.predict"),
        (["analyze", "study=reconstructions"], "capsexp.analysis.analyze.analyze"),
        (["bench"], "capsexp.analysis.speed.bench.bench"),
        (["bench", "growth=cost.png"], "capsexp.analysis.speed.growth.growth"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_command_that_runs_a_network_explains(command, work, capsexp, tmp_path, monkeypatch):
    monkeypatch.setattr(work, raises(MemoryError("no room")))
    name, *arguments = command
    if name != "bench":
        shutil.copytree(OLD_RUN, tmp_path / "run", symlinks=True)
        arguments += [f"run={tmp_path / 'run'}"]
    code, _, error = capsexp(name, *arguments)
    assert code == 1
    assert re.fullmatch(r"capsexp: out of memory, .* To make .* no room\n", error.splitlines(True)[-1])
    assert "Traceback" not in error


def test_other_commands_say_that_memory_is_full(capsexp, monkeypatch):
    monkeypatch.setattr("capsexp.data.prepare.run_action", raises(MemoryError("no room")))
    assert capsexp("data", "verify", "digits")[::2] == (1, "capsexp: out of memory: no room\n")


def test_a_measurement_in_another_process_is_explained_in_this_one(monkeypatch):
    task = {"kind": "peak", "variants": {}, "plugins": []}
    monkeypatch.setattr(measure, "measure", raises(RuntimeError("std::bad_alloc")))
    with unittest.mock.patch("sys.stdin", io.StringIO(json.dumps(task))):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            measure.answer()
    child = subprocess.CompletedProcess([], 0, stdout=output.getvalue())
    monkeypatch.setattr(measure.subprocess, "run", lambda *arguments, **options: child)
    with pytest.raises(MemoryError, match="bad_alloc"):
        measure.in_process("peak", {}, plugins=[])


@pytest.mark.parametrize("target", ["accumulate_gradients", "start_state", "evaluate"])
def test_a_run_that_is_out_of_memory_ends_as_failed_wherever_that_happens(
    target, capsexp, tiny_overrides, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, target, raises(RuntimeError("DefaultCPUAllocator: can't allocate memory")))
    code, _, error = capsexp("train", *tiny_overrides, f"run={tmp_path / 'run'}")
    assert code == 1
    assert re.fullmatch(r"capsexp: out of memory, .*largest part.*can't allocate memory\n", error)


def test_the_peak_is_in_bytes():
    assert 2**25 < peak_resident() < 2**40
