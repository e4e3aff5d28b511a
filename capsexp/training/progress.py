"""Progress of a run: a bar on a terminal, otherwise a plain line every few seconds."""

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from capsexp.files import open_own, writing
from capsexp.schedule import Step
from capsexp.terminal import new_console
from capsexp.text import printable, printable_lines

log = logging.getLogger("capsexp")
EVERY_SECONDS = 5.0


class LogFile(logging.FileHandler):
    """The log of a run. conf/hydra/job_logging/capsexp.yaml names it.

    It is opened at the first line: then the directory is locked and checked. An error while writing ends the
    run in one line instead of being printed as a traceback.

    Args:
        filename: path of the file.
    """

    def __init__(self, filename: str) -> None:
        super().__init__(filename, encoding="utf-8", delay=True)

    def _open(self) -> IO[Any]:  # type: ignore[override]
        return open_own(Path(self.baseFilename), "a")

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line.

        Raises:
            WriteError: the file cannot be written.
        """
        with writing(Path(self.baseFilename)):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Raise the error that `emit` has caught."""
        raise


class Reporter:
    """Prints the progress of a run; printed lines also go to the log.

    Args:
        start: the step at which this process starts, of the whole run.
        timed: whether time may end the run: then its total of steps is not known.
        console: where to print; a bar is shown only on a terminal.
    """

    def __init__(self, start: Step, *, timed: bool = False, console: Console | None = None) -> None:
        self._console = console or new_console(soft_wrap=True)
        self._timed = timed
        self._bar = _bar(self._console) if self._console.is_terminal else None
        self._task = self._bar.add_task("", **self._fields(start), metrics="") if self._bar else None
        self._last_line = 0.0
        self._speed = Speedometer()

    def __enter__(self) -> "Reporter":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def print(self, text: str) -> None:
        """Print a line above the bar, and log it."""
        log.info(text)
        console = self._bar.console if self._bar else self._console
        console.print(printable_lines(text), markup=False)

    def step(
        self, step: Step, *, epoch: int, epochs: int | None, metrics: Mapping[str, float], images: int
    ) -> None:
        """Show the progress of the training.

        Args:
            step: optimizer steps done, of the whole run.
            epoch: the current epoch, counted from 1.
            epochs: epochs of the whole run; None without a limit.
            metrics: loss terms and accuracy of this step.
            images: images that this step trained on.
        """
        self._speed.add(images)
        text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        text += f"  {self._speed.rate:.0f} images/s"
        description = f"epoch {epoch}" if epochs is None else f"epoch {epoch}/{epochs}"
        if self._bar and self._task is not None:
            self._bar.update(
                self._task, **self._fields(step), description=description, metrics=printable(text)
            )
        elif time.monotonic() - self._last_line >= EVERY_SECONDS or step.number == step.total:
            self._last_line = time.monotonic()
            left = clock(self._speed.seconds_per_step * (step.total - step.number))
            self.print(f"{description}  step {_count(step, timed=self._timed)}  {text}  {left} left")

    def _fields(self, step: Step) -> dict[str, Any]:
        """Return what the bar shows: it fills with the share of the run, whose end in steps may move."""
        share = step.number / step.total if step.number else 0.0
        return {"total": 1.0, "completed": share, "count": _count(step, timed=self._timed)}

    def pause(self) -> None:
        """Exclude the time until the next step from the speed."""
        self._speed.pause()

    @property
    def images_per_second(self) -> float:
        """Recent training speed, without the time of validation and checkpoints."""
        return self._speed.rate


class Speedometer:
    """Measures images per second, as a moving average over the last steps."""

    def __init__(self) -> None:
        self._last: float | None = time.monotonic()
        self.seconds_per_step = 0.0
        self.rate = 0.0

    def add(self, images: int) -> None:
        """Count a step with so many images, which has just ended."""
        now = time.monotonic()
        if self._last is not None:
            seconds = max(now - self._last, 1e-9)
            # The first step includes the warm-up: it counts, but its weight decays fast.
            keep = 0.8 if self.seconds_per_step else 0.0
            self.seconds_per_step = keep * self.seconds_per_step + (1 - keep) * seconds
            self.rate = keep * self.rate + (1 - keep) * images / seconds
        self._last = now

    def pause(self) -> None:
        """Exclude the time until the end of the next step."""
        self._last = None


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[metrics]}", markup=False),
        TimeRemainingColumn(),
        console=console,
    )


def _count(step: Step, *, timed: bool) -> str:
    """Return the number of steps, of the total unless that is only expected."""
    return str(step.number) if timed else f"{step.number}/{step.total}"


def clock(seconds: float) -> str:
    """Format a duration as M:SS, or H:MM:SS from an hour on; `?` if it is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
