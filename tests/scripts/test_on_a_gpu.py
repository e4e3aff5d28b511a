"""`scripts/on_a_gpu.sh` with its heavy parts replaced: what it writes, its exit status, its time limits."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from capsexp.analysis.speed import measure
from capsexp.errors import UserError
from scripts.on_a_gpu import __main__ as command
from scripts.on_a_gpu import child, gpu_tests, machine, parity, speed, training
from scripts.on_a_gpu.child import Child, run_child
from scripts.on_a_gpu.parts import Outcome, Part, Plan, run_parts

SHELL = Path(__file__).parents[2] / "scripts" / "on_a_gpu.sh"
PYTEST = """
tests/a.py::test_one[1] PASSED                                           [ 25%]
[gw1] [ 50%] PASSED tests/a.py::test_one[2]
[gw0] [ 75%] FAILED tests/b.py::test_two
tests/b.py::test_three SKIPPED (no accelerator)                          [100%]
=========================== short test summary info ============================
FAILED tests/b.py::test_two - AssertionError: 1 != 2
"""
PASSING = "tests/a.py::test_one PASSED  [100%]\n"
PLAN = Plan(cpu=True, folder=Path(), minutes=10)


@pytest.fixture
def light(monkeypatch):
    """What takes long is replaced by what it would answer: all processes of the parts."""

    def run(arguments, *, end, text="", environment=None):
        program = " ".join(arguments)
        if "pytest" in arguments:
            return Child(0, PASSING, "", in_time=True)
        if "parity" in program:
            errors = {"plain": 1e-7, "kernels": 1e-7, "kernels64": 1e-16}
            return Child(0, json.dumps([parity.entry("class_caps", "poses", errors)]), "", in_time=True)
        if "machine" in program:
            described = {"versions": {"torch": "2", "triton": "3"}, "gpu": None, "commit": "abc", "cores": 2}
            return Child(0, json.dumps(described), "", in_time=True)
        directory = Path(next(text for text in arguments if text.startswith("run=")).removeprefix("run="))
        directory.mkdir()
        status = {"status": "completed", "step": 20, "training_seconds": 2.0}
        (directory / "status.json").write_text(json.dumps({**status, "results": {"test/accuracy": 0.9}}))
        (directory / "resolved_config.yaml").write_text("trainer: {batch_size: 32}")
        return Child(0, "", "", in_time=True)

    for module in (command, gpu_tests, parity, training):
        monkeypatch.setattr(module, "run_child", run)
    monkeypatch.setattr(measure, "in_process", measuring())


def measuring(*, fits=2, error=MemoryError):
    """A measurement of at most so many networks; of more, an error."""

    def measured(kind, variants, *, plugins, limit, timeout):
        if len(variants) > fits:
            raise error("too much")
        seconds = {name: [0.5 * number] * 3 for number, name in enumerate(variants, 1)}
        return {"batch": 2, "training": seconds, "floor": 0.1, "bytes": 10, "bandwidth": 100.0}

    return measured


def soon():
    return time.monotonic() + 99


def test_a_dry_run_writes_both_files_with_all_sections(light, tmp_path, capsys):
    assert command.main(["--cpu", str(tmp_path / "new")]) == 0
    report = json.loads((tmp_path / "new" / "on_a_gpu.json").read_text())
    assert [part["part"] for part in report["parts"]] == ["tests", "parity", "speed", "training"]
    assert {part["status"] for part in report["parts"]} == {report["status"]} == {"ok"}
    assert report["dry_run"]
    row, *others = report["parts"][2]["result"]["rows"]
    assert [row["network"] for row in (row, *others)] == ["68K", "310K", "CapsNet"]
    assert row["images/s"] == {"routing": 4, "reference": 2, "reference, compiled": "not in a dry run"}
    assert (row["ratio"], row["floor, images/s"], row["floor, share"]) == ({"reference": 2}, 20, 0.2)
    assert report["parts"][3]["result"]["images/s"] == 320
    page = (tmp_path / "new" / "on_a_gpu.md").read_text()
    for text in ("# capsexp on a CPU", "A dry run", "commit abc", "triton 3", "1 passed", "test error: 0.1"):
        assert text in page
    for number, title in enumerate(("GPU tests", "Parity with float64", "Speed", "Training"), 1):
        assert f"## {number}. {title}" in page
    assert "| 68K | 2 | 4 | 2 | 2 | not in a dry run |  | 20 | 20.0% |" in page
    assert "written: " in capsys.readouterr().out


def test_parts_can_be_chosen(light, tmp_path):
    command.main(["--cpu", str(tmp_path), "--only", "training", "tests"])
    report = json.loads((tmp_path / "on_a_gpu.json").read_text())
    assert [part["part"] for part in report["parts"]] == ["tests", "training"]


def test_a_part_that_fails_does_not_stop_the_others(light, tmp_path, monkeypatch):
    def broken(plan, end):
        raise RuntimeError("an illegal memory access\nand more")

    parts = [part._replace(run=broken) if part.name == "parity" else part for part in command.PARTS]
    monkeypatch.setattr(command, "PARTS", tuple(parts))
    assert command.main(["--cpu", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "on_a_gpu.json").read_text())
    assert [part["status"] for part in report["parts"]] == ["ok", "failed", "ok", "ok"]
    assert report["parts"][1]["message"] == "RuntimeError: an illegal memory access"
    assert "RuntimeError: an illegal memory access" in (tmp_path / "on_a_gpu.md").read_text()


def test_each_part_has_its_time_and_what_earlier_ones_leave_over():
    ends, begin = [], time.monotonic()

    def note(plan, end):
        ends.append(end - begin)
        child.require_time(end)
        return Outcome("ok", "", {})

    parts = [Part("a", "A", 30, note), Part("b", "B", 50, note), Part("c", "C", -99, note)]
    entries = run_parts(parts, PLAN._replace(minutes=20), lambda entries: None)
    assert ends == pytest.approx([60, 160, -38], abs=5)
    assert [entry["status"] for entry in entries] == ["ok", "ok", "out of time"]
    assert sum(part.seconds for part in command.PARTS) <= 585  # the start, and the end of what is stopped


def test_a_process_that_takes_too_long_is_stopped_with_its_children(monkeypatch, tmp_path):
    monkeypatch.setattr(child, "GRACE", 1)
    mark = tmp_path / "mark"
    late = f"import time; time.sleep(99); open({str(mark)!r}, 'w')"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {late!r}])"
    begin = time.monotonic()
    done = run_child([sys.executable, "-c", program], end=begin + 1)
    assert not done.in_time
    assert time.monotonic() < begin + 60
    assert not mark.exists()
    with pytest.raises(TimeoutError, match="no time was left to start"):
        run_child([sys.executable, "-c", ""], end=time.monotonic())


def test_the_last_words_of_a_process_are_those_on_stderr():
    assert Child(1, "out\n", "a\nb\n\n", in_time=True).last_line() == "b"
    assert Child(1, "out\n", "", in_time=True).last_line() == "out"
    assert Child(-9, "", "", in_time=True).last_line() == "no message, exit code -9"


def test_without_a_card_there_is_one_line_and_status_2(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "has_card", lambda: False)
    assert command.main([str(tmp_path)]) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith("on_a_gpu: PyTorch ")
    assert error.endswith(" finds no CUDA card; --cpu makes a dry run\n")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan"])
def test_impossible_minutes_are_refused(text, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--minutes", text])
    assert stop.value.code == 2
    assert "must be > 0" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command.main(["--cpu", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith(f"capsexp: on_a_gpu: cannot write to {tmp_path / 'file'}: ")


def test_results_of_pytest_are_counted_also_if_it_is_stopped():
    counts, failures = gpu_tests.results(PYTEST)
    assert counts == {"passed": 2, "failed": 1, "skipped": 1}
    assert failures == ["tests/b.py::test_two - AssertionError: 1 != 2"]
    assert gpu_tests.outcome(Child(1, PYTEST, "", in_time=True)).status == "failed"
    late = gpu_tests.outcome(Child(2, PASSING, "", in_time=False))
    assert (late.status, late.message) == ("out of time", "1 passed, then stopped")
    none = gpu_tests.outcome(Child(2, "", "", in_time=False))
    assert (none.status, none.message) == ("out of time", "stopped before a test came to its end")
    skipped = "tests/a.py::test_one SKIPPED (x) [100%]"
    assert gpu_tests.outcome(Child(0, skipped, "", in_time=True)).status == "failed"


def test_the_files_with_tests_for_a_card_are_found():
    names = {path.name for path in gpu_tests.files_with_mark(child.ROOT / "tests")}
    assert {"test_em_triton.py", "test_dynamic_triton.py", "test_preprocess.py"} <= names
    assert "test_em.py" not in names


def is_ok(**errors):
    return parity.entry("layer", "poses", {"plain": 1e-6, "kernels": 0.0, "kernels64": 0.0, **errors})["ok"]


def test_a_tolerance_is_in_proportion_to_the_rounding_of_plain_torch():
    assert is_ok(kernels=1e-5)
    assert not is_ok(kernels=1.2e-5)
    assert is_ok(kernels64=9e-11)
    assert not is_ok(kernels64=2e-10)
    assert not is_ok(plain=1e30, kernels=0.5)


def test_a_result_that_is_not_a_number_is_not_within_any_tolerance():
    nan = torch.tensor([float("nan"), 1.0])
    assert parity.relative_error(nan, torch.ones(2, dtype=torch.float64)) == parity.WORST
    assert not is_ok(kernels=parity.WORST)


def test_the_outcome_of_parity_names_what_is_wrong():
    errors = {"plain": 1e-6, "kernels": 1e-2, "kernels64": 0.0}
    bad, good = (
        parity.entry("class_caps", "poses", errors),
        parity.entry("a", "b", {**errors, "kernels": 0.0}),
    )
    outcome = parity.judge({"68K": {"tensors": [good, bad]}, "310K": {"error": "RuntimeError: no"}})
    assert outcome.status == "failed"
    assert outcome.message.startswith(
        "1 of 2 tensors within their tolerance; 68K, class_caps, poses: 1.0e-02"
    )
    assert outcome.message.endswith("; 310K: RuntimeError: no")
    assert parity.judge({"68K": {"tensors": [good]}}).status == "ok"
    assert parity.judge({"68K": {"error": "stopped", "late": True}}).status == "out of time"


def test_networks_that_do_not_fit_together_are_measured_alone(monkeypatch):
    monkeypatch.setattr(measure, "in_process", measuring(fits=1))
    found = speed.measured({"routing": 0, "reference": 0}, False, PLAN, soon())
    assert found["images/s"] == {"routing": 4, "reference": 4}
    monkeypatch.setattr(measure, "in_process", measuring(fits=0))
    found = speed.measured({"routing": 0, "reference": 0}, False, PLAN, soon())
    assert found == {"images/s": {"routing": "out of memory", "reference": "out of memory"}}


def test_a_measurement_that_takes_too_long_keeps_the_fused_network(monkeypatch):
    monkeypatch.setattr(measure, "in_process", measuring(fits=1, error=TimeoutError))
    for cpu, reason in ((False, "more than 60 s"), (True, "no time left")):
        found = speed.measured({"routing": 0, "reference": 0}, False, PLAN._replace(cpu=cpu), soon())
        assert found["images/s"] == {"routing": 4, "reference": reason}
    found = speed.measured({"routing": 0}, False, PLAN, time.monotonic())
    assert found == {"images/s": {"routing": "no time left"}}


def test_a_measurement_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(measure, "in_process", measuring(fits=0, error=UserError))
    found = speed.measured({"routing": 0}, False, PLAN, soon())
    assert found == {"images/s": {"routing": "failed: too much"}}


@pytest.mark.parametrize(
    ("speeds", "status"),
    [
        ({"routing": 1.0, "reference": speed.OUT_OF_MEMORY, speed.COMPILED: speed.NO_TIME}, "ok"),
        ({"routing": 1.0, "reference": speed.NO_TIME}, "out of time"),
        ({"routing": 1.0, "reference": "failed: RuntimeError: no"}, "failed"),
        ({"routing": speed.OUT_OF_MEMORY, "reference": speed.OUT_OF_MEMORY}, "failed"),
    ],
)
def test_the_outcome_of_speed(speeds, status):
    assert speed.judge([{"network": "68K", "batch": 64, "images/s": speeds}]).status == status


def test_without_smallnorb_the_digits_are_trained_on_and_the_report_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("CAPSEXP_DATA", str(tmp_path))
    recipe, note = training.recipe_for_data()
    assert recipe == "quickstart_em"
    assert note == f"no smallNORB in {tmp_path} (CAPSEXP_DATA): embedded digits instead"


def test_a_training_that_fails_says_why(monkeypatch, tmp_path):
    said = Child(1, "", "more\ncapsexp: out of memory\n", in_time=True)
    monkeypatch.setattr(training, "run_child", lambda *arguments, **options: said)
    outcome = training.run(PLAN._replace(folder=tmp_path), soon())
    assert (outcome.status, outcome.message) == ("failed", "capsexp: out of memory")


def test_a_machine_that_cannot_be_described_does_not_stop_the_report(light, monkeypatch, tmp_path):
    broken = Child(1, "", "OSError: no driver\n", in_time=True)
    monkeypatch.setattr(command, "run_child", lambda *arguments, **options: broken)
    assert command.main(["--cpu", str(tmp_path), "--only", "tests"]) == 0
    assert "could not be described: OSError: no driver" in (tmp_path / "on_a_gpu.md").read_text()


def test_the_machine_is_described_without_its_owner():
    described = json.loads(json.dumps(machine.machine()))
    assert not {"host", "pid"} & described.keys()
    assert {"processor", "gpu", "driver", "cuda", "commit", "tf32"} <= described.keys()
    assert described["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_the_kernels_do_what_plain_torch_does_through_the_operator_that_cuda_takes():
    pytest.importorskip("triton", reason="Triton is not installed: it is built for Linux only")
    outcome = parity.run(PLAN, time.monotonic() + 600)
    assert outcome.status == "ok", outcome.message
    assert set(outcome.result["cases"]) == {"tiny EM", "tiny CapsNet"}


@pytest.mark.parametrize("installed", [True, False])
def test_the_shell_script_makes_the_environment_only_if_there_is_none(tmp_path, installed):
    (tmp_path / "scripts").mkdir()
    shutil.copy(SHELL, tmp_path / "scripts")
    (tmp_path / "python").write_text('#!/bin/sh\necho "$PYTHONPATH $@"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "Makefile").write_text("install:\n\techo made\n\tmkdir -p .venv/bin\n\tcp python .venv/bin\n")
    if installed:
        subprocess.run(["make", "-s", "install"], cwd=tmp_path, check=True, capture_output=True)
    script = tmp_path / "scripts" / SHELL.name
    done = subprocess.run([script, "here", "--cpu"], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{tmp_path} -P -m scripts.on_a_gpu here --cpu"
    assert ("made" in done.stdout.splitlines()) != installed
    assert os.access(SHELL, os.X_OK)
