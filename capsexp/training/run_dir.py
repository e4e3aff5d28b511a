"""A run's directory: its lock, its config and its status.

.hydra/config.yaml  overrides.yaml   the config as composed, and the overrides as typed
resolved_config.yaml                 the same config with every interpolation resolved
data.json                            classes, and the files or checksums of every split: capsexp.data.manifest
command.txt   env.json  dirty.patch  the command; versions, commit, machine; uncommitted changes
status.json                          running | completed | failed | interrupted, step, total, heartbeat, best,
                                     steps_per_epoch, seconds of work, training_seconds, results or error,
                                     choices (option of each config group),
                                     stopped (if an accuracy ended the training: which one, on which images),
                                     costs (of the network: capsexp.training.costs), caveats of the dataset
test_errors.json   validation_errors.json   errors by class and by group: capsexp.training.tally
metrics.jsonl   train.log   tb/      metrics in full precision; the log; TensorBoard
timing.jsonl                         seconds of training by step: see capsexp.training.timing
figures/                             plots and image grids: NAME.png
checkpoints/                         see capsexp.training.checkpoint

Nothing is written through a link: `locked` and `require_own` check the names above (see capsexp.files).
"""

import contextlib
import itertools
import json
import math
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from capsexp.config.paths import absolute_settings
from capsexp.config.saved import parse_overrides, read_saved
from capsexp.config.settings import differences
from capsexp.config.yaml_files import LARGEST_CONFIG
from capsexp.documents import damage
from capsexp.errors import RunStopped, UserError, exit_code, is_interruption, is_number
from capsexp.files import own_folder, read_regular, require_own, sweep_unfinished, write_atomic, writing
from capsexp.locks import Lock, is_locked, locked
from capsexp.training.environment import describe

LOCK = "run.lock"
FOLDERS = (".hydra", "checkpoints", "figures", "predictions", "studies", "tb")
APPENDED = (LOCK, "evaluations.jsonl", "metrics.jsonl", "stdout.log", "timing.jsonl", "train.log")
REPLACED = (
    *("command.txt", "data.json", "dirty.patch", "env.json", "non_finite.json", "profile.txt"),
    *("resolved_config.yaml", "status.json", "test_errors.json", "trace.json", "validation_errors.json"),
)
LARGEST_STATUS = 16 * 2**20  # bytes
LONGEST = 1e12  # seconds; a larger number in a file is damage
CARRIED_OVER = ("started", "resumes", "step", "total", "steps_per_epoch", "training_seconds", "best", "costs")
"""Fields of status.json that a resumed run starts with."""
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
        self._lock: Lock | None = None
        # Not the time of day, which can be set back.
        self._began = time.monotonic()
        self._written = -math.inf

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
        """Keep every other process out of this directory; remove what killed writes left there.

        Raises:
            UserError: another process is training in this directory.
            WriteError: the directory cannot be written, or holds a link where capsexp writes.
        """

        def refusal(owner: str) -> str:
            return f"{self.path} is in use by {owner}: choose another run=DIR"

        self.require_own(*FOLDERS, *APPENDED, *REPLACED)
        with locked(self.path / LOCK, refusal=refusal) as self._lock:
            for folder in (self.path, *(self.path / name for name in FOLDERS)):
                sweep_unfinished(folder)
            try:
                yield
            finally:
                self._lock = None

    def require_own(self, *names: str) -> None:
        """Check that files and folders of this directory are no links, before something is written there.

        Raises:
            WriteError: one of them is; see `capsexp.files.require_own`.
        """
        for name in names:
            require_own(self.path / name, replaced=name in REPLACED)

    def require_present(self) -> None:
        """Check that nobody has removed or replaced the directory since it was locked.

        Raises:
            RunStopped: somebody has.
        """
        if self._lock is not None and not self._lock.is_in_place():
            line = f"{self.path} was removed or replaced while this run trained in it: stopped"
            raise RunStopped(line, exit_code=1)

    def is_locked(self) -> bool:
        """Whether a process is training in this directory, as far as this machine can see."""
        return is_locked(self.path / LOCK)

    def is_finished(self, config: Mapping[str, Any]) -> bool:
        """Whether this run was completed with this config, and its results can be read."""
        status = self.status()
        results = status.get("results", {})
        if status.get("status") != "completed" or not isinstance(results, dict):
            return False
        if not all(map(is_number, results.values())):
            return False
        try:
            saved = read_saved(self.path / "resolved_config.yaml")
        except (OSError, ValueError):
            return False
        return absolute_settings(saved) == absolute_settings(config)

    @contextlib.contextmanager
    def track_status(self, choices: Mapping[str, str]) -> Iterator[None]:
        """Record in status.json that a process works on this run, and how it fails if it does.

        Args:
            choices: option of each config group, such as model: em_routing.
        """
        before = self.status()
        self._resumes = bool(before)
        seconds = before.get("seconds")
        self._began = time.monotonic() - (seconds if is_number(seconds) and 0 <= seconds < LONGEST else 0)
        self._status = {"started": time.time(), "resumes": []}
        self._status |= {key: before[key] for key in CARRIED_OVER if key in before}
        if not isinstance(self._status["resumes"], list):
            self._status["resumes"] = []
        owner = {"pid": os.getpid(), "host": socket.gethostname()}
        self.update_status("running", **owner, choices=dict(choices))
        try:
            yield
        except BaseException as error:
            status = "interrupted" if is_interruption(error) else "failed"
            message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError, RunStopped):  # a full disk, or the directory is gone
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
            try:
                saved = read_saved(stored)
            except (OSError, ValueError) as error:
                raise UserError(f"{stored} cannot be read: {damage(error)}; choose another run=DIR") from None
            changes = list(differences(absolute_settings(saved), absolute_settings(config)))
        else:
            self._set_aside_leftovers()
        if changes and resume != "force":
            hint = "choose another run=DIR, or pass resume=force"
            raise UserError(*changes, f"{self.path} holds a run with another config: {hint}")
        self._write_yaml("resolved_config.yaml", config)
        if not (self.path / "command.txt").exists():
            line = shlex.join(command) + "\n"
            write_atomic(self.path / "command.txt", lambda file: file.write(line.encode()))

    def _set_aside_leftovers(self) -> None:
        """Make room for a new run in a directory that holds the rest of a removed one, without its config."""
        with writing(self.path / "status.json"):
            (self.path / "status.json").unlink(missing_ok=True)
        if not any(self.checkpoints.glob("step-*.pt")):
            return
        with writing(self.path):
            names = (self.path / f"checkpoints-without-config-{number}" for number in itertools.count(1))
            free = next(path for path in names if not os.path.lexists(path))
            self.checkpoints.rename(free)
        print(
            f"capsexp: {self.checkpoints} is not of this run: {self.path} holds no config; moved to {free}",
            file=sys.stderr,
        )

    def write_composed(self, **contents: Any) -> None:
        """Write .hydra/NAME.yaml with unresolved interpolations, for `capsexp eval run=DIR` to read.

        Hydra does not write these files: it would do so before the directory is locked and checked.
        """
        own_folder(self.path / ".hydra")
        for name, content in contents.items():
            self._write_yaml(f".hydra/{name}.yaml", content)

    def write_environment(self, device: str) -> None:
        """Write env.json, and dirty.patch if the code is a checkout with uncommitted changes."""
        if not self._writes:
            return
        content, patch = describe(device)
        self._write_json("env.json", content)
        if patch:
            write_atomic(self.path / "dirty.patch", lambda file: file.write(patch.encode()))
        else:  # an earlier start may have left one
            with writing(self.path):
                (self.path / "dirty.patch").unlink(missing_ok=True)

    def status(self) -> dict[str, Any]:
        """Return the contents of status.json; an empty dict if there is no readable one."""
        try:
            status = json.loads(read_regular(self.path / "status.json", limit=LARGEST_STATUS))
        except (OSError, ValueError, RecursionError):
            return {}
        return status if isinstance(status, dict) else {}

    def mark_dead(self, status: str, error: str, *, exit_code: int) -> None:
        """Record the end of a run whose process was killed."""
        ending = {"status": status, "error": error, "exit_code": exit_code}
        self._write_json("status.json", {**self.status(), **ending})

    def best_accuracy(self) -> float | None:
        """Return the best validation accuracy so far, which a search maximizes; None if there is none."""
        best = self.status().get("best")
        accuracy = best.get("accuracy") if isinstance(best, dict) else None
        return accuracy if is_number(accuracy) else None

    def overrides(self) -> list[str]:
        """Return the overrides that the run was started with, without `run=`; empty if unknown."""
        try:
            overrides = parse_overrides(
                read_regular(self.path / ".hydra" / "overrides.yaml", limit=LARGEST_CONFIG)
            )
        except (OSError, ValueError):
            return []
        return [override for override in overrides if not override.startswith("run=")]

    def log_resume(self, *, step: int, **more: Any) -> None:
        """Record the step at which this process starts, with more fields, and extend the list of resumes."""
        if self._resumes:
            self._status["resumes"] = [*self._status["resumes"], {"step": step, "time": time.time()}]
        self.update_status("running", step=step, **more)

    def heartbeat(self, step: int, **more: Any) -> None:
        """Record that the run is alive at this step, with more fields; write at most every five seconds.

        Raises:
            RunStopped: the directory is gone.
        """
        self.require_present()
        self._status |= {"step": step, **more}
        if time.monotonic() - self._written > HEARTBEAT_SECONDS:
            self.update_status("running", step=step)

    def update_status(self, status: str, **more: Any) -> None:
        """Write status.json: the status, and more fields such as step, error, exit_code or results."""
        seconds = time.monotonic() - self._began
        self._status |= {"status": status, "heartbeat": time.time(), "seconds": seconds, **more}
        self._write_json("status.json", self._status)
        self._written = time.monotonic()

    def report(self, name: str, content: dict[str, Any]) -> None:
        """Write NAME.json for the user to read."""
        self._write_json(f"{name}.json", content)

    def _write_yaml(self, name: str, content: Any) -> None:
        text = OmegaConf.to_yaml(OmegaConf.create(content))
        write_atomic(self.path / name, lambda file: file.write(text.encode()))

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        if self._writes:
            self.require_present()
            write_atomic(self.path / name, lambda file: file.write(json.dumps(content, indent=1).encode()))
