"""Find the runs below a directory and read their files."""

import importlib.metadata
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capsexp.config.saved import parse_saved
from capsexp.config.settings import Published, comparable, published
from capsexp.errors import Notes, is_number
from capsexp.training.run_dir import RunDir

DISPLAYED = {"completed": "finished"}  # statuses of status.json that users see under another name
STATUSES = ("running", "finished", "failed", "interrupted", "died", "unknown")
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


def default_root() -> Path:
    """Return $CAPSEXP_OUTPUTS, or `outputs` if it is not set."""
    return Path(os.environ.get("CAPSEXP_OUTPUTS", "outputs"))


def find(root: Path, notes: Notes) -> Iterator[Path]:
    """Yield the run directories at or below a folder. Does not descend into run directories."""
    visited = {os.path.realpath(root)}
    walk = os.walk(root, followlinks=True, onerror=lambda error: notes.warning(str(error)))
    for folder, folders, files in walk:
        if not {"status.json", "resolved_config.yaml"}.isdisjoint(files):
            yield Path(folder)
            folders.clear()
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in folders}
        new = [name for name in folders if not name.startswith(".") and real[name] not in visited]
        folders[:] = sorted(new, key=_natural_key)
        visited |= {real[name] for name in folders}


def find_all(roots: Iterable[Path], notes: Notes) -> list[Path]:
    """Return the run directories at or below some folders, each once. A folder without runs is an error."""
    found: dict[str, Path] = {}
    for root in roots:
        paths = list(find(root, notes)) if root.is_dir() else []
        for path in paths:
            found.setdefault(os.path.realpath(path), path)
        if not root.exists():
            notes.error(f"{root}: no such directory")
        elif not root.is_dir():
            notes.error(f"{root} is a file, not a run directory")
        elif not paths and (root / "sweep.json").exists():
            notes.warning(f"{root}: this sweep has no runs yet")
        elif not paths:
            notes.error(f"{root}: no runs at or below this folder")
    return list(found.values())


def read_all(paths: Iterable[Path], notes: Notes) -> list[Run]:
    """Read runs. Warn about runs that another version of capsexp wrote."""
    runs = [read(path, notes) for path in paths]
    own = importlib.metadata.version("capsexp")
    others = [run.version for run in runs if run.version not in (own, None)]
    for version in sorted(set(map(str, others))):
        count = f"{others.count(version)} of {len(runs)} runs"
        notes.warning(f"{count} were written by capsexp {version}, this is {own}: they may lack settings")
    return runs


def read(path: Path, notes: Notes) -> Run:
    """Read one run."""
    status = read_status(path, notes)
    config = _mapping(path / "resolved_config.yaml", parse_saved, notes)
    environment = _mapping(path / "env.json", json.loads, notes) or {}
    results = _section(status, "results")
    best = get_number(_section(status, "best"), "accuracy")
    version = _section(environment, "versions").get("capsexp")
    return Run(
        path=path,
        status=status["status"],
        started=get_number(status, "started"),
        seconds=get_number(status, "seconds"),
        step=_get_int(status, "step"),
        total=_get_int(status, "total"),
        epochs=_epochs(_get_int(status, "step"), _get_int(status, "steps_per_epoch")),
        best=get_number(results, "validation/best_accuracy") if best is None else best,
        test=get_number(results, "test/accuracy"),
        paper=_published(path, config or {}, notes),
        choices={str(group): str(choice) for group, choice in _section(status, "choices").items()},
        settings=comparable(config or {}),
        command=_read_text(path / "command.txt", notes),
        error=str(status.get("error") or ""),
        version=None if version is None else str(version),
    )


def read_status(path: Path, notes: Notes) -> dict[str, Any]:
    """Return the content of status.json, with the status that users see.

    A `running` run whose process is gone is returned as `died`.
    """
    file = path / "status.json"
    content = _mapping(file, json.loads, notes)
    if content and content.get("status") == "running" and not _is_alive(path, content):
        # Read again: the run may have ended since the first read.
        content = _mapping(file, json.loads, notes)
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


def get_number(node: Mapping[str, Any], key: str) -> float | None:
    """Return a number from a file's content; None if it is missing or not a number."""
    value = node.get(key)
    return float(value) if is_number(value) else None


def _natural_key(name: str) -> list[Any]:
    """Return a sort key that puts 10 after 9."""
    return [int(text) if index % 2 else text for index, text in enumerate(re.split(r"(\d+)", name))]


def _is_alive(path: Path, status: Mapping[str, Any]) -> bool:
    if status.get("host") == socket.gethostname():
        return RunDir(path).is_locked()
    return time.time() - (get_number(status, "heartbeat") or 0) < HEARTBEAT_TIMEOUT


def _mapping(file: Path, load: Callable[[bytes], Any], notes: Notes) -> dict[str, Any] | None:
    """Return the keys and values in a file: empty without the file, None if it cannot be read."""
    try:
        found = load(file.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it holds no keys")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        notes.warning(f"{file} cannot be read: {' '.join(str(error).split())}")
        return None
    return found


def _published(path: Path, config: Mapping[str, Any], notes: Notes) -> Published | None:
    try:
        return published(config)
    except ValueError as error:
        notes.warning(f"{path}: {error}")
        return None


def _epochs(step: int | None, steps_per_epoch: int | None) -> float | None:
    return step / steps_per_epoch if step is not None and steps_per_epoch else None


def _read_text(file: Path, notes: Notes) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        notes.warning(str(error))
        return ""


def _section(node: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = node.get(key)
    return value if isinstance(value, Mapping) else {}


def _get_int(node: Mapping[str, Any], key: str) -> int | None:
    value = node.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
