import json
import os
import signal
import threading

import pytest

from capsexp.errors import RunStopped
from capsexp.training.stop_signal import StopSignal


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_saves_at_the_next_step_and_the_run_resumes_bit_for_bit(
    number, code, tmp_path, monkeypatch, train_tiny, whole_run, final_state, assert_same_run
):
    from capsexp.training import train

    real = train.accumulate_gradients

    def signalled(model, loss, batch, position, settings, **options):
        if position.number == 6:
            os.kill(os.getpid(), number)
        return real(model, loss, batch, position, settings, **options)

    assert threading.current_thread() is threading.main_thread()
    name = signal.Signals(number).name
    message = f"{name}: stopped at step 7; run the same command with run={tmp_path} to resume"
    with monkeypatch.context() as patch:
        patch.setattr(train, "accumulate_gradients", signalled)
        with pytest.raises(RunStopped, match=f"^{message}$") as stopped:
            train_tiny(tmp_path)
    assert stopped.value.exit_code == code
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["status"] == "interrupted"
    assert status["exit_code"] == code
    assert final_state(tmp_path)["step"] == 7
    train_tiny(tmp_path)
    assert_same_run(tmp_path, whole_run())


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path, monkeypatch, train_tiny):
    from capsexp.training import train

    def signalled(model, loss, batch, position, settings, **options):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(train, "accumulate_gradients", signalled)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path)
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "interrupted"


def test_a_run_restores_the_signal_handlers(tmp_path, train_tiny):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train_tiny(tmp_path, "trainer.max_steps=1")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_nohup_keeps_a_run_alive_when_its_terminal_closes():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("earlier", [signal.SIG_DFL, signal.default_int_handler])
def test_handlers_that_only_end_the_process_do_not_hide_how_to_resume(earlier, tmp_path):
    before = signal.signal(signal.SIGTERM, earlier)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.asked()
            with pytest.raises(RunStopped, match=r"^SIGTERM: stopped at step 3; run the same command "):
                stop.end(3, tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
