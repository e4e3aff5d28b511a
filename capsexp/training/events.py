"""TensorBoard's event files of a run: one for each start, and one each for its settings and its end.

TensorBoard reads the files of a folder in the order of their names and never returns to an earlier one. The
names have the time of day in them, which can be set back: a new file gets a number above those of all others.
"""

import os
import re
import socket
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from jaxtyping import Float
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.plugins.hparams import summary_v2 as hparams_summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary as summaries

from capsexp.config.settings import comparable, fingerprint, flat, without
from capsexp.files import is_regular, open_own, own_folder, write_atomic, writing

FLUSH_SECONDS = 10
STATUS = {"completed": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE}
_PREFIX = "events.out.tfevents."
_NUMBERED = re.compile(r"events\.out\.tfevents\.(\d{10})\..+")
_BEGIN, _END = f"{_PREFIX}0000000000.begin", ".end"


class EventFile:
    """An event file that this process writes, the last in the order of names.

    torch's SummaryWriter writes in a thread, whose errors are tracebacks, and names the file after the clock.

    Args:
        folder: the run's `tb` folder; its parent exists.
        purge_step: TensorBoard drops points of earlier files from this step on; None keeps them.
        suffix: end of the file's name.

    Raises:
        WriteError: the file cannot be written, also in every method.
    """

    def __init__(self, folder: Path, *, purge_step: int | None = None, suffix: str = "") -> None:
        own_folder(folder)
        name = f"{_PREFIX}{_next_number(folder):010d}.{socket.gethostname()}.{os.getpid()}{suffix}"
        self._path, self._flushed = folder / name, time.monotonic()
        self._file = open_own(self._path, "ab")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        if purge_step is not None:
            self._write(Event(session_log=SessionLog(status=SessionLog.START)), purge_step)

    def add_scalar(self, tag: str, value: int | float, step: int) -> None:
        """Add a point of a metric."""
        self._write(Event(summary=summaries.scalar(tag, value)), step)

    def add_image(self, tag: str, image: Float[Tensor, "C H W"], step: int) -> None:
        """Add an image in [0, 1]."""
        self._write(Event(summary=summaries.image(tag, image.numpy(), dataformats="CHW")), step)

    def add_figure(self, tag: str, figure: Any, step: int) -> None:
        """Add a matplotlib figure as an image."""
        from torch.utils.tensorboard._utils import figure_to_image

        image = figure_to_image(figure, close=False)
        self._write(Event(summary=summaries.image(tag, image, dataformats="CHW")), step)

    def add(self, event: Event) -> None:
        """Add an event of an earlier file, with its own time."""
        with writing(self._path):
            self._records.write(event.SerializeToString())

    def flush(self) -> None:
        """Hand everything to the system."""
        with writing(self._path):
            self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close the file."""
        with writing(self._path):
            self._file.close()

    def _write(self, event: Event, step: int = 0) -> None:
        event.wall_time, event.step = time.time(), step
        self.add(event)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()


def _next_number(folder: Path) -> int:
    """Return the time in seconds, or a number above those in the names of the folder's files."""
    numbers = [int(match[1]) for name in os.listdir(folder) if (match := _NUMBERED.fullmatch(name))]
    return max(int(time.time()), min(max(numbers, default=0) + 1, 10**10 - 1))


def shown_steps(folder: Path) -> dict[str, set[int]]:
    """Return the steps that TensorBoard shows of each tag in a folder."""
    shown: dict[str, set[int]] = defaultdict(set)
    for event in _read_events(folder):
        if event.session_log.status == SessionLog.START:
            for tag, steps in shown.items():
                shown[tag] = {step for step in steps if step < event.step}
        for value in event.summary.value:
            shown[value.tag].add(event.step)
    return shown


def shown_events(folder: Path, *, since: int) -> list[Event]:
    """Return the events with values that TensorBoard shows of a folder, from a step on."""
    shown: list[Event] = []
    for event in _read_events(folder):
        if event.session_log.status == SessionLog.START:
            shown = [earlier for earlier in shown if earlier.step < event.step]
        elif event.summary.value and event.step >= since:
            shown.append(event)
    return shown


def _read_events(folder: Path) -> Iterator[Event]:
    """Iterate over a folder's events as TensorBoard reads them: by name, each file up to damage in it."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for path in sorted(folder.glob(f"{_PREFIX}*")):
        if is_regular(path):
            try:
                yield from LegacyEventFileLoader(str(path)).Load()
            except (OSError, DecodeError):
                continue


def begin_session(path: Path, settings: Mapping[str, Any]) -> None:
    """Add the run in this directory to TensorBoard's HParams table, as one that has not ended.

    TensorBoard keeps the first record it reads of a run's settings, and of its end. So each of the two has a
    file of its own, which the next start replaces. Runs that differ only in the seed are one trial, of which
    the table shows means.
    """
    folder = own_folder(path / "tb")
    for old in folder.glob(f"{_PREFIX}*{_END}"):
        with writing(old):
            old.unlink()
    trial = fingerprint(without(comparable(settings), "seed"))
    # The name sorts first: TensorBoard never returns to an earlier file.
    _write_event(folder / _BEGIN, hparams_summary.hparams_pb(_hparams(flat(settings)), trial_id=trial))


def end_session(path: Path, status: str) -> None:
    """Record in TensorBoard's HParams table how the run in this directory ended: completed or failed."""
    # torch's own add_hparams writes a second run, and has no status for failed or crashed runs.
    end = plugin_data_pb2.SessionEndInfo(status=STATUS[status], end_time_secs=time.time())
    content = plugin_data_pb2.HParamsPluginData(session_end_info=end, version=metadata.PLUGIN_DATA_VERSION)
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=content.SerializeToString())
    value = Summary.Value(
        tag=metadata.SESSION_END_INFO_TAG,
        metadata=SummaryMetadata(plugin_data=plugin),
        tensor=metadata.NULL_TENSOR,
    )
    folder = own_folder(path / "tb")
    _write_event(folder / f"{_PREFIX}{_next_number(folder):010d}.~{_END}", Summary(value=[value]))


def _hparams(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in types that the HParams table accepts, without those that are null."""
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in settings.items()
        if value is not None and _is_shown(key)
    }


def _is_shown(key: str) -> bool:
    """Return whether the table shows a setting: not the class name of a component inside another."""
    _, _, rest = key.partition(".")
    return not key.endswith("_partial_") and not rest.endswith("._target_")


def _write_event(path: Path, summary: Summary) -> None:
    version = Event(wall_time=time.time(), file_version="brain.Event:2")
    events = [version, Event(wall_time=time.time(), summary=summary)]

    def write(file: IO[bytes]) -> None:
        records = RecordWriter(file)
        for event in events:
            records.write(event.SerializeToString())

    write_atomic(path, write)
