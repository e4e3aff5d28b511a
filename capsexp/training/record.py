"""The metrics of a run: metrics.jsonl in full precision, and TensorBoard."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from tensorboard.compat.proto.event_pb2 import Event
from torch import Tensor, cat
from torchvision.utils import make_grid, save_image

from capsexp.data.image_ops import displayable
from capsexp.errors import UserError, is_interruption, is_number
from capsexp.files import open_own, own_folder, write_atomic, writing
from capsexp.training.events import STATUS, EventFile, begin_session, end_session, shown_events, shown_steps
from capsexp.training.timing import TimingFile

Points = list[tuple[int, dict[str, float]]]
"""Step and metrics of each line of metrics.jsonl."""


class Record:
    """Writes a run's metrics and images.

    metrics.jsonl has only values that a resumed run repeats bit for bit. Timings go to timing.jsonl and to
    TensorBoard.

    Args:
        path: the run directory.
        start_step: the step at which this process starts; TensorBoard drops earlier records from it on.
        length: bytes of metrics.jsonl at the checkpoint that the run resumes from; the rest is cut off.
        settings: the config, for TensorBoard's HParams table.

    Raises:
        UserError: metrics.jsonl does not fit `start_step` and `length`.
        WriteError: a file cannot be written, also in every method.
    """

    def __init__(self, path: Path, *, start_step: int, length: int, settings: Mapping[str, Any]) -> None:
        self._path = path / "metrics.jsonl"
        points = read_recorded(self._path, length=length, step=start_step)
        self._folder, self._figures = path / "tb", path / "figures"
        begin_session(path, settings)
        self._timing = TimingFile(path, start_step=start_step)
        self._metrics = open_own(self._path, "ab")
        with writing(self._path):
            self._metrics.seek(self._metrics.truncate(length))
        lost = first_lost(self._folder, points, start_step)
        others = images_and_timings(self._folder, points, lost, start_step) if lost < start_step else []
        # Step 0 on the first start too: the loader in Python looks only at the first file.
        self._events = EventFile(self._folder, purge_step=lost)
        for step, values in points:
            if step >= lost:  # TensorBoard drops what earlier files have from this step on
                self.log_timing(step, values)
        for event in others:
            self._events.add(event)
        self._events.flush()

    def log_metrics(
        self, step: int, values: Mapping[str, float], *, seconds: float | None = None, **position: int
    ) -> None:
        """Write reproducible metrics to metrics.jsonl and TensorBoard.

        Args:
            step: optimizer steps done.
            values: by name.
            seconds: of training up to the step, for timing.jsonl and TensorBoard.
            position: such as the epoch; only in metrics.jsonl.
        """
        line = json.dumps({"step": step, **position, **values})
        with writing(self._path):
            self._metrics.write(line.encode() + b"\n")
            self._metrics.flush()
        self.log_timing(step, values)
        if seconds is not None:
            self._timing.add(step, seconds)
            self.log_timing(step, {"training_seconds": seconds})

    def log_timing(self, step: int, values: Mapping[str, float]) -> None:
        """Write timing metrics, which are not reproducible, to TensorBoard only."""
        for tag, value in values.items():
            self._events.add_scalar(tag, value, step)

    def log_images(self, step: int, tag: str, rows: list[Float[Tensor, "N C H W"]]) -> None:
        """Write a grid of image rows in [0, 1] to TensorBoard, and to figures/TAG.png, which it replaces."""
        columns = rows[0].shape[0]
        images = cat([row.detach().float().cpu().clamp(0, 1) for row in rows])
        grid = make_grid(displayable(images), nrow=columns, padding=1, pad_value=0.5)
        self._events.add_image(tag, grid, step)
        write_atomic(
            own_folder(self._figures) / f"{tag}.png", lambda file: save_image(grid, file, format="png")
        )

    def flushed_bytes(self) -> int:
        """Flush metrics.jsonl to disk and return its length in bytes, which checkpoints store."""
        with writing(self._path):
            os.fsync(self._metrics.fileno())
        self._events.flush()
        return self._metrics.tell()

    def close(self, status: str) -> None:
        """Close the files; TensorBoard's HParams table shows `status` (unknown if interrupted)."""
        self._timing.close()
        with writing(self._path):
            self._metrics.close()
        self._events.close()
        if status in STATUS:
            end_session(self._folder.parent, status)


class NoRecord:
    """Takes the place of a `Record` in processes other than rank 0."""

    def log_metrics(
        self, step: int, values: Mapping[str, float], *, seconds: float | None = None, **position: int
    ) -> None:
        """Do nothing."""

    def log_timing(self, step: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def log_images(self, step: int, tag: str, rows: list[Float[Tensor, "N C H W"]]) -> None:
        """Do nothing."""

    def flushed_bytes(self) -> int:
        """Return 0."""
        return 0

    def close(self, status: str) -> None:
        """Do nothing."""


@contextlib.contextmanager
def closing(record: Record | NoRecord) -> Iterator[None]:
    """Close the record with the status of the run's end, which TensorBoard shows."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):  # what ends the run may be a full disk
            record.close("interrupted" if is_interruption(error) else "failed")
        raise
    record.close("completed")


def read_recorded(path: Path, *, length: int, step: int) -> Points:
    """Return the metrics in the first bytes of metrics.jsonl, those of a run up to a checkpoint.

    Args:
        path: the file.
        length: the bytes, which the checkpoint stores.
        step: of the checkpoint.

    Raises:
        UserError: file and checkpoint do not fit each other.
    """
    with writing(path):
        content = path.read_bytes() if path.exists() else b""
    if length > len(content):
        raise UserError(f"{path} is shorter than when its checkpoint was made: choose another run=DIR")
    recorded, (following, *_) = content[:length], content[length:].split(b"\n", 1)
    try:
        points = [_point(line) for line in recorded.splitlines()]
        fits = recorded[-1:] in (b"", b"\n") and all(number <= step for number, _ in points)
    except (ValueError, RecursionError):
        fits = False
    with contextlib.suppress(ValueError, RecursionError):  # a kill may have cut off the following line
        fits = fits and _point(following)[0] >= step
    if not fits:
        line = (
            f"{path} does not fit the checkpoint of step {step}, which was saved after {length} bytes of it"
        )
        raise UserError(f"{line}: choose another run=DIR")
    return points


def _point(line: bytes) -> tuple[int, dict[str, float]]:
    """Return step and metrics of a line of metrics.jsonl.

    Raises:
        ValueError: it is no such line.
    """
    values = json.loads(line)
    if not isinstance(values, dict) or not isinstance(step := values.pop("step", None), int):
        raise ValueError("no step")
    return step, {tag: value for tag, value in values.items() if tag != "epoch" and is_number(value)}


def first_lost(folder: Path, points: Points, step: int) -> int:
    """Return the first step of which TensorBoard lacks a metric; at most `step`, from which on all is new.

    A power cut loses the end of an event file. Older versions named the files after the clock: if it was set
    back, they are read in the wrong order.
    """
    if not points:
        return step
    shown = shown_steps(folder)
    missing = (number for number, values in points if any(number not in shown.get(tag, ()) for tag in values))
    return min([step, *missing])


def images_and_timings(folder: Path, points: Points, first: int, step: int) -> list[Event]:
    """Return the events between two steps that hold no metrics of metrics.jsonl."""
    metrics = {tag for _, values in points for tag in values}
    events = shown_events(folder, since=first)
    return [
        event
        for event in events
        if event.step < step and not metrics.intersection(value.tag for value in event.summary.value)
    ]
