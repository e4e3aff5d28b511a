"""The runs below a directory, and what their files say of them."""

import importlib.metadata
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from capsexp.config.saved import parse_saved
from capsexp.config.settings import Published, comparable, published
from capsexp.errors import Notes
from capsexp.training.run_dir import RunDir

SHOWN = {"completed": "finished"}  # words of status.json that are shown by another
STATUSES = ("running", "finished", "failed", "interrupted", "died", "unknown")
SILENT_SECONDS = 600.0  # after which a run on another machine is taken for dead


@dataclass(frozen=True)
class Run:
    """One run as its files tell it. What they do not tell is None or empty."""

    path: Path
    status: str
    """`running`, `finished`, `failed`, `interrupted`, `died` (it was killed), or `unknown`: status.json is
    damaged."""
    started: float | None
    """Seconds since 1970."""
    seconds: float | None
    """Of work, in all attempts together."""
    step: int | None
    total: int | None
    epochs: float | None
    """Of the step that it stands at."""
    best: float | None
    """Best validation accuracy."""
    test: float | None
    """Test accuracy."""
    paper: Published | None
    """What its recipe says of the paper's test error."""
    choices: Mapping[str, str]
    """Option of each config group, such as model: em_routing."""
    settings: Mapping[str, Any]
    """By dotted key; empty where the config cannot be read."""
    command: str
    error: str
    version: str | None
    """Of capsexp."""


def default_root() -> Path:
    """Where runs are when nobody says otherwise."""
    return Path(os.environ.get("CAPSEXP_OUTPUTS", "outputs"))


def find(root: Path, notes: Notes) -> Iterator[Path]:
    """The run directories at or below a folder. What lies inside a run's directory is not looked at."""
    seen = {os.path.realpath(root)}
    walk = os.walk(root, followlinks=True, onerror=lambda error: notes.warning(str(error)))
    for folder, folders, files in walk:
        if not {"status.json", "resolved_config.yaml"}.isdisjoint(files):
            yield Path(folder)
            folders.clear()
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in folders}
        new = [name for name in folders if not name.startswith(".") and real[name] not in seen]
        folders[:] = sorted(new, key=_counting)
        seen |= {real[name] for name in folders}


def find_all(roots: Iterable[Path], notes: Notes) -> list[Path]:
    """The run directories at or below several folders, each once. A folder without any is a mistake."""
    found: dict[str, Path] = {}
    for root in roots:
        here = list(find(root, notes)) if root.is_dir() else []
        for path in here:
            found.setdefault(os.path.realpath(path), path)
        if not root.exists():
            notes.error(f"{root}: there is no such directory")
        elif not root.is_dir():
            notes.error(f"{root} is a file; runs are directories")
        elif not here and (root / "sweep.json").exists():
            notes.warning(f"{root}: this sweep has no runs yet")
        elif not here:
            notes.error(f"{root} is no run and holds none")
    return list(found.values())


def read_all(paths: Iterable[Path], notes: Notes) -> list[Run]:
    """Read runs, and say which were written by other versions of capsexp."""
    runs = [read(path, notes) for path in paths]
    own = importlib.metadata.version("capsexp")
    others = [run.version for run in runs if run.version not in (own, None)]
    for version in sorted(set(map(str, others))):
        told = f"capsexp {version} wrote {others.count(version)} of {len(runs)} runs, this is {own}"
        notes.warning(f"{told}: settings may be missing from them")
    return runs


def read(path: Path, notes: Notes) -> Run:
    """Read one run."""
    status = shown_status(path, notes)
    config = _mapping(path / "resolved_config.yaml", parse_saved, notes)
    environment = _mapping(path / "env.json", json.loads, notes) or {}
    figures = _part(status, "results")
    best = number(_part(status, "best"), "accuracy")
    version = _part(environment, "versions").get("capsexp")
    return Run(
        path=path,
        status=status["status"],
        started=number(status, "started"),
        seconds=number(status, "seconds"),
        step=_count(status, "step"),
        total=_count(status, "total"),
        epochs=_epochs(_count(status, "step"), _count(status, "steps_per_epoch")),
        best=number(figures, "validation/best_accuracy") if best is None else best,
        test=number(figures, "test/accuracy"),
        paper=_published(path, config or {}, notes),
        choices={str(group): str(choice) for group, choice in _part(status, "choices").items()},
        settings=comparable(config or {}),
        command=_text(path / "command.txt", notes),
        error=str(status.get("error") or ""),
        version=None if version is None else str(version),
    )


def shown_status(path: Path, notes: Notes) -> dict[str, Any]:
    """What status.json says, its status in the words that are shown and as it truly is."""
    file = path / "status.json"
    found = _mapping(file, json.loads, notes)
    if found and found.get("status") == "running" and not _is_alive(path, found):
        # It may have ended between the two looks.
        found = _mapping(file, json.loads, notes)
        if found and found.get("status") == "running":
            found["status"] = "died"
    if found is None:
        return {"status": "unknown"}
    if not found:  # killed, or still at it, before anything was written
        return {"status": "running" if RunDir(path).is_locked() else "died"}
    word = SHOWN.get(str(found.get("status")), found.get("status"))
    return {**found, "status": word if word in STATUSES else "unknown"}


def newest_first(runs: Iterable[Run]) -> list[Run]:
    """By start; a run of which it is not known comes last."""
    return sorted(runs, key=lambda run: (run.started is None, -(run.started or 0), str(run.path)))


def counted(statuses: Sequence[str]) -> str:
    """`3 finished, 1 failed`."""
    return ", ".join(f"{statuses.count(status)} {status}" for status in STATUSES if status in statuses)


def number(node: Mapping[str, Any], key: str) -> float | None:
    """A number that a file may hold, or may hold something else instead of."""
    value = node.get(key)
    return float(value) if is_number(value) else None


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a number, which truth is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _counting(name: str) -> list[Any]:
    """Order in which 10 comes after 9."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name))]


def _is_alive(path: Path, status: Mapping[str, Any]) -> bool:
    if status.get("host") == socket.gethostname():
        return RunDir(path).is_locked()
    return time.time() - (number(status, "heartbeat") or 0) < SILENT_SECONDS


def _mapping(file: Path, load: Callable[[bytes], Any], notes: Notes) -> dict[str, Any] | None:
    """What a file holds; empty if there is none, None if it cannot be read."""
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


def _text(file: Path, notes: Notes) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        notes.warning(str(error))
        return ""


def _part(node: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = node.get(key)
    return value if isinstance(value, Mapping) else {}


def _count(node: Mapping[str, Any], key: str) -> int | None:
    value = node.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
