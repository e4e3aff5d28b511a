"""What a run leaves behind while it trains: metrics.jsonl in full precision, and TensorBoard."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from capsexp.errors import UserError
from capsexp.files import write_atomic

_BEGIN, _END = "events.out.tfevents.0000000000.begin", ".end"
STATUS = {"completed": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE}


class Record:
    """Writer of a run's numbers and pictures.

    metrics.jsonl holds only what a resumed run repeats bit for bit, so no times; those go to TensorBoard.

    Args:
        path: the run directory.
        start_step: the step that this process begins at; TensorBoard drops what stands at it and after it.
        length: bytes of metrics.jsonl that belong to the checkpoint begun from; the rest is cut off.
        settings: the config, for TensorBoard's HParams table, where the run shows from now on.

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
        # purge_step=0 on the first start too: the loader in Python judges by the first writer alone.
        self._writer = SummaryWriter(str(self._folder), purge_step=start_step, flush_secs=10)
        self._figures = path / "figures"
        self._repeat(metrics, start_step)
        self._writer.flush()

    def _repeat(self, metrics: Path, start_step: int) -> None:
        """Give TensorBoard again what it dropped and the checkpoint has: the figures of its step."""
        for line in metrics.read_text().splitlines() if start_step else ():
            values = json.loads(line)
            if values.pop("step") == start_step:
                self.log_timing(start_step, {tag: value for tag, value in values.items() if tag != "epoch"})

    def log_metrics(self, step: int, values: Mapping[str, float], **position: int) -> None:
        """Numbers that are the same in every repetition of the run: to both places."""
        line = json.dumps({"step": step, **position, **values})
        self._metrics.write(line.encode() + b"\n")
        self._metrics.flush()
        self.log_timing(step, values)

    def log_timing(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers that depend on the machine's mood: to TensorBoard alone."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def log_images(self, step: int, tag: str, rows: list[Float[Tensor, "N C H W"]]) -> None:
        """Rows of pictures in [0, 1], one above the other; the newest also as figures/TAG.png."""
        columns = rows[0].shape[0]
        pictures = cat([row.detach().float().cpu().clamp(0, 1) for row in rows])
        grid = make_grid(_visible(pictures), nrow=columns, padding=1, pad_value=0.5)
        self._writer.add_image(tag, grid, step)
        self._figures.mkdir(exist_ok=True)
        write_atomic(self._figures / f"{tag}.png", lambda file: save_image(grid, file, format="png"))

    def flushed_bytes(self) -> int:
        """Bytes of metrics.jsonl so far, safely on disk: part of a checkpoint's state."""
        os.fsync(self._metrics.fileno())
        self._writer.flush()
        return self._metrics.tell()

    def close(self, status: str) -> None:
        """End the record; `status` is what TensorBoard's HParams table shows (unknown if interrupted)."""
        self._writer.close()
        self._metrics.close()
        if status in STATUS:
            end_session(self._folder.parent, status)


class NoRecord:
    """In the place of a `Record` where another process of the run keeps it."""

    def log_metrics(self, step: int, values: Mapping[str, float], **position: int) -> None:
        """Nothing."""

    def log_timing(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def log_images(self, step: int, tag: str, rows: list[Float[Tensor, "N C H W"]]) -> None:
        """Nothing."""

    def flushed_bytes(self) -> int:
        """Of nothing: 0."""
        return 0

    def close(self, status: str) -> None:
        """Nothing."""


def _visible(pictures: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D H W"]:
    """Grey or colour as it is; of other channel counts, such as stereo pairs, the first channel."""
    return pictures if pictures.shape[1] in (1, 3) else pictures[:, :1]


def _typed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the types that the HParams table knows; unset values are left out."""
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in settings.items()
        if value is not None and _is_telling(key)
    }


def _is_telling(key: str) -> bool:
    """Return whether a setting is for the table: not the class of a component inside another."""
    _, _, rest = key.partition(".")
    return not key.endswith("_partial_") and not rest.endswith("._target_")


def begin_session(path: Path, settings: Mapping[str, Any]) -> None:
    """Let TensorBoard's HParams table show the run in this directory, as one that has not ended.

    TensorBoard believes the first word on a run's settings and on its end. So each has a file of its own,
    which the next start replaces. The seeds of one setting are one trial, of which the table shows means.
    """
    for old in (path / "tb").glob(f"*{_END}"):
        old.unlink()
    trial = fingerprint(without(comparable(settings), "seed"))
    # Read before all others: a name that sorts first. TensorBoard does not go back to an earlier file.
    _write_event(path / "tb" / _BEGIN, hparams_summary.hparams_pb(_typed(flat(settings)), trial_id=trial))


def end_session(path: Path, status: str) -> None:
    """Tell TensorBoard's HParams table how the run in this directory ended: completed or failed."""
    now = time.time()
    # torch's own add_hparams writes a second run, knows no failure and nothing of crashed runs.
    end = plugin_data_pb2.SessionEndInfo(status=STATUS[status], end_time_secs=now)
    content = plugin_data_pb2.HParamsPluginData(session_end_info=end, version=metadata.PLUGIN_DATA_VERSION)
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=content.SerializeToString())
    value = Summary.Value(
        tag=metadata.SESSION_END_INFO_TAG,
        metadata=SummaryMetadata(plugin_data=plugin),
        tensor=metadata.NULL_TENSOR,
    )
    # Read after all others: what a writer of this second wrote is named after its host.
    _write_event(path / "tb" / f"events.out.tfevents.{int(now):010d}.~{_END}", Summary(value=[value]))


def _write_event(path: Path, summary: Summary) -> None:
    path.parent.mkdir(exist_ok=True)
    version = Event(wall_time=time.time(), file_version="brain.Event:2")
    events = [version, Event(wall_time=time.time(), summary=summary)]

    def write(file: Any) -> None:
        records = RecordWriter(file)
        for event in events:
            records.write(event.SerializeToString())

    write_atomic(path, write)
