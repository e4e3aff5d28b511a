"""Test sweeps from the command line. Each job is a process."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from capsexp.cli.sweep import launcher
from capsexp.cli.sweep.folder import Sweep
from capsexp.cli.sweep.launcher import live_table, slots_for
from capsexp.training.run_dir import RunDir

FAILING = ("raise", "exit", "kill", "memory", "silent")
ALL_STATUSES = ["STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING", "STATUS_UNKNOWN"]


def start(home, *arguments):
    """Start `capsexp train -m` in a process whose output can be read line by line."""
    paths = [str(Path(__file__).parent), os.environ["PYTHONPATH"]]
    variables = {"CAPSEXP_OUTPUTS": "outputs", "COLUMNS": "250", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(
        [sys.executable, "-m", "capsexp", "train", "-m", *arguments],
        cwd=home,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextlib.contextmanager
def killed_at_end(process):
    """Kill the launcher at the end; its jobs end with it."""
    try:
        yield
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def run(home, *arguments):
    process = start(home, *arguments)
    output, _ = process.communicate(timeout=600)
    return SimpleNamespace(code=process.returncode, output=output)


def resident_memory(process):
    """Return the resident memory of a process in bytes."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.fixture(scope="module")
def failing(tmp_path_factory, request):
    """Run a sweep whose jobs fail in every way, then fix it and run the same command with a longer list."""
    home = tmp_path_factory.mktemp("home")
    tiny = request.getfixturevalue("tiny_overrides")
    common = ["plugins=[failing_loss]", "loss._target_=failing_loss.Loss", "hydra.launcher.n_jobs=2", *tiny]
    common += ["trainer.save_every=1", "trainer.max_epochs=1"]
    sizes, failures, lines = [], [], []
    with start(home, f"+loss.how={','.join(('well', *FAILING))}", *common) as process:
        for line in process.stdout:
            lines.append(line)
            if ": failed: " in line and sys.platform == "linux":
                failures.append(line)
                sizes.append(resident_memory(process))
    first = SimpleNamespace(code=process.returncode, output="".join(lines), sizes=sizes, failures=failures)
    (folder,) = (home / "outputs" / "sweeps").iterdir()
    before = home / "before"
    shutil.copytree(folder, before)
    (home / "fixed").touch()
    second = run(home, f"+loss.how={','.join(('well', *FAILING, 'new'))}", *common)
    return SimpleNamespace(first=first, second=second, before=before, folder=folder)


def jobs(folder):
    """Return the run directories of a sweep by their `how`."""
    return {re.search(r"-how-([a-z]+)-", path.parent.name)[1]: path.parent for path in folder.glob("*/tb")}


@pytest.mark.slow
def test_a_failing_job_ends_only_itself(failing):
    status = {how: RunDir(path).status() for how, path in jobs(failing.before).items()}
    assert {how: content["status"] for how, content in status.items()} == {
        "well": "completed",
        **dict.fromkeys(FAILING, "failed"),
    }
    assert status["raise"]["error"] == "KeyError: 'a bug'"
    assert (status["exit"]["error"], status["exit"]["exit_code"]) == ("SystemExit: 3", 3)
    assert status["kill"]["error"] == "killed by SIGKILL (out of memory?)"
    assert status["memory"]["error"].startswith("out of memory, with a peak of ")
    assert "The largest parts: " in status["memory"]["error"]
    assert "exit code 0" in status["silent"]["error"]
    assert failing.first.code == 1


@pytest.mark.slow
def test_failures_are_printed_at_once_and_again_in_the_table(failing):
    output, _, table = failing.first.output.partition("┏")
    for how, error in (("raise", "KeyError: 'a bug'"), ("kill", "killed by SIGKILL")):
        assert re.search(rf"^how={how}: failed: {error}.*; see .*stdout\.log$", output, re.M)
        assert error in table
    assert "Traceback" not in failing.first.output
    log = jobs(failing.before)["raise"] / "stdout.log"
    assert "Traceback (most recent call last):" in log.read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_failed_jobs_leave_no_memory_in_the_launcher(failing):
    assert len(failing.first.sizes) == len(FAILING)
    # The killed job is the first whose end the launcher records itself, for which it imports TensorBoard's
    # writer (17 MiB). Of the jobs that end after it, each gets the same work.
    killed = next(number for number, line in enumerate(failing.first.failures) if "SIGKILL" in line)
    after = failing.first.sizes[killed:]
    assert len(after) > 1
    assert max(after) - after[0] < 10 * 2**20


@pytest.mark.slow
def test_the_same_command_skips_finished_jobs_resumes_failed_ones_and_adds_new_ones(failing):
    assert "how=well: already finished" in failing.second.output
    assert failing.second.output.count(": started") == len(FAILING) + 1
    assert failing.second.code == 0
    after = jobs(failing.folder)
    assert set(after) == {"well", *FAILING, "new"}
    undisturbed = (after["new"] / "metrics.jsonl").read_text()
    for how, path in after.items():
        status = RunDir(path).status()
        assert status["status"] == "completed"
        assert "error" not in status
        # Bit for bit the metrics of a job that never failed.
        assert (path / "metrics.jsonl").read_text() == undisturbed
        assert [resume["step"] for resume in status["resumes"]] == ([3] if how in FAILING else [])


@pytest.mark.slow
def test_the_folder_lists_all_its_jobs(failing):
    content = json.loads((failing.folder / "sweep.json").read_text())
    assert content["command"].startswith("capsexp train -m ")
    assert len(content["jobs"]) == len(FAILING) + 2
    for name, job in content["jobs"].items():
        assert (job["status"], job["exit_code"], job["step"]) == ("finished", 0, 5)
        assert any(text.startswith("+loss.how=") for text in job["overrides"])
        assert (failing.folder / name).is_dir()
    with open(failing.folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["loss.how"] for row in rows} == {"well", *FAILING, "new"}
    assert len({row["test/accuracy"] for row in rows}) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "loader"), [("before", "true"), ("folder", "false")])
def test_tensorboard_has_every_job_once_with_its_final_status(stage, loader, failing, tensorboard, until):
    folder = getattr(failing, stage)
    paths = jobs(folder)
    query = {
        "allowedStatuses": ALL_STATUSES,
        "colParams": [{"hparam": key} for key in ("loss.how", "seed", "model.primary_types")],
        "startIndex": 0,
        "sliceSize": 100,
    }
    with tensorboard(folder, f"--load_fast={loader}") as get:
        groups = until(
            lambda: get("data/plugin/hparams/session_groups", query).get("sessionGroups", []),
            lambda found: sum(len(group["sessions"]) for group in found) == len(paths),
        )
        ends = {group["hparams"]["loss.how"]: group["sessions"][0]["status"] for group in groups}
        failed = "STATUS_FAILURE" if stage == "before" else "STATUS_SUCCESS"
        assert ends == {how: failed if how in FAILING else "STATUS_SUCCESS" for how in paths}
        assert {group["hparams"]["model.primary_types"] for group in groups} == {2.0}
        if stage == "folder":
            steps = until(
                lambda: get(f"data/plugin/scalars/scalars?tag=train/loss&run={paths['kill'].name}/tb"),
                lambda points: len(points) == 5,
            )
            assert [step for _, step, _ in steps] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_jobs_save_when_their_launcher_is_stopped_or_killed_and_a_second_launcher_is_refused(
    tmp_path, tiny_overrides, until
):
    arguments = ["seed=0,1", "hydra.launcher.n_jobs=2", *tiny_overrides]
    arguments += ["trainer.max_epochs=100000", "trainer.save_every=1000000", "hydra.sweep.dir=sweep"]

    def statuses():
        return [RunDir(path).status() for path in sorted(tmp_path.glob("sweep/*/"))]

    def running(resumes):
        return lambda found: (
            len(found) == 2
            and all(
                status.get("status") == "running" and len(status["resumes"]) == resumes for status in found
            )
            and all(status.get("step", 0) > 0 for status in found)
        )

    killed = start(tmp_path, *arguments)
    with killed_at_end(killed):
        until(statuses, running(0))
        second = run(tmp_path, *arguments)
        assert second.code == 2
        assert "this sweep is already running in sweep (process " in second.output
    saved = until(statuses, lambda found: all(status["status"] == "interrupted" for status in found))

    stopped = start(tmp_path, *arguments)
    with killed_at_end(stopped):
        again = until(statuses, running(1))
        # The runs saved when their launcher died, so they resume from their last step.
        assert [status["resumes"][0]["step"] for status in again] == [status["step"] for status in saved]
        stopped.send_signal(signal.SIGINT)
        output, _ = stopped.communicate(timeout=600)
    assert stopped.returncode == 130
    assert "capsexp: sweep stopped; run the same command to resume" in output
    assert [status["exit_code"] for status in statuses()] == [130, 130]


def test_a_job_whose_run_is_in_use_fails_without_changing_its_status(tmp_path, monkeypatch):
    run_dir = RunDir(tmp_path / "run")
    job = launcher.JobProcess("a=1", ["a=1"], run_dir)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with (
        run_dir.locked()
    ):  # by another process: the end of this job must not be recorded as the end of the run
        job.start([], {})
        while not job.has_ended():
            time.sleep(0.01)
    assert run_dir.status() == {}
    assert job.outcome().startswith("a=1: None: exit code 1: no output; see ")


@pytest.mark.slow
def test_a_table_of_recipes_is_one_command_and_ends_with_the_published_errors(tmp_path, tiny_overrides):
    recipes = tmp_path / "own" / "experiment"
    recipes.mkdir(parents=True)
    for name, text in {
        "first": "defaults: [quickstart]\npaper: {error: 9.5, sd: 0.25}",
        "second": "defaults: [quickstart, override /routing: uniform]\npaper: null",
        "both": "table: [first, second]",
    }.items():
        (recipes / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    arguments = [
        "-cd",
        "own",
        "experiment=both",
        "hydra.launcher.n_jobs=2",
        *tiny_overrides,
        "trainer.max_epochs=1",
    ]
    first_run = run(tmp_path, *arguments)
    assert first_run.code == 0, first_run.output
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert re.fullmatch(r"both-[0-9a-f]{8}", folder.name)
    assert json.loads((folder / "sweep.json").read_text())["command"].startswith("capsexp train -m -cd own ")
    head, _, first, second = (folder / "table.md").read_text().splitlines()[:4]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (head, first, second)]
    assert [row[0] for row in cells] == ["recipe", "first", "second"]
    assert [row[2] for row in cells] == ["paper, %", "9.5 ± 0.25", "–"]  # noqa: RUF001
    assert [row[3] for row in cells] == ["steps (n)", "5 (1)", "5 (1)"]
    assert "9.5 ± 0.25" in first_run.output.partition("└")[2]
    with open(folder / "results.csv", newline="") as file:
        assert {row["experiment"]: row["paper/error.mean"] for row in csv.DictReader(file)} == {
            "first": "9.5",
            "second": "",
        }
    (recipes / "first.yaml").write_text("# @package _global_\ndefaults: [quickstart]\npaper: {error: 9}\n")
    again = run(tmp_path, *arguments)
    assert again.output.count(": already finished") == 2, again.output


@pytest.mark.parametrize(
    ("n_jobs", "device", "gpus", "visible", "slots"),
    [
        (None, "auto", 0, None, [{}]),
        (None, "auto", 1, None, [{}]),
        (None, "cuda", 2, None, [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]),
        (None, "auto", 2, "4,GPU-7", [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "GPU-7"}]),
        (3, "auto", 2, None, [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in "010"]),
        (2, "cpu", 2, None, [{"OMP_NUM_THREADS": "4"}] * 2),
        (3, "auto", 0, None, [{"OMP_NUM_THREADS": "2"}] * 3),
        (20, "auto", 0, None, [{"OMP_NUM_THREADS": "1"}] * 20),
        (2, "auto", 1, None, [{}] * 2),
    ],
)
def test_each_slot_has_a_gpu_or_a_share_of_the_cores(n_jobs, device, gpus, visible, slots, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert slots_for(n_jobs, device=device) == slots


def test_the_users_number_of_threads_is_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert slots_for(2, device="cpu") == [{}, {}]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_a_table_below_the_lines(terminal, tmp_path):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=100, highlight=False, color_system=None)
    sweep = Sweep(tmp_path)
    sweep.add(["seed=[7]"])
    with live_table(sweep, console) as print_line:
        print_line("seed=[7]: started")
    assert "seed=[7]: started" in shown.getvalue()
    assert ("│ seed=[7]" in shown.getvalue()) == terminal
    assert json.loads((tmp_path / "sweep.json").read_text())["jobs"]
