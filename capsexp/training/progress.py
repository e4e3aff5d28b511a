"""How a run speaks to its user: a progress bar on a terminal, plain lines every few seconds when piped."""

import logging
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger("capsexp")
EVERY_SECONDS = 5.0


class Reporter:
    """The terminal's side of a run; every line that it says also goes to the log.

    Args:
        total: optimiser steps of the whole run.
        done: steps done before this process began.
        console: where to print; a terminal gets a bar.
    """

    def __init__(self, *, total: int, done: int, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._bar = _bar(self._console) if self._console.is_terminal else None
        self._total = total
        self._task = self._bar.add_task("", total=total, completed=done, figures="") if self._bar else None
        self._last_line = 0.0
        self._speed = Speedometer()

    def __enter__(self) -> "Reporter":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        log.info(text)
        console = self._bar.console if self._bar else self._console
        console.print(text, markup=False)

    def step(
        self, step: int, *, epoch: int, epochs: int, figures: Mapping[str, float], pictures: int
    ) -> None:
        """Show where the training stands.

        Args:
            step: optimiser steps done.
            epoch: the epoch that is running, counted from 1.
            epochs: epochs of the whole run.
            figures: loss terms and accuracy of this step.
            pictures: pictures that this step trained on.
        """
        self._speed.add(pictures)
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        text += f"  {self._speed.rate:.0f} images/s"
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=step, description=f"epoch {epoch}/{epochs}", figures=text)
        elif time.monotonic() - self._last_line >= EVERY_SECONDS or step == self._total:
            self._last_line = time.monotonic()
            left = self._speed.seconds_per_step * (self._total - step)
            self.say(f"epoch {epoch}/{epochs}  step {step}/{self._total}  {text}  {clock(left)} left")

    def pause(self) -> None:
        """Leave the time until the next step out of the speed: something else is done in it."""
        self._speed.pause()

    @property
    def images_per_second(self) -> float:
        """Training speed of late, without validation and checkpoints."""
        return self._speed.rate


class Speedometer:
    """Pictures per second over the last steps, as a moving average."""

    def __init__(self) -> None:
        self._last: float | None = time.monotonic()
        self.seconds_per_step = 0.0
        self.rate = 0.0

    def add(self, pictures: int) -> None:
        """A step with so many pictures has just ended."""
        now = time.monotonic()
        if self._last is not None:
            seconds = max(now - self._last, 1e-9)
            # A first step pays for warming up: it counts, but is soon forgotten.
            keep = 0.8 if self.seconds_per_step else 0.0
            self.seconds_per_step = keep * self.seconds_per_step + (1 - keep) * seconds
            self.rate = keep * self.rate + (1 - keep) * pictures / seconds
        self._last = now

    def pause(self) -> None:
        """Do not count the time until the end of the next step."""
        self._last = None


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=console,
    )


def clock(seconds: float) -> str:
    """Minutes and seconds, and hours if there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
