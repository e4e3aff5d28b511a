import contextlib
import os
import shutil
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from capsexp.config.settings import NOT_COMPARED
from capsexp.errors import RunStopped, UserError
from capsexp.training import run_dir
from capsexp.training.run_dir import RunDir

CONFIG = {
    "seed": 0,
    "run": "here",
    "resume": "auto",
    "output_root": "outputs",
    "data_root": "data",
    "plugins": [],
    "device": {"name": "cpu"},
    "dataset": {"root": "data", "validation": 0.1},
    "model": {"sizes": [1, 2], "decoder": {"hidden": [8]}},
}
COMMAND = ["capsexp", "train", "run=here", "a='b c'"]


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


def begin(run, config=CONFIG, resume="auto"):
    run.path.mkdir(exist_ok=True)
    return run.check_config(config, resume=resume, command=COMMAND)


# The lock

OWNER = """
import sys
from pathlib import Path
from capsexp.training.run_dir import RunDir
with RunDir(Path(sys.argv[1])).locked():
    print("mine", flush=True)
    sys.stdin.read()
"""


def test_the_lock_names_its_owner_until_the_owner_is_killed(run):
    command = [sys.executable, "-c", OWNER, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == b"mine\n"
        refusal = f"^{run.path} is in use by process {owner.pid} on .+: choose another run=DIR$"
        with pytest.raises(UserError, match=refusal), run.locked():
            raise AssertionError("two owners")
        owner.kill()
    with run.locked():
        assert f"process {os.getpid()} on " in (run.path / "run.lock").read_text()


def test_the_lock_names_its_present_owner_not_an_earlier_one(run):
    run.path.mkdir()
    (run.path / "status.json").write_text('{"pid": 1, "host": "elsewhere"}')
    refusal = pytest.raises(UserError, match=f"in use by process {os.getpid()} on ")
    with run.locked(), refusal, RunDir(run.path).locked():
        raise AssertionError("two owners")


def test_an_owner_that_fails_releases_the_lock(run):
    with pytest.raises(KeyError, match="oops"), run.locked():
        raise KeyError("oops")
    with run.locked():
        pass


# The config and the command


def test_the_first_start_writes_config_and_command(run):
    begin(run)
    assert OmegaConf.to_container(OmegaConf.load(run.path / "resolved_config.yaml")) == CONFIG
    assert (run.path / "command.txt").read_text() == "capsexp train run=here 'a='\"'\"'b c'\"'\"''\n"


def test_the_same_config_is_accepted_and_the_first_command_stays(run):
    begin(run)
    run.check_config(CONFIG, resume="auto", command=["another"])
    assert (run.path / "command.txt").read_text().startswith("capsexp train")


def changed():
    return {
        **CONFIG,
        "seed": 1,
        "model": {"sizes": [1, 3], "decoder": None},
        "new": True,
    }


DIFFERENCES = [
    "model.decoder.hidden: was [8], is None",
    "model.sizes: was [1, 2], is [1, 3]",
    "new: was None, is True",
    "seed: was 0, is 1",
]


def test_every_key_that_differs_is_listed(run):
    begin(run)
    with pytest.raises(UserError, match="choose another run=DIR, or pass resume=force") as caught:
        begin(run, changed())
    assert list(caught.value.problems[:-1]) == DIFFERENCES
    assert caught.value.problems[-1].startswith(f"{run.path} holds a run with another config")
    assert OmegaConf.to_container(OmegaConf.load(run.path / "resolved_config.yaml")) == CONFIG


def test_force_takes_the_new_config(run):
    begin(run)
    begin(run, changed(), resume="force")
    assert OmegaConf.to_container(OmegaConf.load(run.path / "resolved_config.yaml")) == changed()
    begin(run, changed())


@pytest.mark.parametrize("key", NOT_COMPARED)
def test_a_key_that_changes_no_result_is_not_compared(key, run):
    begin(run)
    begin(run, CONFIG | {key: "another"})


def test_the_data_root_is_not_compared_but_the_rest_of_the_dataset_is(run):
    begin(run)
    begin(run, CONFIG | {"dataset": {"root": "elsewhere", "validation": 0.1}})
    with pytest.raises(UserError, match=r"dataset.validation: was 0.1, is 0.2"):
        begin(run, CONFIG | {"dataset": {"root": "data", "validation": 0.2}})


@pytest.mark.parametrize(
    "value",
    [
        1e-06,
        1e16,
        0.1,
        3,
        True,
        None,
        "",
        "1e3",
        "null",
        "yes",
        "1_000",
        "0x1F",
        "a: b",
        "# a",
        "12:30",
        "é",
        "\n",
        "~",
        [],
        ["on", None, 1.0],
        "2026-01-01",
    ],
)
def test_a_value_is_the_same_after_it_is_written_and_read(value, run):
    begin(run, CONFIG | {"model": {"value": value}})
    begin(run, CONFIG | {"model": {"value": value}})


def test_composed_configs_keep_their_interpolations(run):
    run.path.mkdir()
    composed = OmegaConf.create({"a": 1, "b": "${a}"})
    run.write_composed(config=composed, overrides=["a=1"])
    assert (run.path / ".hydra" / "config.yaml").read_text() == "a: 1\nb: ${a}\n"
    assert (run.path / ".hydra" / "overrides.yaml").read_text() == "- a=1\n"


# The status


@pytest.fixture
def track_status(run):
    """Start the run, or start it again."""
    run.path.mkdir()

    @contextlib.contextmanager
    def start(step=0):
        directory = RunDir(run.path)
        with directory.track_status({"model": "em_routing"}):
            directory.log_resume(step=step, total=9, steps_per_epoch=3, best=None)
            yield directory

    return start


def test_the_status_has_the_process_and_its_progress(run, track_status):
    assert run.status() == {}
    with track_status():
        status = run.status()
    assert (status["status"], status["choices"]) == ("running", {"model": "em_routing"})
    assert (status["step"], status["total"], status["pid"], status["resumes"]) == (0, 9, os.getpid(), [])
    assert status["heartbeat"] >= status["started"]


def test_every_resume_is_kept_and_the_first_start_stays(run, track_status):
    with track_status():
        started = run.status()["started"]
    for step in (7, 9):
        with track_status(step):
            pass
    assert [resume["step"] for resume in run.status()["resumes"]] == [7, 9]
    assert run.status()["started"] == started


@pytest.mark.parametrize(
    ("error", "status", "message", "code"),
    [
        (UserError("no"), "failed", "no", 2),
        (RunStopped("not finite", exit_code=1), "failed", "not finite", 1),
        (RunStopped("SIGTERM", exit_code=143), "interrupted", "SIGTERM", 143),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt: ", 130),
        (KeyError("oops"), "failed", "KeyError: 'oops'", 1),
        (SystemExit(3), "failed", "SystemExit: 3", 3),
    ],
)
def test_the_status_has_how_and_why_the_run_ended(error, status, message, code, run, track_status):
    def fail():
        with track_status() as directory:
            directory.heartbeat(5)
            raise error

    with pytest.raises(type(error)):
        fail()
    ended = run.status()
    assert (ended["status"], ended["error"], ended["exit_code"], ended["step"]) == (status, message, code, 5)


def test_a_resumed_run_has_no_error_of_the_last_attempt(run, track_status):
    with pytest.raises(UserError), track_status():
        raise UserError("no")
    with track_status(step=5):
        assert "error" not in run.status()
        assert "exit_code" not in run.status()


def test_a_heartbeat_is_written_at_most_once_in_five_seconds(run, track_status, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(run_dir.time, "time", lambda: now[0])
    monkeypatch.setattr(run_dir.time, "monotonic", lambda: now[0])
    with track_status() as directory:
        now[0] += 4
        directory.heartbeat(1)
        assert run.status()["step"] == 0
        now[0] += 2
        directory.heartbeat(2)
    assert (run.status()["step"], run.status()["heartbeat"]) == (2, 1006.0)


@pytest.mark.parametrize("content", [b"", b"{", b"\x80", b"[]"])
def test_a_damaged_status_counts_as_none(content, run, track_status):
    (run.path / "status.json").write_bytes(content)
    assert run.status() == {}
    with track_status(step=3):
        assert run.status()["resumes"] == []


def test_a_run_is_locked_while_a_process_works_on_it(run):
    assert not run.is_locked()
    with run.locked():
        assert RunDir(run.path).is_locked()
    assert not run.is_locked()


def test_a_run_is_finished_only_with_the_config_it_was_completed_with(run, track_status, tiny_config):
    config = tiny_config()
    assert not run.is_finished(config)
    run.check_config(config, resume="auto", command=["capsexp", "train"])
    with track_status() as directory:
        assert not run.is_finished(config)
        directory.update_status("completed")
    assert run.is_finished(config)
    assert run.is_finished({**config, "resume": "force", "device": {}})
    assert not run.is_finished({**config, "seed": 7})
    (run.path / "resolved_config.yaml").unlink()
    assert not run.is_finished(config)


# Links, and what killed or removed runs leave


@pytest.mark.parametrize("name", [*run_dir.FOLDERS, *run_dir.APPENDED, *run_dir.REPLACED])
def test_a_link_where_a_run_writes_is_refused_before_anything_is_written(name, run, tmp_path):
    run.path.mkdir()
    target = tmp_path / "target"
    target.mkdir() if name in run_dir.FOLDERS else target.write_text("precious")
    (run.path / name).symlink_to(target)
    with pytest.raises(UserError, match=f"^cannot write into {run.path / name}: it is a link"), run.locked():
        raise AssertionError("locked")
    assert [path.name for path in run.path.iterdir()] == [name]
    assert list(target.iterdir()) == [] if target.is_dir() else target.read_text() == "precious"


@pytest.mark.parametrize("name", [*run_dir.FOLDERS, *run_dir.APPENDED, *run_dir.REPLACED])
def test_a_pipe_where_a_run_writes_is_refused(name, run):
    run.path.mkdir()
    os.mkfifo(run.path / name)
    assert not run.is_locked()
    assert run.status() == {}
    with pytest.raises(UserError, match=f"^cannot write into {run.path / name}: it is a pipe"), run.locked():
        raise AssertionError("locked")


def test_the_run_directory_itself_may_be_a_link_or_below_one(run, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "outputs").symlink_to("scratch")
    (tmp_path / "run").symlink_to("outputs/there")
    (tmp_path / "scratch" / "there").mkdir()
    for path in (tmp_path / "outputs" / "mine", tmp_path / "run"):
        with RunDir(path).locked():
            begin(RunDir(path))
    assert (tmp_path / "scratch" / "there" / "resolved_config.yaml").exists()


def test_leftovers_of_killed_writes_are_swept_when_the_directory_is_locked(run):
    run.path.mkdir()
    for folder in (".", *run_dir.FOLDERS):
        (run.path / folder).mkdir(exist_ok=True)
        (run.path / folder / ".a.json.12.tmp").write_text("half")
        (run.path / folder / ".notes.tmp").write_text("mine")
    with run.locked():
        pass
    left = {path.relative_to(run.path).as_posix() for path in run.path.rglob("*.tmp")}
    assert left == {".notes.tmp", *(f"{folder}/.notes.tmp" for folder in run_dir.FOLDERS)}


def replace_folder(path):
    path.rename(path.with_name("old"))
    path.mkdir()
    (path / "run.lock").write_text("another")


@pytest.mark.parametrize(
    "remove",
    [
        shutil.rmtree,
        replace_folder,
        lambda path: path.rename(path.with_name("old")),
        lambda path: (path / "run.lock").unlink(),
    ],
    ids=["removed", "replaced", "moved", "half removed"],
)
def test_a_run_whose_directory_is_gone_ends_and_writes_nothing(remove, run, track_status):
    def train():
        with run.locked(), run.track_status({}):
            remove(run.path)
            before = {path.name for path in run.path.iterdir()} if run.path.exists() else None
            try:
                run.heartbeat(3)
            finally:
                after = {path.name for path in run.path.iterdir()} if run.path.exists() else None
                assert after == before

    with pytest.raises(RunStopped, match=f"^{run.path} was removed or replaced while this run") as caught:
        train()
    assert caught.value.exit_code == 1
    assert not (run.path / "status.json").exists() or "running" in (run.path / "status.json").read_text()


def test_the_rest_of_a_removed_run_does_not_refuse_a_new_one_and_keeps_its_checkpoints(run, capsys):
    (run.path / "checkpoints").mkdir(parents=True)
    (run.path / "checkpoints" / "step-00000004.pt").write_bytes(b"weights")
    (run.path / "status.json").write_text('{"status": "completed", "started": 5}')
    begin(run)
    assert run.status() == {}
    moved = run.path / "checkpoints-without-config-1"
    assert (moved / "step-00000004.pt").read_bytes() == b"weights"
    assert not run.checkpoints.exists()
    notice = f"capsexp: {run.checkpoints} is not of this run: {run.path} holds no config; moved to {moved}\n"
    assert capsys.readouterr().err == notice
    begin(run)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [b"", b"[1]", b"a: [", b"\x80"])
def test_a_stored_config_that_cannot_be_read_is_one_line(content, run):
    begin(run)
    (run.path / "resolved_config.yaml").write_bytes(content)
    assert not run.is_finished(CONFIG)
    with pytest.raises(UserError, match=r"resolved_config\.yaml cannot be read: .*choose another run=DIR$"):
        begin(run)


# Clocks and damaged fields


def test_a_clock_that_is_set_back_shortens_no_duration(run, track_status, monkeypatch):
    now = [1e9]
    monkeypatch.setattr(run_dir.time, "time", lambda: now[0])
    with track_status() as directory:
        now[0] -= 86400
        directory.update_status("running")
    seconds = run.status()["seconds"]
    assert 0 <= seconds < 60
    with track_status():
        pass
    assert seconds <= run.status()["seconds"] < 60


@pytest.mark.parametrize("value", ["NaN", "-5", "1e300", "1" + "0" * 400, '"x"', "null", "[]", "true"])
def test_a_damaged_duration_counts_as_none(value, run, track_status):
    (run.path / "status.json").write_text(f'{{"seconds": {value}, "resumes": {value}, "best": {value}}}')
    assert run.best_accuracy() is None
    with track_status(step=3):
        pass
    assert 0 <= run.status()["seconds"] < 60
    assert [resume["step"] for resume in run.status()["resumes"]] == [3]


@pytest.mark.parametrize("results", ["[1]", "5", '{"test/accuracy": "high"}'])
def test_a_run_with_damaged_results_is_not_finished(results, run):
    begin(run)
    (run.path / "status.json").write_text(f'{{"status": "completed", "results": {results}}}')
    assert not run.is_finished(CONFIG)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- b=2", "null", "x", "[" * 5000, "\x80"])
def test_stored_overrides_are_read_or_unknown(text, run):
    (run.path / ".hydra").mkdir(parents=True)
    (run.path / ".hydra" / "overrides.yaml").write_text(text, encoding="latin-1")
    assert run.overrides() == (["1", "b=2"] if "b=2" in text else [])
