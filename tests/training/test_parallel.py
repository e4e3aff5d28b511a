"""Runs of several processes: they compute the same as one process, and write and end like one.

Most tests read the results of a single start of two processes, because each start takes seconds.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from capsexp.cli import agreement, torchrun
from capsexp.cli import entry as cli
from capsexp.config.build import build_components
from capsexp.config.compose import compose, to_plain
from capsexp.errors import UserError
from capsexp.ops.processes import ProcessLostError, detect_lost_process
from capsexp.training.parallel import (
    SINGLE,
    ProcessGroup,
    check,
)
from capsexp.training.run_dir import RunDir
from capsexp.training.splits import read_splits, require_same_images

HERE = Path(__file__).resolve().parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
CAPSEXP = (sys.executable, "-m", "capsexp")
TIMEOUT = 600  # seconds; the processes take ten on an idle machine
LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}


def script():
    """Load the module that the processes run; pytest does not put it where `import` finds it."""
    spec = importlib.util.spec_from_file_location("distributed_worker", HERE / "distributed_worker.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(**more):
    """Return the variables of a process with one thread that imports this checkout and these tests."""
    paths = [os.environ["PYTHONPATH"], str(HERE)]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        **more,
    }


@contextlib.contextmanager
def ended(processes):
    """Wait for processes to end and return their output; leave none behind."""
    try:
        yield [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for stop in (subprocess.Popen.terminate, subprocess.Popen.kill):
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    stop(process)  # does nothing if it has ended
                    process.wait(timeout=40)


def run_in_two(*command, cwd, **variables):
    """Run a command in two processes, as torchrun starts them; return code, stdout and stderr of each."""
    # Like torchrun, keep the store in a process of its own.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    address = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    options = {"cwd": cwd, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = []
    for rank in ("0", "1"):
        own = LAUNCHED | address | {"RANK": rank, "LOCAL_RANK": rank}
        processes.append(subprocess.Popen([*command], env=environment(**own, **variables), **options))
    with ended(processes) as outputs:
        return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("several")


@pytest.fixture(scope="module")
def reports(folder):
    """The report of each process of distributed_worker.py, by rank."""
    ends = run_in_two(sys.executable, HERE / "distributed_worker.py", folder, cwd=folder)
    assert [code for code, _, _ in ends] == [0, 0], [error for _, _, error in ends]
    assert ends[1][1:] == ("", "")
    (folder / "stdout").write_text(ends[0][1])
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


# Gradients, metrics and weights


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["dynamic", "em"])
@pytest.mark.parametrize(("accumulate", "size"), [(1, 33), (3, 33), (1, 2)])
def test_gradients_and_metrics_are_those_of_one_process(routing, accumulate, size, reports):
    first, second = [report[f"{routing} {accumulate} {size}"] for report in reports]
    assert first["torch.float64"]["to one process"] < 1e-10
    single = first["torch.float32"]
    assert single["to float64"] <= 2 * single["of one process to float64"] + 1e-6
    for dtype in first:
        assert first[dtype] == second[dtype]
        assert first[dtype]["same in all"]
        for ours, theirs in first[dtype]["metrics"].values():
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("size", [33, 2])
def test_batch_norms_take_the_means_of_all_processes(size, reports):
    first, second = [report[f"norms 1 {size}"] for report in reports]
    assert first["torch.float64"]["to one process"] < 1e-9
    for dtype in first:
        assert first[dtype] == second[dtype]
        assert first[dtype]["same in all"]
        for ours, theirs in first[dtype]["metrics"].values():
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_all_processes_start_with_the_parameters_and_buffers_of_rank_0(reports):
    first, second = [report["broadcast"] for report in reports]
    assert first == second
    assert first["windows"] == [0, 1, 2, 3]
    assert (first["seen"], first["number"]) == ([True, True], 0.5)


@pytest.mark.slow
def test_slices_cover_a_batch_and_are_never_empty(reports):
    first, second = (report["slices"] for report in reports)
    assert (first["5"], second["5"]) == ([[0, 1], 0.4], [[2, 3, 4], 0.6])
    assert (first["2"], second["2"]) == ([[0], 0.5], [[1], 0.5])
    assert first["1"] == second["1"] == [[0], 0.5]


@pytest.mark.slow
def test_a_parameter_has_a_gradient_if_it_has_one_in_any_process(reports):
    for report in reports:
        assert report["missing"]["gradients"] == [[[1.0, 1.0, 1.0]], [[1.0, 1.0, 1.0]], None]
        assert report["missing"]["metrics"] == {"loss": 2.0}


@pytest.mark.slow
@pytest.mark.parametrize("views", ["evaluation", "crops"])
def test_an_evaluation_is_that_of_one_process(views, reports):
    ours = reports[0][views]["group"]
    assert ours == pytest.approx(reports[0][views]["single"], rel=1e-6)
    assert ours == reports[1][views]["group"]


@pytest.mark.slow
@pytest.mark.parametrize(("run", "tolerance"), [("capsnet", 1e-3), ("norms", 1e-2)])
def test_a_run_is_that_of_one_process(run, tolerance, reports, folder, final_state):
    ours, theirs = metrics(folder / run), metrics(folder / f"{run} single")
    assert len(ours) == len(theirs)
    for line, expected in zip(ours, theirs, strict=True):
        assert line == pytest.approx(expected, rel=tolerance / 10, abs=1e-6)
    ours, theirs = (final_state(folder / name) for name in (run, f"{run} single"))
    for key in ("model", "average") if ours["average"] else ("model",):
        for name, weights in ours[key].items():
            torch.testing.assert_close(weights, theirs[key][name], rtol=tolerance, atol=tolerance / 100)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["capsnet", "norms", "timed", "whole", "stopped", "resumed", "from one"])
def test_all_processes_have_the_same_weights(run, reports):
    assert reports[0][run]["weights"] == reports[1][run]["weights"]


@pytest.mark.slow
def test_the_clock_of_rank_0_ends_the_training(reports, folder, final_state):
    saved = final_state(folder / "timed")
    assert (saved["step"], saved["seconds"], saved["total"]) == (8, 2.0, 8)


@pytest.mark.slow
def test_dropout_differs_between_processes(reports, folder, final_state):
    saved = final_state(folder / "whole")
    (other,) = saved["random_others"]
    assert not torch.equal(saved["random"], other["random"])


# Stopping and resuming


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(reports):
    reasons = [report["stopped"]["reason"] for report in reports]
    assert reasons[0] == reasons[1]
    assert reasons[0].startswith("SIGTERM: stopped at step 7; run the same command with run=")


@pytest.mark.slow
def test_a_resumed_run_is_the_same_bit_for_bit(reports, folder, assert_same_run):
    assert_same_run(folder / "stopped", folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("run", "before", "after"), [("to one", 2, 1), ("from one", 1, 2)])
def test_another_number_of_processes_can_resume(run, before, after, reports, folder, final_state):
    assert [line["step"] for line in metrics(folder / run)] == [
        line["step"] for line in metrics(folder / "whole")
    ]
    assert len(final_state(folder / run).get("random_others", [])) == after - 1
    line = f"number of processes: was {before}, is {after}; the run resumes, but not bit for bit\n"
    assert (folder / "stdout").read_text().count(line) == 1


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_stops_all(reports, folder):
    reasons = [report["nan"]["reason"] for report in reports]
    assert reasons[0] == reasons[1]
    assert reasons[0].startswith(
        "step 6: loss is nan, cross_entropy is nan, gradient_norm is nan, with training"
    )
    assert len(json.loads((folder / "nan" / "non_finite.json").read_text())["indices"]) == 33


@pytest.mark.slow
def test_torchrun_restarts_a_run_after_kill_9_and_stops_it(reports, folder, assert_same_run):
    run = ("train", "run=killed", *script().BASELINE)
    trouble = "0:1:7:9 1:0:8:stop-torchrun"
    command = [*TORCHRUN, "--max-restarts=1", *CAPSEXP[1:], *run]
    options = {"cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    torchruns = [subprocess.Popen(command, env=environment(TROUBLE=trouble), **options)]
    with ended(torchruns) as ((out, error),):
        assert torchruns[0].returncode != 0
    assert error.count("capsexp: lost another process of this run") == 1, error
    assert error.count("capsexp: SIGTERM: stopped at step 9; run the same command with run=") == 1, error
    assert out.count("CNN with ") == 2
    status = RunDir(folder / "killed").status()
    assert (status["status"], status["exit_code"]) == ("interrupted", 143)

    (code, out, error), other = run_in_two(*CAPSEXP, *run, cwd=folder)
    assert (code, error, other) == (0, "", (0, "", ""))
    assert out.count("CNN with ") == 1
    assert [resume["step"] for resume in RunDir(folder / "killed").status()["resumes"]] == [6, 9]
    assert (folder / "killed" / "train.log").read_text().count("CNN with ") == 3
    assert_same_run(folder / "killed", folder / "whole")


# Errors


@pytest.fixture(scope="module")
def failed(folder):
    """A run whose second process has a bug."""
    arguments = ("train", "run=bug", *script().BASELINE)
    return run_in_two(*CAPSEXP, *arguments, cwd=folder, TROUBLE="0:1:3:bug")


@pytest.mark.slow
def test_a_bug_in_one_process_is_printed_once_and_ends_all(failed, folder):
    assert [code for code, _, _ in failed] == [1, 1]
    (_, _, silent), (_, _, error) = failed
    assert silent == ""
    assert error.count("Traceback") == error.count("RuntimeError: this is a bug") == 1
    status = RunDir(folder / "bug").status()
    assert status["status"] == "failed"
    assert status["error"].startswith("lost another process of this run")


@pytest.mark.slow
def test_an_error_of_rank_0_ends_all(failed, folder):
    (code, out, error), other = run_in_two(
        *CAPSEXP, "train", "run=bug", *script().BASELINE, "seed=4", cwd=folder
    )
    assert (code, out, other) == (2, "", (2, "", ""))
    assert error.splitlines() == [
        "capsexp: seed: was 0, is 4",
        f"capsexp: {folder / 'bug'} holds a run with another config: "
        "choose another run=DIR, or pass resume=force",
    ]


@pytest.mark.slow
def test_a_mistake_is_printed_once(folder):
    ends = run_in_two(*CAPSEXP, "train", "modle=x", cwd=folder)
    assert [code for code, _, _ in ends] == [2, 2]
    assert "".join(out for _, out, _ in ends) == ""
    errors = "".join(error for _, _, error in ends)
    assert errors == "capsexp: unknown key 'modle': did you mean 'model'?\n"


@pytest.mark.slow
def test_processes_with_different_settings_are_refused_in_one_line(folder):
    ends = run_in_two(*CAPSEXP, "train", "run=differ", "seed=${oc.env:RANK}", cwd=folder)
    assert [code for code, _, _ in ends] == [2, 2]
    errors = "".join(error for _, _, error in ends)
    start = "capsexp: the processes of this run have different settings"
    assert errors == f"{start}: seed is 0 in rank 0 and 1 in rank 1\n"
    assert not (folder / "differ").exists()


class Gathered(ProcessGroup):
    """Rank 0, which gathers what one process after the other passes."""

    def __init__(self):
        super().__init__(0, 2)
        self.values = []

    def gather(self, value):
        self.values.append(value)
        return self.values

    def broadcast(self, make):
        return make()


SETTINGS = {"seed": "0", "trainer.save_every": "5", "the code of capsexp": "a"}


@pytest.mark.parametrize(
    ("others", "difference"),
    [
        ([{}], None),
        ([{}, {}], None),
        ([{"seed": "1"}], "seed is 0 in rank 0 and 1 in rank 1"),
        ([{}, {"trainer.save_every": "7"}], "trainer.save_every is 5 in rank 0 and 7 in rank 2"),
        ([{"model.x": "2"}], "model.x is absent in rank 0 and 2 in rank 1"),
        ([{"the code of capsexp": "b"}], "the code of capsexp is a in rank 0 and b in rank 1"),
    ],
)
def test_the_settings_that_differ_are_named(others, difference):
    facts = [SETTINGS, *({**SETTINGS, **other} for other in others)]
    start = "the processes of this run have different settings: "
    assert agreement.describe_difference(facts) == (difference and start + difference)


def test_of_many_settings_that_differ_the_first_are_named():
    facts = [{str(key): str(value) for key in range(9)} for value in range(2)]
    assert agreement.describe_difference(facts).endswith("; 5 is 0 in rank 0 and 1 in rank 1 and 3 more")


@pytest.mark.parametrize(
    "override",
    ["seed=1", "routing.iterations=7", "trainer.save_every=7", "run=x", "device=cpu", "loss=spread"],
)
def test_every_setting_but_the_place_of_the_data_is_compared(override):
    def facts(*overrides):
        group = Gathered()
        agreement.require_agreement(to_plain(compose("train", overrides, config_dir=None)), group)
        return group.values[0]

    base = facts()
    assert base != facts(override)
    assert base == facts("data_root=elsewhere")
    assert {"the version of capsexp", "the version of torch", "the code of capsexp"} <= {*base}


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([(0, 2), (1, 3)], "the processes of this run differ in WORLD_SIZE, their number: 2 and 3"),
        ([(0, 2), (0, 2)], "two processes of this run have RANK=0"),
    ],
)
def test_processes_that_count_differently_are_refused(ranks, message, monkeypatch):
    monkeypatch.setattr(torchrun, "_store", dist.HashStore())
    first, second = ranks
    torchrun._check_number(*first)
    with pytest.raises(UserError, match=f"^{message}$"):
        torchrun._check_number(*second)


def test_processes_that_have_read_other_images_are_refused(tiny_components):
    read, group = read_splits(tiny_components()), Gathered()
    require_same_images(read, group)
    require_same_images(read, group)
    read.training.labels[[0, -1]] = read.training.labels[[-1, 0]] + 1
    with pytest.raises(UserError, match=r"^the training images of rank 2 are not those of rank 0$"):
        require_same_images(read, group)


def test_a_lost_process_is_named_without_the_source_code_of_gloo():
    text = "[/build/gloo/pair.cc:561] Connection closed by peer [127.0.0.1]:47012. Check the logs. GLHF!"
    with (
        pytest.raises(
            ProcessLostError, match=r"^lost another process of this run \(Connection closed by peer "
        ),
        detect_lost_process(),
    ):
        raise RuntimeError(text)


# Runs that cannot be distributed


@pytest.fixture
def second(monkeypatch):
    """The environment of the second process of two."""
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    return ProcessGroup(1, 2)


@pytest.mark.parametrize("command", [command for command in cli.COMMANDS if command != "train"])
def test_other_commands_refuse_several_processes(command, second):
    with pytest.raises(
        UserError, match=f"^capsexp {command} works in one process: start it without torchrun$"
    ):
        cli.dispatch([command])


def test_a_sweep_refuses_torchrun(second):
    with pytest.raises(UserError, match=r"^a sweep starts its own processes: run it without torchrun$"):
        cli.dispatch(["train", "-m", "seed=0,1"])


def test_a_batch_needs_an_image_for_each_process(second, tiny_components):
    check(tiny_components("trainer.batch_size=2"), second)
    message = "trainer.batch_size must be >= 2, the number of processes, got 1"
    with pytest.raises(UserError, match=f"^{message}$"):
        check(tiny_components("trainer.batch_size=1"), second)


def test_a_network_with_batch_statistics_is_refused(second, tiny_components):
    components = tiny_components()._replace(
        new_model=lambda: nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3))
    )
    with pytest.raises(
        UserError, match=r"^model: 0 is a BatchNorm1d, which would see only a slice of each batch"
    ):
        check(components, second)


def test_pieces_of_a_batch_are_refused_for_shared_batch_norms(second, em_config):
    for pieces in (1, 2):
        components = build_components(em_config("model=vb", f"trainer.accumulate={pieces}"), plugins=[])
        message = "^trainer.accumulate must be 1 with batch norms in several processes, got 2$"
        with pytest.raises(UserError, match=message) if pieces > 1 else contextlib.nullcontext():
            check(components, second)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("mps", "device: mps works with one process; device=cpu works with several"),
        ("cuda", "device: each process of a machine needs a GPU of its own; this one has 1"),
    ],
)
def test_a_device_that_cannot_be_shared_is_refused(device, message, second, tiny_components, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    components = tiny_components()
    components.device.torch_device = torch.device(device)
    with pytest.raises(UserError, match=f"^{message}$"):
        check(components, second)


# The environment that torchrun sets


def test_rank_and_size_come_from_the_environment(second):
    assert torchrun.is_distributed()
    assert (torchrun.processes().rank, torchrun.processes().size, torchrun.processes().is_main) == (
        1,
        2,
        False,
    )
    assert torchrun.launcher() == ["torchrun", "--nnodes=1", "--nproc-per-node=2", "-m"]


@pytest.mark.parametrize("number", ["two", "", "-1"])
def test_a_variable_that_is_no_number_is_named(number, second, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", number)
    with pytest.raises(UserError, match=f"^WORLD_SIZE={number}: torchrun sets a whole number"):
        torchrun.is_distributed()


@pytest.mark.parametrize("changed", [{"WORLD_SIZE": "1"}, {"LOCAL_RANK": None}])
def test_a_single_process_is_not_distributed(changed, second, monkeypatch):
    for name, value in changed.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    assert not torchrun.is_distributed()
    assert torchrun.processes() is SINGLE
    assert torchrun.launcher() == []
