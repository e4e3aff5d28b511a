"""A run's directory: who owns it, what was run in it, and how it stands.

.hydra/config.yaml  overrides.yaml   the config as composed, and what was typed
resolved_config.yaml                 the same with every value filled in
command.txt   env.json  dirty.patch  the command; versions, commit, machine; uncommitted changes
status.json                          running | completed | failed | interrupted, step, total, heartbeat, best,
                                     steps_per_epoch, seconds of work, results or error,
                                     choices (option of each config group),
                                     stopped (at which accuracy, on which pictures, if one ended the training)
metrics.jsonl   train.log   tb/      numbers in full precision; the log; TensorBoard
figures/                             pictures: NAME.png
checkpoints/                         see capsexp.training.checkpoint
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from capsexp.config.saved import parse_saved
from capsexp.config.settings import comparable, differences
from capsexp.errors import UserError, exit_code, is_interruption
from capsexp.files import make_folder, write_atomic

LOCK = "run.lock"
KEPT = (
    "started",
    "resumes",
    "step",
    "total",
    "steps_per_epoch",
    "best",
)  # of status.json, when another attempt begins
PACKAGES = ("capsexp", "torch", "torchvision", "hydra-core", "omegaconf", "tensorboard", "numpy")


class RunDir:
    """One run's directory, held by one process at a time.

    Args:
        path: the directory.
        writes: False in a process that trains beside the one that holds the directory: it leaves no trace.
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
        """Folder of the pictures that were made of this run."""
        return self.path / "figures"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out. The system lets go of the lock when this process dies.

        Raises:
            UserError: another process is training in this directory.
        """
        with hold(
            self.path / LOCK, lambda owner: f"{self.path} is in use by {owner}: choose another run=DIR"
        ):
            yield

    def is_locked(self) -> bool:
        """Whether a process is at work here, as far as this machine can see."""
        try:
            with open(self.path / LOCK) as lock:
                return not _locked(lock, fcntl.LOCK_SH)
        except OSError:
            return False

    def is_finished(self, config: Mapping[str, Any]) -> bool:
        """Whether this run, under this very config, was completed."""
        if self.status().get("status") != "completed":
            return False
        try:
            return comparable(parse_saved((self.path / "resolved_config.yaml").read_bytes())) == comparable(
                config
            )
        except OSError:
            return False

    @contextlib.contextmanager
    def track_status(self, choices: Mapping[str, str]) -> Iterator[None]:
        """One process's work on the run: if it fails, status.json says how.

        Args:
            choices: option of each config group, such as model: em_routing.
        """
        before = self.status()
        self._resumes = bool(before)
        self._began = time.time() - before.get("seconds", 0)
        self._status = {"started": time.time(), "resumes": []}
        self._status |= {key: before[key] for key in KEPT if key in before}
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
        """Write down what is run, or check that it is what was run here before.

        Args:
            config: the plain config.
            resume: `auto` refuses a config that differs from the earlier one; `force` replaces it.
            command: the words that were typed.

        Raises:
            UserError: the config differs; one line for each key.
        """
        stored = self.path / "resolved_config.yaml"
        changes: list[str] = []
        if stored.exists():
            changes = list(differences(comparable(parse_saved(stored.read_bytes())), comparable(config)))
        if changes and resume != "force":
            hint = f"{self.path} holds a run with another config: resume=force takes the new one"
            raise UserError(*changes, hint)
        self._write_yaml("resolved_config.yaml", config)
        if not (self.path / "command.txt").exists():
            line = shlex.join(command) + "\n"
            write_atomic(self.path / "command.txt", lambda file: file.write(line.encode()))

    def write_composed(self, **contents: Any) -> None:
        """Write .hydra/NAME.yaml, interpolations as they are: what `capsexp eval run=DIR` goes by.

        Not left to Hydra, which would write before anybody has asked whose directory this is.
        """
        (self.path / ".hydra").mkdir(exist_ok=True)
        for name, content in contents.items():
            self._write_yaml(f".hydra/{name}.yaml", content)

    def write_environment(self, device: str) -> None:
        """Write env.json, and dirty.patch when the code is a checkout with uncommitted changes."""
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
        else:  # of an earlier start
            (self.path / "dirty.patch").unlink(missing_ok=True)

    def status(self) -> dict[str, Any]:
        """What status.json says; empty when there is none."""
        try:
            found = json.loads((self.path / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def mark_dead(self, status: str, error: str, *, exit_code: int) -> None:
        """Say how the run ended, in the place of a process that died without a word."""
        ending = {"status": status, "error": error, "exit_code": exit_code}
        self._write_json("status.json", {**self.status(), **ending})

    def best_accuracy(self) -> float | None:
        """The best validation accuracy so far; None without one. What a search goes by."""
        return (self.status().get("best") or {}).get("accuracy")

    def overrides(self) -> list[str]:
        """The overrides that the run was started with, but for its place; empty if they are not known."""
        try:
            texts = OmegaConf.to_container(OmegaConf.load(self.path / ".hydra" / "overrides.yaml"))
        except (OSError, ValueError, YAMLError):
            return []
        words = [str(text) for text in texts] if isinstance(texts, list) else []
        return [text for text in words if not text.startswith("run=")]

    def log_resume(
        self, *, step: int, total: int, steps_per_epoch: int, best: Mapping[str, Any] | None
    ) -> None:
        """Say from which step on this attempt works, and keep the list of resumes."""
        if self._resumes:
            self._status["resumes"] = [*self._status["resumes"], {"step": step, "time": time.time()}]
        self.update_status("running", step=step, total=total, steps_per_epoch=steps_per_epoch, best=best)

    def heartbeat(self, step: int) -> None:
        """Say that the run is alive and where it stands; written at most once in five seconds."""
        self._status["step"] = step
        if time.time() - self._written > 5:
            self.update_status("running", step=step)

    def update_status(self, status: str, **more: Any) -> None:
        """Write status.json: a status, and whatever belongs to it (step, error, exit_code, results)."""
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


@contextlib.contextmanager
def hold(path: Path, refusal: Callable[[str], str]) -> Iterator[None]:
    """Hold a lock file, in a folder that is made if need be. The system lets go of it when this process dies.

    Args:
        path: the file.
        refusal: what to say when another process holds it; gets that process's name.

    Raises:
        UserError: another process holds it, or the folder cannot be made.
    """
    make_folder(path.parent)
    with open(path, "a+") as lock:
        if not _locked(lock, fcntl.LOCK_EX):
            lock.seek(0)
            raise UserError(refusal(lock.read() or "another process"))
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def _locked(file: IO[str], kind: int) -> bool:
    """Take the lock of an open file. Who only looks holds it for a moment, so one refusal is not enough."""
    for _ in range(5):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.02)
    return False


def _git_state(folder: Path) -> tuple[str | None, str]:
    """Commit and uncommitted changes of the code, or (None, "") where it is no checkout."""
    if not (folder / ".git").exists():
        return None, ""
    try:
        git = ["git", "-C", str(folder)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        patch = subprocess.run([*git, "diff", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None, ""
    return commit.stdout.strip(), patch.stdout
