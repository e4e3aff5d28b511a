import json
import os
import socket
import time

import pytest

from capsexp.compare import runs
from capsexp.compare.find import find_all
from capsexp.compare.runs import newest_first, read, read_all
from capsexp.errors import Notes
from capsexp.training.run_dir import RunDir


@pytest.fixture
def notes():
    return Notes()


def names(paths, root):
    return [path.relative_to(root).as_posix() for path in paths]


def test_runs_are_found_at_any_depth_in_natural_order(write_run, tmp_path, notes):
    for name in ("sweep/job10", "sweep/job9", "alone"):
        write_run(name)
    assert names(find_all([tmp_path], notes), tmp_path) == ["alone", "sweep/job9", "sweep/job10"]
    assert find_all([tmp_path / "alone"], notes) == [tmp_path / "alone"]
    assert notes == Notes()


def test_folders_inside_a_run_and_hidden_folders_are_no_runs(write_run, tmp_path, notes):
    write_run("one")
    write_run("one/checkpoints/inner")
    write_run(".hidden/two")
    assert names(find_all([tmp_path], notes), tmp_path) == ["one"]


def test_a_run_that_is_reached_twice_is_listed_once(write_run, tmp_path, notes):
    path = write_run("folder/one")
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "folder" / "round").symlink_to(tmp_path)
    assert len(find_all([tmp_path, path, tmp_path / "link"], notes)) == 1


def test_folders_without_runs_are_reported_and_the_others_are_read(write_run, tmp_path, notes):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    folders = [tmp_path / name for name in ("none", "empty", "file", "sweep")]
    assert find_all([*folders, write_run("one")], notes) == [tmp_path / "one"]
    assert notes.errors == [
        f"{tmp_path}/none: no such directory",
        f"{tmp_path}/empty: no runs at or below this folder",
        f"{tmp_path}/file is a file, not a run directory",
    ]
    assert notes.warnings == [f"{tmp_path}/sweep: this sweep has no runs yet"]


def test_an_unreadable_folder_is_reported(write_run, tmp_path, notes, monkeypatch):
    write_run("open/one")
    (tmp_path / "locked").mkdir()
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(find_all([tmp_path], notes)) == 1
    assert notes.warnings == [f"[Errno 13] Permission denied: '{tmp_path}/locked'"]


def test_a_run_is_read_from_its_files(write_run, notes):
    path = write_run("one", {"seed": 4}, validation=[0.5, 0.75, 0.6], test=0.7, error="X: y\nz")
    (path / "command.txt").write_text("capsexp train seed=4\n")
    run = read(path, notes)
    assert (run.status, run.step, run.total, run.seconds, run.started) == ("finished", 30, 30, 60.0, 1e9)
    assert (run.best, run.test, run.error) == (0.75, 0.7, "X: y\nz")
    assert (run.choices["model"], run.settings["seed"], run.command) == ("small", 4, "capsexp train seed=4")
    assert "device.name" not in run.settings
    assert notes == Notes()


def test_an_older_run_has_its_best_validation_among_its_results(write_run, notes):
    results = {"validation/best_accuracy": 0.5}
    assert read(write_run("one", results=results), notes).best == 0.5


@pytest.mark.parametrize(
    ("status", "displayed"),
    [
        ("completed", "finished"),
        ("failed", "failed"),
        ("interrupted", "interrupted"),
        ("strange", "unknown"),
        (["x"], "unknown"),
        (None, "unknown"),
    ],
)
def test_statuses_are_displayed(status, displayed, write_run, notes):
    assert read(write_run("one", status=status), notes).status == displayed


def test_a_running_run_without_a_process_has_died(write_run, notes):
    path = write_run("one", status="running", host=socket.gethostname(), heartbeat=time.time())
    with RunDir(path).locked():
        assert read(path, notes).status == "running"
    assert read(path, notes).status == "died"


def test_a_run_on_another_machine_has_died_after_ten_minutes_without_heartbeat(write_run, notes):
    remote = {"status": "running", "host": "elsewhere"}
    assert read(write_run("one", **remote, heartbeat=time.time() - 500), notes).status == "running"
    assert read(write_run("two", **remote, heartbeat=time.time() - 700), notes).status == "died"
    assert read(write_run("three", **remote, heartbeat=None), notes).status == "died"


def test_a_run_that_ends_while_it_is_read_has_not_died(write_run, notes, monkeypatch):
    path = write_run("one", status="running", host=socket.gethostname())

    def end_run(_):
        write_run("one", status="completed")
        return False

    monkeypatch.setattr(RunDir, "is_locked", end_run)
    assert read(path, notes).status == "finished"


def test_a_run_that_was_killed_before_it_wrote_its_status_has_died(write_run, notes):
    path = write_run("one")
    (path / "status.json").unlink()
    assert read(path, notes).status == "died"
    with RunDir(path).locked():
        assert read(path, notes).status == "running"
    assert notes == Notes()


@pytest.mark.parametrize("content", [b"", b'{"status": "comp', b"[1]", b"\xff\xfe", b"null"])
def test_a_damaged_status_is_reported_and_the_settings_are_still_read(content, write_run, notes):
    path = write_run("one", {"seed": 5})
    (path / "status.json").write_bytes(content)
    run = read(path, notes)
    assert (run.status, run.best, run.settings["seed"]) == ("unknown", None, 5)
    (line,) = notes.warnings
    assert line.startswith(f"{path}/status.json cannot be read: ")
    assert "\n" not in line


@pytest.mark.parametrize("content", [b"a: [1", b"- 1", b"\xff", b"!!python/name:os.system", b"a: *b"])
def test_a_damaged_config_is_reported_and_the_metrics_are_still_read(content, write_run, notes):
    path = write_run("one", validation=[0.5])
    (path / "resolved_config.yaml").write_bytes(content)
    run = read(path, notes)
    assert (run.status, run.best, run.settings) == ("finished", 0.5, {})
    (line,) = notes.warnings
    assert line.startswith(f"{path}/resolved_config.yaml cannot be read: ")
    assert "\n" not in line


def test_values_of_a_wrong_type_are_ignored(write_run, notes):
    invalid = {
        "best": 3,
        "results": [1],
        "step": "x",
        "total": True,
        "started": "y",
        "choices": None,
        "seconds": None,
    }
    run = read(write_run("one", **invalid), notes)
    assert (run.best, run.test, run.step, run.total, run.started, run.seconds) == (None,) * 6
    assert run.choices == {}


def test_runs_of_other_versions_are_reported_once_for_each_version(write_run, notes, monkeypatch):
    monkeypatch.setattr(runs.importlib.metadata, "version", lambda name: "2.0")
    versions = ("1.0", "2.0", "1.0", "1.5", None)
    read_all([write_run(str(number), version=version) for number, version in enumerate(versions)], notes)
    assert notes.warnings == [
        "2 of 5 runs were written by capsexp 1.0, this is 2.0: they may lack settings",
        "1 of 5 runs were written by capsexp 1.5, this is 2.0: they may lack settings",
    ]


def test_newest_runs_come_first_and_those_without_a_start_time_last(write_run, notes):
    started = {"old": 1.0, "none": None, "new": 3.0}
    read_runs = read_all([write_run(name, started=time) for name, time in started.items()], notes)
    assert [run.path.name for run in newest_first(read_runs)] == ["new", "old", "none"]


def test_a_trained_run_is_read(train_tiny, tmp_path, notes):
    results = train_tiny(tmp_path / "run", "seed=2")
    run = read(tmp_path / "run", notes)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (run.status, run.step, run.total, run.settings["seed"]) == ("finished", 15, 15, 2)
    assert (run.best, run.test) == (results["validation/best_accuracy"], results["test/accuracy"])
    assert (run.seconds, run.command) == (status["seconds"], "capsexp train")
    assert notes == Notes()
