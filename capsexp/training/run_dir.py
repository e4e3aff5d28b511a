"""A run's directory: its lock, its config and its status.

.hydra/config.yaml  overrides.yaml   the config as composed, and the overrides as typed
resolved_config.yaml                 the same config with every interpolation resolved
data.json                            classes, and the files or checksums of every split: capsexp.data.manifest
command.txt   env.json  dirty.patch  the command; versions, commit, machine; uncommitted changes
status.json                          running | completed | failed | interrupted, step, total, heartbeat, best,
                                     steps_per_epoch, seconds of work, results or error,
                                     choices (option of each config group),
                                     stopped (if an accuracy ended the training: which one, on which images)
metrics.jsonl   train.log   tb/      metrics in full precision; the log; TensorBoard
figures/                             plots and image grids: NAME.png
checkpoints/                         see capsexp.training.checkpoint
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from capsexp.config.paths import with_absolute_paths
from capsexp.config.saved import LARGEST_CONFIG, parse_overrides, parse_saved
from capsexp.config.settings import comparable, differences
from capsexp.errors import UserError, exit_code, is_interruption
from capsexp.files import is_locked, locked, read_regular, write_atomic

LOCK = "run.lock"
CARRIED_OVER = ("started", "resumes", "step", "total", "steps_per_epoch", "best")
"""Fields of status.json that a resumed run starts with."""
PACKAGES = ("capsexp", "torch", "torchvision", "hydra-core", "omegaconf", "tensorboard", "numpy")
HEARTBEAT_SECONDS = 5


class RunDir:
    """One run's directory, held by one process at a time.

    Args:
        path: the directory.
        writes: False in the other processes of a distributed run, which write nothing.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self._writes = path, writes
        self._status: dict[str, Any] = {}
        self._resumes = False
        self._began = time.time()
        self._written = 0.0

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        """Folder of the figures of this run."""
        return self.path / "figures"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out of this directory.

        Raises:
            UserError: another process is training in this directory.
        """

        def refusal(owner: str) -> str:
            return f"{self.path} is in use by {owner}: choose another run=DIR"

        with locked(self.path / LOCK, refusal=refusal):
            yield

    def is_locked(self) -> bool:
        """Whether a process is training in this directory, as far as this machine can see."""
        return is_locked(self.path / LOCK)

    def is_finished(self, config: Mapping[str, Any]) -> bool:
        """Whether this run was completed with this config."""
        if self.status().get("status") != "completed":
            return False
        try:
            saved = parse_saved((self.path / "resolved_config.yaml").read_bytes())
        except OSError:
            return False
        return _settings(saved) == _settings(config)

    @contextlib.contextmanager
    def track_status(self, choices: Mapping[str, str]) -> Iterator[None]:
        """Record in status.json that a process works on this run, and how it fails if it does.

        Args:
            choices: option of each config group, such as model: em_routing.
        """
        before = self.status()
        self._resumes = bool(before)
        self._began = time.time() - before.get("seconds", 0)
        self._status = {"started": time.time(), "resumes": []}
        self._status |= {key: before[key] for key in CARRIED_OVER if key in before}
        owner = {"pid": os.getpid(), "host": socket.gethostname()}
        self.update_status("running", **owner, choices=dict(choices))
        try:
            yield
        except BaseException as error:
            status = "interrupted" if is_interruption(error) else "failed"
            message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self.update_status(status, error=message, exit_code=exit_code(error))
            raise

    def check_config(self, config: dict[str, Any], *, resume: str, command: Sequence[str]) -> None:
        """Write the config of a new run, or check that a resumed run has the same config as before.

        Args:
            config: the plain config.
            resume: `auto` refuses a config that differs from the earlier one; `force` replaces it.
            command: the arguments as typed.

        Raises:
            UserError: the config differs; one line for each key.
        """
        stored = self.path / "resolved_config.yaml"
        changes: list[str] = []
        if stored.exists():
            changes = list(differences(_settings(parse_saved(stored.read_bytes())), _settings(config)))
        if changes and resume != "force":
            hint = "choose another run=DIR, or pass resume=force"
            raise UserError(*changes, f"{self.path} holds a run with another config: {hint}")
        self._write_yaml("resolved_config.yaml", config)
        if not (self.path / "command.txt").exists():
            line = shlex.join(command) + "\n"
            write_atomic(self.path / "command.txt", lambda file: file.write(line.encode()))

    def write_composed(self, **contents: Any) -> None:
        """Write .hydra/NAME.yaml with unresolved interpolations, for `capsexp eval run=DIR` to read.

        Hydra does not write these files: it would do so before the directory is locked and checked.
        """
        (self.path / ".hydra").mkdir(exist_ok=True)
        for name, content in contents.items():
            self._write_yaml(f".hydra/{name}.yaml", content)

    def write_environment(self, device: str) -> None:
        """Write env.json, and dirty.patch if the code is a checkout with uncommitted changes."""
        if not self._writes:
            return
        commit, patch = _git_state(Path(__file__).resolve().parents[2])
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        machine = {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
        }
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "device": device}
        self._write_json(
            "env.json", {"versions": versions, "commit": commit, "dirty": bool(patch), **machine, **owner}
        )
        if patch:
            write_atomic(self.path / "dirty.patch", lambda file: file.write(patch.encode()))
        else:  # an earlier start may have left one
            (self.path / "dirty.patch").unlink(missing_ok=True)

    def status(self) -> dict[str, Any]:
        """Return the contents of status.json; an empty dict if there is no readable one."""
        try:
            status = json.loads((self.path / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return status if isinstance(status, dict) else {}

    def mark_dead(self, status: str, error: str, *, exit_code: int) -> None:
        """Record the end of a run whose process was killed."""
        ending = {"status": status, "error": error, "exit_code": exit_code}
        self._write_json("status.json", {**self.status(), **ending})

    def best_accuracy(self) -> float | None:
        """Return the best validation accuracy so far, which a search maximizes; None if there is none."""
        return (self.status().get("best") or {}).get("accuracy")

    def overrides(self) -> list[str]:
        """Return the overrides that the run was started with, without `run=`; empty if unknown."""
        try:
            overrides = parse_overrides(
                read_regular(self.path / ".hydra" / "overrides.yaml", limit=LARGEST_CONFIG)
            )
        except (OSError, ValueError):
            return []
        return [override for override in overrides if not override.startswith("run=")]

    def log_resume(
        self, *, step: int, total: int, steps_per_epoch: int, best: Mapping[str, Any] | None
    ) -> None:
        """Record the step at which this process starts, and extend the list of resumes."""
        if self._resumes:
            self._status["resumes"] = [*self._status["resumes"], {"step": step, "time": time.time()}]
        self.update_status("running", step=step, total=total, steps_per_epoch=steps_per_epoch, best=best)

    def heartbeat(self, step: int) -> None:
        """Record that the run is alive at this step; write the file at most every five seconds."""
        self._status["step"] = step
        if time.time() - self._written > HEARTBEAT_SECONDS:
            self.update_status("running", step=step)

    def update_status(self, status: str, **more: Any) -> None:
        """Write status.json: the status, and more fields such as step, error, exit_code or results."""
        now = time.time()
        self._status |= {"status": status, "heartbeat": now, "seconds": now - self._began, **more}
        self._write_json("status.json", self._status)
        self._written = time.time()

    def report(self, name: str, content: dict[str, Any]) -> None:
        """Write NAME.json for the user to read."""
        self._write_json(f"{name}.json", content)

    def _write_yaml(self, name: str, content: Any) -> None:
        text = OmegaConf.to_yaml(OmegaConf.create(content))
        write_atomic(self.path / name, lambda file: file.write(text.encode()))

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        if self._writes:
            write_atomic(self.path / name, lambda file: file.write(json.dumps(content, indent=1).encode()))


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings to compare; earlier versions stored paths as typed."""
    return comparable(with_absolute_paths(config))


def _git_state(folder: Path) -> tuple[str | None, str]:
    """Return commit and uncommitted changes of the code; (None, "") if it is no git checkout."""
    if not (folder / ".git").exists():
        return None, ""
    try:
        git = ["git", "-C", str(folder)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        patch = subprocess.run([*git, "diff", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None, ""
    return commit.stdout.strip(), patch.stdout
