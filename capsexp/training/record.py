"""The metrics of a run: metrics.jsonl in full precision, and TensorBoard."""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from jaxtyping import Float
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.plugins.hparams import summary_v2 as hparams_summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, cat
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image

from capsexp.config.settings import comparable, fingerprint, flat, without
from capsexp.data.image_ops import displayable
from capsexp.errors import UserError, is_interruption
from capsexp.files import write_atomic

_BEGIN, _END = "events.out.tfevents.0000000000.begin", ".end"
STATUS = {"completed": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE}


class Record:
    """Writes a run's metrics and images.

    metrics.jsonl has only values that a resumed run repeats bit for bit. Timings go to TensorBoard.

    Args:
        path: the run directory.
        start_step: the step at which this process starts; TensorBoard drops earlier records from it on.
        length: bytes of metrics.jsonl at the checkpoint that the run resumes from; the rest is cut off.
        settings: the config, for TensorBoard's HParams table.

    Raises:
        UserError: metrics.jsonl is shorter than `length`.
    """

    def __init__(self, path: Path, *, start_step: int, length: int, settings: Mapping[str, Any]) -> None:
        metrics = path / "metrics.jsonl"
        if length > (metrics.stat().st_size if metrics.exists() else 0):
            raise UserError(f"{metrics} is shorter than when its checkpoint was made")
        self._metrics = open(metrics, "ab")  # noqa: SIM115 - closed in close()
        self._metrics.seek(self._metrics.truncate(length))
        self._folder = path / "tb"
        begin_session(path, settings)
        # purge_step=0 on the first start too: the loader in Python looks only at the first writer.
        self._writer = SummaryWriter(str(self._folder), purge_step=start_step, flush_secs=10)
        self._figures = path / "figures"
        self._repeat_step(metrics, start_step)
        self._writer.flush()

    def _repeat_step(self, metrics: Path, start_step: int) -> None:
        """Write the metrics of the checkpoint's own step to TensorBoard again, which dropped them."""
        for line in metrics.read_text().splitlines() if start_step else ():
            values = json.loads(line)
            if values.pop("step") == start_step:
                self.log_timing(start_step, {tag: value for tag, value in values.items() if tag != "epoch"})

    def log_metrics(self, step: int, values: Mapping[str, float], **position: int) -> None:
        """Write reproducible metrics to metrics.jsonl and TensorBoard."""
        line = json.dumps({"step": step, **position, **values})
        self._metrics.write(line.encode() + b"\n")
        self._metrics.flush()
        self.log_timing(step, values)

    def log_timing(self, step: int, values: Mapping[str, float]) -> None:
        """Write timing metrics, which are not reproducible, to TensorBoard only."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def log_images(self, step: int, tag: str, rows: list[Float[Tensor, "N C H W"]]) -> None:
        """Write a grid of image rows in [0, 1] to TensorBoard, and to figures/TAG.png, which it replaces."""
        columns = rows[0].shape[0]
        images = cat([row.detach().float().cpu().clamp(0, 1) for row in rows])
        grid = make_grid(displayable(images), nrow=columns, padding=1, pad_value=0.5)
        self._writer.add_image(tag, grid, step)
        self._figures.mkdir(exist_ok=True)
        write_atomic(self._figures / f"{tag}.png", lambda file: save_image(grid, file, format="png"))

    def flushed_bytes(self) -> int:
        """Flush metrics.jsonl to disk and return its length in bytes, which checkpoints store."""
        os.fsync(self._metrics.fileno())
        self._writer.flush()
        return self._metrics.tell()

    def close(self, status: str) -> None:
        """Close the files; TensorBoard's HParams table shows `status` (unknown if interrupted)."""
        self._writer.close()
        self._metrics.close()
        if status in STATUS:
            end_session(self._folder.parent, status)


class NoRecord:
    """Takes the place of a `Record` in processes other than rank 0."""

    def log_metrics(self, step: int, values: Mapping[str, float], **position: int) -> None:
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
        record.close("interrupted" if is_interruption(error) else "failed")
        raise
    record.close("completed")


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


def begin_session(path: Path, settings: Mapping[str, Any]) -> None:
    """Add the run in this directory to TensorBoard's HParams table, as one that has not ended.

    TensorBoard keeps the first record it reads of a run's settings, and of its end. So each of the two has a
    file of its own, which the next start replaces. Runs that differ only in the seed are one trial, of which
    the table shows means.
    """
    for old in (path / "tb").glob(f"*{_END}"):
        old.unlink()
    trial = fingerprint(without(comparable(settings), "seed"))
    # The name sorts first: TensorBoard never returns to an earlier file.
    _write_event(path / "tb" / _BEGIN, hparams_summary.hparams_pb(_hparams(flat(settings)), trial_id=trial))


def end_session(path: Path, status: str) -> None:
    """Record in TensorBoard's HParams table how the run in this directory ended: completed or failed."""
    now = time.time()
    # torch's own add_hparams writes a second run, and has no status for failed or crashed runs.
    end = plugin_data_pb2.SessionEndInfo(status=STATUS[status], end_time_secs=now)
    content = plugin_data_pb2.HParamsPluginData(session_end_info=end, version=metadata.PLUGIN_DATA_VERSION)
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=content.SerializeToString())
    value = Summary.Value(
        tag=metadata.SESSION_END_INFO_TAG,
        metadata=SummaryMetadata(plugin_data=plugin),
        tensor=metadata.NULL_TENSOR,
    )
    # The name sorts last, also after files of the same second, whose names continue with the host.
    _write_event(path / "tb" / f"events.out.tfevents.{int(now):010d}.~{_END}", Summary(value=[value]))


def _write_event(path: Path, summary: Summary) -> None:
    path.parent.mkdir(exist_ok=True)
    version = Event(wall_time=time.time(), file_version="brain.Event:2")
    events = [version, Event(wall_time=time.time(), summary=summary)]

    def write(file: IO[bytes]) -> None:
        records = RecordWriter(file)
        for event in events:
            records.write(event.SerializeToString())

    write_atomic(path, write)
