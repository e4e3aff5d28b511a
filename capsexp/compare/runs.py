"""Read the files of runs."""

import importlib.metadata
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capsexp.compare.fields import Fields, Files
from capsexp.compare.find import find_all
from capsexp.compare.index import MIN_RUNS, Index, signature
from capsexp.config.saved import parse_saved
from capsexp.config.settings import Published, comparable, published
from capsexp.documents import LARGEST, damage, parse_json
from capsexp.errors import Notes, is_integer
from capsexp.files import read_regular
from capsexp.training.run_dir import RunDir

DISPLAYED = {"completed": "finished"}  # statuses of status.json that users see under another name
STATUSES = ("running", "finished", "failed", "interrupted", "died", "unknown")
MAX_SETTINGS = 1000  # of a run
MAX_VERSIONS = 5  # of capsexp, in messages
LARGEST_TEXT = 2**20  # bytes of command.txt
HEARTBEAT_TIMEOUT = 600.0  # seconds; a run on another machine that is silent for longer has died


@dataclass(frozen=True)
class Run:
    """One run, read from its files. Missing information is None or empty."""

    path: Path
    status: str
    """`running`, `finished`, `failed`, `interrupted`, `died` (its process was killed) or `unknown`
    (status.json is damaged)."""
    started: float | None
    """Seconds since 1970."""
    seconds: float | None
    """Time spent training, summed over all attempts."""
    step: int | None
    total: int | None
    epochs: float | None
    """Epochs completed at `step`."""
    best: float | None
    """Best validation accuracy."""
    test: float | None
    """Test accuracy."""
    paper: Published | None
    """The paper's test error, if the recipe gives one."""
    choices: Mapping[str, str]
    """The chosen option of each config group, such as model: em_routing."""
    settings: Mapping[str, Any]
    """By dotted key; empty if the config cannot be read."""
    command: str
    error: str
    version: str | None
    """The version of capsexp that wrote the run."""
    parameters: int | None = None
    """Trained values of the network."""
    multiplications: int | None = None
    """Of a forward pass of one image; see capsexp.training.costs."""
    peak_memory: int | None = None
    """Of its process, in bytes."""
    training_seconds: float | None = None
    """Of the training steps alone."""

    @property
    def images_per_second(self) -> float | None:
        """Speed of training, without validation, checkpoints and the test."""
        batch = self.settings.get("trainer.batch_size")
        if self.step is None or not self.training_seconds or not is_integer(batch):
            return None
        return self.step * batch / self.training_seconds


def read_below(folders: Iterable[Path], notes: Notes) -> list[Run]:
    """Read the runs at or below some folders."""
    return read_all(find_all(folders, notes), notes)


def read_all(paths: Iterable[Path], notes: Notes) -> list[Run]:
    """Read runs. Warn about runs that another version of capsexp wrote."""
    paths = list(paths)
    counts = Counter(path.parent for path in paths)
    indexes = {folder: Index(folder) for folder, count in counts.items() if count >= MIN_RUNS}
    runs = [_read_indexed(path, indexes.get(path.parent), notes) for path in paths]
    for folder, index in indexes.items():
        index.write({path.name for path in paths if path.parent == folder})
    own = importlib.metadata.version("capsexp")
    others = Counter(run.version for run in runs if run.version not in (own, None))
    for version, count in sorted(others.items())[:MAX_VERSIONS]:
        line = f"{count} of {len(runs)} runs were written by capsexp {version}"
        notes.warning(f"{line}, this is {own}: they may lack settings")
    if len(others) > MAX_VERSIONS:
        notes.warning(f"other runs were written by {len(others) - MAX_VERSIONS} more versions of capsexp")
    return runs


def _read_indexed(path: Path, index: Index | None, notes: Notes) -> Run:
    """Read one run; its files only if the index does not know them."""
    before = (
        None if index is None else signature(path)
    )  # before the files are read: they may change meanwhile
    if index is None or before is None:
        return read(path, notes)
    if (files := index.get(path.name, before)) is None:
        own = Notes()
        files = read_files(path, own)
        for line in own.warnings:
            notes.warning(line)
        if not own.warnings:
            index.add(path.name, before, files)
    return run_of(path, files, notes)


def read(path: Path, notes: Notes) -> Run:
    """Read one run."""
    return run_of(path, read_files(path, notes), notes)


def read_files(path: Path, notes: Notes) -> Files:
    """Read the files of a run that tables show."""
    status = read_status(path, notes)
    config = _mapping(path / "resolved_config.yaml", parse_saved, notes) or {}
    environment = Fields(_mapping(path / "env.json", parse_json, notes) or {})
    version = environment.section("versions").name("capsexp")
    _warn_of_values(path / "env.json", environment, notes)
    return Files(
        status=status,
        settings=_settings(path, config, notes),
        paper=_published(path, config, notes),
        command=_read_text(path / "command.txt", notes),
        version=version,
    )


def run_of(path: Path, files: Files, notes: Notes) -> Run:
    """Return the run of a directory whose files have been read."""
    status = Fields(files.status)
    results, best, costs = status.section("results"), status.section("best"), status.section("costs")
    step, steps_per_epoch = status.count("step"), status.count("steps_per_epoch")
    accuracy = best.accuracy("accuracy")
    run = Run(
        path=path,
        status=files.status["status"],
        started=status.time("started"),
        seconds=status.time("seconds"),
        step=step,
        total=status.count("total"),
        epochs=step / steps_per_epoch if step is not None and steps_per_epoch else None,
        best=results.accuracy("validation/best_accuracy") if accuracy is None else accuracy,
        test=results.accuracy("test/accuracy"),
        paper=files.paper,
        choices=status.section("choices").names(),
        settings=files.settings,
        command=files.command,
        error=status.text("error"),
        version=files.version,
        parameters=costs.count("parameters"),
        multiplications=costs.count("multiplications"),
        peak_memory=costs.count("peak_memory"),
        training_seconds=status.time("training_seconds"),
    )
    _warn_of_values(path / "status.json", status, notes)
    return run


def read_status(path: Path, notes: Notes) -> dict[str, Any]:
    """Return the content of status.json, with the status that users see.

    A `running` run whose process is gone is returned as `died`.
    """
    file = path / "status.json"
    content = _mapping(file, parse_json, notes)
    if content and content.get("status") == "running" and not _is_alive(path, content):
        # Read again: the run may have ended since the first read.
        content = _mapping(file, parse_json, notes)
        if content and content.get("status") == "running":
            content["status"] = "died"
    if content is None:
        return {"status": "unknown"}
    if not content:  # no status.json yet: the run has just started, or was killed before it wrote one
        return {"status": "running" if RunDir(path).is_locked() else "died"}
    status = DISPLAYED.get(str(content.get("status")), content.get("status"))
    return {**content, "status": status if status in STATUSES else "unknown"}


def newest_first(runs: Iterable[Run]) -> list[Run]:
    """Sort runs by start time, newest first; runs without a start time come last."""
    return sorted(runs, key=lambda run: (run.started is None, -(run.started or 0), str(run.path)))


def count_statuses(statuses: Sequence[str]) -> str:
    """Return a summary such as `3 finished, 1 failed`."""
    return ", ".join(f"{statuses.count(status)} {status}" for status in STATUSES if status in statuses)


def _is_alive(path: Path, status: Mapping[str, Any]) -> bool:
    if status.get("host") == socket.gethostname():
        return RunDir(path).is_locked()
    heartbeat = Fields(status).time("heartbeat")
    return time.time() - (heartbeat or 0) < HEARTBEAT_TIMEOUT


def _mapping(file: Path, parse: Callable[[bytes], Any], notes: Notes) -> dict[str, Any] | None:
    """Return the keys and values in a file: empty without the file, None if it cannot be read."""
    try:
        found = parse(read_regular(file, limit=LARGEST))
        if not isinstance(found, dict):
            raise ValueError("it holds no keys")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notes.warning(f"{file} cannot be read: {damage(error)}")
        return None
    return found


def _warn_of_values(file: Path, fields: Fields, notes: Notes) -> None:
    if fields.wrong:
        notes.warning(f"{file}: ignored values that cannot be right: {', '.join(fields.wrong)}")


def _settings(path: Path, config: Mapping[str, Any], notes: Notes) -> dict[str, Any]:
    settings = comparable(config)
    if len(settings) > MAX_SETTINGS:
        notes.warning(f"{path}/resolved_config.yaml is not used: it has {len(settings)} settings")
        return {}
    return settings


def _published(path: Path, config: Mapping[str, Any], notes: Notes) -> Published | None:
    try:
        return published(config)
    except ValueError as error:
        notes.warning(f"{path}: {damage(error)}")
        return None


def _read_text(file: Path, notes: Notes) -> str:
    try:
        return read_regular(file, limit=LARGEST_TEXT).decode(errors="replace").strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        notes.warning(f"{file} cannot be read: {damage(error)}")
        return ""
