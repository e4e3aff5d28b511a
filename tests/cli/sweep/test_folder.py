import json
import re
import socket

import pytest
from rich.console import Console

from capsexp.cli.sweep.folder import Sweep, differing_overrides, jobs_table
from capsexp.config.naming import job_name
from capsexp.errors import UserError
from capsexp.training.run_dir import RunDir


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path / "sweep")


def write_status(sweep, overrides, **status):
    """Write the status of a job, as its process would."""
    run = sweep.add(overrides)
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / "status.json").write_text(json.dumps(status))


def printed_table(sweep, **options):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(jobs_table(sweep.jobs(), **options))
    return console.export_text()


def test_the_directory_of_a_job_depends_on_its_overrides(sweep):
    assert sweep.add(["seed=0"]).path == sweep.path / job_name(["seed=0"])


def test_a_job_in_a_directory_that_the_user_has_chosen_keeps_its_status(sweep):
    run = sweep.add(["seed=0"], name="0/chosen")
    run.path.mkdir(parents=True)
    (run.path / "status.json").write_text(json.dumps({"status": "completed"}))
    assert [(job.name, job.state) for job in sweep.jobs()] == [("0/chosen", "finished")]


def test_a_sweep_remembers_its_jobs(sweep):
    write_status(sweep, ["seed=0"], status="completed", step=3, results={"test/accuracy": 0.5}, pid=7)
    sweep.add(["seed=1"])
    sweep.write_command("capsexp train -m seed=0,1")
    again = Sweep(sweep.path)
    again.add(["seed=2"])
    assert [(job.overrides, job.state) for job in again.jobs()] == [
        (["seed=0"], "finished"),
        (["seed=1"], "waiting"),
        (["seed=2"], "waiting"),
    ]
    assert not again.succeeded()
    content = json.loads((sweep.path / "sweep.json").read_text())
    assert content["command"] == "capsexp train -m seed=0,1"
    assert content["jobs"][job_name(["seed=0"])] == {
        "overrides": ["seed=0"],
        "status": "finished",
        "step": 3,
        "results": {"test/accuracy": 0.5},
    }


def test_runs_of_another_launcher_are_found(sweep):
    run = RunDir(sweep.path / "by-slurm")
    (run.path / ".hydra").mkdir(parents=True)
    run.write_composed(overrides=["seed=4", "run=x"])
    (run.path / "status.json").write_text('{"status": "completed"}')
    (job,) = sweep.jobs()
    assert (job.name, job.overrides, job.state) == ("by-slurm", ["seed=4"], "finished")
    assert sweep.succeeded()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"jobs": 3, "command": ""}', '{"jobs": {"a": {}}}'])
def test_a_damaged_sweep_json_is_replaced(content, sweep):
    sweep.path.mkdir()
    (sweep.path / "sweep.json").write_text(content)
    again = Sweep(sweep.path)
    assert again.jobs() == []
    again.write_command("command")
    assert json.loads((sweep.path / "sweep.json").read_text())["jobs"] == {}


def test_a_folder_runs_one_sweep_at_a_time(sweep):
    refusal = rf"^this sweep is already running in {sweep.path} \(process \d+ on .+\): hydra\.sweep\.dir=DIR"
    with sweep.locked(), pytest.raises(UserError, match=refusal), Sweep(sweep.path).locked():
        raise AssertionError("two sweeps")
    with sweep.locked():
        pass


def test_jobs_are_labelled_by_their_differing_overrides():
    assert differing_overrides([["a.b=1", "seed=0"], ["a.b=1", "seed=1"]]) == ["seed=0", "seed=1"]
    assert differing_overrides([["model.routing.iterations=1"]]) == ["iterations=1"]
    assert differing_overrides([["a=1"], ["a=1", "b=2"]]) == ["defaults", "b=2"]
    assert differing_overrides([]) == []


def test_the_table_shows_the_status_of_every_job(sweep):
    done = {"step": 9, "total": 9, "best": {"accuracy": 0.75, "step": 5}, "seconds": 61.2}
    write_status(sweep, ["m=[8,8]", "seed=0"], status="completed", results={"test/accuracy": 0.5}, **done)
    write_status(sweep, ["m=[8,8]", "seed=1"], status="failed", error="KeyError: [red]'a'\nmore")
    write_status(sweep, ["m=[8,8]", "seed=2"], status="interrupted", error="SIGTERM", step=3, total=9)
    sweep.add(["m=[8,8]", "seed=3"])
    lines = [
        re.split(r" *│ *", line)[1:-1] for line in printed_table(sweep).splitlines() if line.startswith("│")
    ]
    assert lines == [
        ["seed=0", "finished", "9/9", "0.7500", "0.5000", "61 s", ""],
        ["seed=1", "failed", "", "", "", "", "KeyError: [red]'a'"],
        ["seed=2", "interrupted", "3/9", "", "", "", ""],
        ["seed=3", "waiting", "", "", "", "", ""],
    ]


def test_a_short_table_prefers_running_and_failed_jobs(sweep):
    for seed in range(8):
        state = {6: "running", 7: "failed"}.get(seed, "completed")
        write_status(sweep, [f"seed={seed}"], status=state, host=socket.gethostname())
    with sweep.add(["seed=6"]).locked():
        text = printed_table(sweep, max_rows=3)
    assert [seed for seed in range(8) if f"seed={seed}" in text] == [0, 6, 7]
    assert "8 jobs: 6 finished, 1 running, 1 failed" in text
    assert "8 jobs: 6 finished, 1 died, 1 failed" in printed_table(sweep, max_rows=3)


def test_a_sweep_of_recipes_ends_with_a_table_beside_the_papers(write_run, tmp_path, capsys):
    sweep, common = Sweep(tmp_path), ["dataset=digits", "device=cpu", "trainer.max_steps=30"]
    for name, seed, test in (("b", 0, 0.9), ("b", 1, 0.94), ("a", 0, 0.99)):
        overrides = [f"experiment={name}", f"seed={seed}", *common]
        path = sweep.add(overrides).path
        status = {"choices": {"experiment": name}, "steps_per_epoch": 20, "test": test}
        paper = {"error": 0.25, "sd": 0.005} if name == "b" else None
        write_run(path.name, {"seed": seed, "paper": paper}, **status)
    sweep.add(["experiment=a", "seed=1", *common])  # still waiting
    sweep.finish()
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.split()[:1] == ["recipe"])
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines[start + 2 : start + 4]]
    dash = "–"  # noqa: RUF001
    assert [row[:6] for row in cells] == [
        ["b", "8.00 ± 2.83 (2)", "0.25 ± 0.005", "30 ± 0 (2)", "30 ± 0 (2)", "1.5 ± 0 (2)"],
        ["a", "1.00 (1)", dash, "30 (1)", "30 (1)", "1.5 (1)"],
    ]
    remark = "Ours with dataset=digits trainer.max_steps=30; the paper's errors are as published."
    assert remark in lines
    written = (tmp_path / "table.md").read_text()
    assert "| b | 8.00 ± 2.83 (2) | 0.25 ± 0.005 |" in written
    assert written.endswith(f"|\n\n{remark}\n")


def test_without_a_published_error_there_is_no_such_table(write_run, tmp_path, capsys):
    sweep = Sweep(tmp_path)
    write_run(sweep.add(["experiment=a"]).path.name, choices={"experiment": "a"}, test=0.9)
    sweep.finish()
    assert "recipe" not in capsys.readouterr().out
    assert not (tmp_path / "table.md").exists()
