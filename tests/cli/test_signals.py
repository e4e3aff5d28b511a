"""Ctrl-C, SIGTERM and SIGHUP at any moment: a line at most, the right exit code, and a run that resumes."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from capsexp.cli import signals
from capsexp.errors import Stopped
from capsexp.training import train  # noqa: F401 - a signal must not meet its import

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture
def handlers():
    """Handle signals as a process of the command line does; afterwards as before."""
    before = {number: signal.getsignal(number) for number in CODES}
    hook = sys.unraisablehook
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    sys.unraisablehook = hook


@pytest.fixture
def exits(monkeypatch):
    """The exit codes of `os._exit`, which raises here."""
    codes = []

    def leave(code):
        codes.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(signals.os, "_exit", leave)
    return codes


@pytest.mark.parametrize("number", CODES)
def test_a_signal_stops_and_a_second_one_ends_the_process_at_once(number, handlers, exits):
    with signals.ending_quietly():
        with pytest.raises(Stopped) as stopped:
            signal.raise_signal(number)
        assert stopped.value.exit_code == CODES[number]
        with pytest.raises(SystemExit):
            signal.raise_signal(number)
    assert exits == [CODES[number]]
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_signal_that_was_ignored_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with signals.ending_quietly():
        signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_signal_during_an_import_ends_the_process(handlers, exits, tmp_path, monkeypatch):
    (tmp_path / "interrupted.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit), signals.ending_quietly():
        __import__("interrupted")
    assert exits == [130]


def test_a_signal_that_a_library_turns_into_its_own_error_is_still_a_signal(handlers, exits):
    def library():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("a module failed to import") from None

    with pytest.raises(SystemExit), signals.ending_quietly():
        library()
    assert exits == [143]


def test_a_signal_in_a_destructor_is_not_lost(handlers, exits):
    with signals.ending_quietly(), pytest.raises(SystemExit):
        sys.unraisablehook(SimpleNamespace(exc_value=Stopped(signal.SIGINT)))
    assert exits == [130]


def interrupting(monkeypatch, target, number):
    """Send a signal as soon as a function is called."""
    monkeypatch.setattr(target, lambda *_, **__: signal.raise_signal(number))


@pytest.mark.parametrize(
    ("number", "target"),
    [
        (signal.SIGINT, "capsexp.config.build.build_components"),
        (signal.SIGINT, "capsexp.training.train.read_splits"),
        (signal.SIGTERM, "capsexp.training.train.read_splits"),
        (signal.SIGHUP, "capsexp.training.train.Record"),
    ],
)
def test_a_run_is_stopped_before_its_first_step(
    number, target, handlers, capsexp, tmp_path, monkeypatch, tiny_overrides
):
    command = ("train", f"run={tmp_path / 'run'}", *tiny_overrides, "trainer.max_steps=1")
    with monkeypatch.context() as patch, signals.ending_quietly():
        interrupting(patch, target, number)
        code, _, error = capsexp(*command)
    name = signal.Signals(number).name
    assert code == CODES[number]
    if "training" in target:
        line = f"capsexp: {name}: stopped; run the same command with run={tmp_path / 'run'} to continue\n"
        assert error == line
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        assert (status["status"], status["exit_code"]) == ("interrupted", code)
    else:
        assert error == ""
        assert not (tmp_path / "run").exists()
    assert capsexp(*command)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "target"),
    [
        (["train", "-m", "seed=0,1"], "capsexp.cli.sweep.command.check_sweep"),
        (["train", "-m", "seed=0,1"], "capsexp.cli.sweep.launcher.job_labels"),
        (["data", "prepare", "mnist"], "capsexp.data.prepare.run_action"),
        (["runs"], "capsexp.compare.selection.select"),
        (["report"], "capsexp.compare.selection.select"),
        (["bench"], "capsexp.analysis.speed.bench.bench"),
    ],
)
def test_ctrl_c_ends_every_command_quietly(arguments, target, handlers, capsexp, monkeypatch):
    with signals.ending_quietly():
        interrupting(monkeypatch, target, signal.SIGINT)
        code, _, error = capsexp(*arguments)
    assert (code, error) == (130, "")


def test_ctrl_c_while_the_command_line_itself_is_imported(tmp_path):
    (tmp_path / "difflib.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    code = "import sys; from capsexp.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "runs"]
    fresh = os.environ | {"CAPSEXP_NO_FORK": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=fresh, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.slow
def test_a_run_saves_and_stops_when_its_terminal_is_closed(tmp_path, tiny_overrides, until):
    ours, theirs = os.openpty()
    long = ["trainer.max_epochs=100000", "trainer.save_every=1000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "capsexp", "train", "run=run", *tiny_overrides, *long],
        cwd=tmp_path,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # makes it the controlling terminal
    )
    os.close(theirs)
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        until(lambda: metrics.exists() and metrics.stat().st_size, bool, seconds=300)
        os.close(ours)
        assert process.wait(60) == 129
    finally:
        process.kill()
        process.wait()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["status"], status["exit_code"]) == ("interrupted", 129)
    assert list((tmp_path / "run" / "checkpoints").glob("*.pt"))
