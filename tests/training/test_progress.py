import io
import logging

from rich.console import Console

from capsexp.schedule import Step
from capsexp.training import progress
from capsexp.training.progress import Reporter


def reporter_on(text, *, terminal, total=4, done=0):
    console = Console(file=text, force_terminal=terminal, width=160, highlight=False, soft_wrap=True)
    return Reporter(Step(done, total), console=console)


def take_steps(reporter, count, total=4):
    for step in range(1, count + 1):
        metrics = {"loss": 0.5, "accuracy": 0.25}
        reporter.step(Step(step, total), epoch=1, epochs=2, metrics=metrics, images=32)


def test_a_pipe_gets_plain_lines_and_always_the_last_step():
    text = io.StringIO()
    with reporter_on(text, terminal=False) as reporter:
        take_steps(reporter, 4)
    lines = text.getvalue().splitlines()
    assert lines[0].startswith("epoch 1/2  step 1/4  loss 0.5  accuracy 0.25  ")
    assert lines[-1].startswith("epoch 1/2  step 4/4  ")
    assert all("images/s" in line and "left" in line for line in lines)
    assert "\x1b" not in text.getvalue()


def test_a_pipe_does_not_get_a_line_for_every_step():
    text = io.StringIO()
    with reporter_on(text, terminal=False, total=1000) as reporter:
        take_steps(reporter, 500, 1000)
    assert len(text.getvalue().splitlines()) == 1


def test_lines_come_every_few_seconds(monkeypatch):
    now = iter(range(0, 1000, 3))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    text = io.StringIO()
    with reporter_on(text, terminal=False, total=100) as reporter:
        take_steps(reporter, 20, 100)
    assert 5 < len(text.getvalue().splitlines()) <= 20


def test_a_terminal_gets_a_bar_and_lines_above_it():
    text = io.StringIO()
    with reporter_on(text, terminal=True) as reporter:
        reporter.print("a line with [bold]markup[/bold]")
        take_steps(reporter, 4)
    output = text.getvalue()
    assert "a line with [bold]markup[/bold]" in output
    assert "epoch 1/2" in output
    assert "4/4" in output
    assert "loss 0.5" in output
    assert "images/s" in output


def test_printed_lines_are_also_logged(caplog):
    with caplog.at_level(logging.INFO, "capsexp"), reporter_on(io.StringIO(), terminal=False) as reporter:
        reporter.print("a line")
    assert "a line" in caplog.text


def test_the_speed_excludes_pauses(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    meter = progress.Speedometer()
    for _ in range(3):
        clock[0] += 2.0
        meter.add(64)
    assert meter.rate == 32.0
    clock[0] += 1000.0
    meter.pause()
    clock[0] += 500.0
    meter.add(64)  # ends the pause
    clock[0] += 2.0
    meter.add(64)
    assert meter.rate == 32.0
    assert meter.seconds_per_step == 2.0
