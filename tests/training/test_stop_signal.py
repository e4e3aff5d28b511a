import json
import os
import signal
import threading

import pytest

from capsexp.errors import RunStopped


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
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
