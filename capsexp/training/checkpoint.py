"""Atomic checkpoints, verified by checksum before loading.

checkpoints/step-00000400.pt     torch.save of plain dicts, tensors and numbers
checkpoints/step-00000400.json   sha256, size, step; written last: a checkpoint without it does not count
checkpoints/last.pt, best.pt     links to two of them; without validation images the last is the best
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from capsexp.documents import read_json
from capsexp.errors import RunStopped, UserError, first_line
from capsexp.files import (
    WriteError,
    own_folder,
    sweep_unfinished,
    unfinished,
    write_atomic,
    writing,
)
from capsexp.training.saved_state import problem

SCHEMA = 1
LARGEST_MANIFEST = 2**16  # bytes
_NAME = re.compile(r"step-(\d{8})\.pt")


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


def save(folder: Path, state: dict[str, Any], *, step: int) -> Path:
    """Write the checkpoint of a step and link `last.pt` to it.

    A kill at any moment leaves the earlier checkpoints unchanged.

    Args:
        folder: the run's `checkpoints` folder.
        state: only dicts, lists, numbers, strings and tensors, which `weights_only` loading accepts.
        step: optimizer steps done.
    """
    path = own_folder(folder) / name_of(step)

    def write(file: IO[bytes]) -> None:
        torch.save({"schema": SCHEMA, **state}, file)
        file.flush()
        # The JSON of an earlier file of this name would describe the wrong file. It is deleted only now that
        # the new file is complete: if writing fails, the earlier checkpoint stays valid.
        path.with_suffix(".json").unlink(missing_ok=True)

    write_atomic(path, write)
    manifest = {"sha256": _sha256(path), "size": path.stat().st_size, "step": step, "schema": SCHEMA}
    write_atomic(path.with_suffix(".json"), lambda file: file.write(json.dumps(manifest).encode()))
    link(folder, "last", step)
    return path


def load(path: Path) -> dict[str, Any]:
    """Load the state in a checkpoint to the CPU.

    Raises:
        CheckpointError: the file or its checksum is missing, damaged, of another schema, holds anything
            other than tensors and plain values, lacks a key, or has weights that are not finite.
    """
    path = path.resolve()
    _check_manifest(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        schema = state.get("schema") if isinstance(state, dict) else None
        wrong = (
            f"its schema is {schema!r}, this version reads {SCHEMA}" if schema != SCHEMA else problem(state)
        )
    except Exception as error:  # unpickling can raise anything, and so can tensors of odd kinds
        raise CheckpointError(f"{path}: refused, it cannot be read safely: {first_line(error)}") from None
    if wrong is not None:
        raise CheckpointError(f"{path}: refused, {wrong}")
    return state


def load_newest(folder: Path, *, report: Callable[[str], None]) -> dict[str, Any] | None:
    """Load the newest usable checkpoint; return None if the run has never saved one.

    Args:
        folder: the run's `checkpoints` folder.
        report: called with one line for each refused checkpoint.

    Raises:
        CheckpointError: there are checkpoints but none is usable. A new run must not overwrite them.
    """
    refusals = []
    for path in reversed(list_saved(folder)):
        try:
            return load(path)
        except CheckpointError as error:
            refusals.append(str(error))
            report(f"{error}; trying the previous one")
    if refusals:
        raise CheckpointError(
            *refusals, f"no usable checkpoint is left in {folder}; start in another directory"
        )
    return None


def list_saved(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first.

    The newest file does not count if its JSON is missing: a kill between the two leaves that behind. An older
    one without JSON counts, so that loading it is an error.
    """
    paths = sorted(path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name))
    if paths and not paths[-1].with_suffix(".json").exists():
        paths.pop()
    return paths


def name_of(step: int) -> str:
    """Return the file name of a step's checkpoint."""
    return f"step-{step:08d}.pt"


def step_of(path: Path) -> int:
    """Return the step in the file name of a checkpoint, or of a link to one.

    Raises:
        CheckpointError: it is not the name of a checkpoint.
    """
    match = _NAME.fullmatch(path.resolve().name)
    if match is None:
        raise CheckpointError(f"{path}: not the name of a checkpoint")
    return int(match[1])


def link(folder: Path, name: str, step: int) -> None:
    """Link `NAME.pt` to the checkpoint of a step."""
    link, new = folder / f"{name}.pt", unfinished(folder / name)
    with writing(link):
        new.unlink(missing_ok=True)
        new.symlink_to(name_of(step))
        os.replace(new, link)


def prune(folder: Path, *, keep_last: int, keep_steps: Collection[int], keep_every: int | None) -> None:
    """Delete the leftovers of killed saves, and old checkpoints.

    Args:
        folder: the run's `checkpoints` folder.
        keep_last: keep so many of the newest checkpoints.
        keep_steps: keep the checkpoints of these steps.
        keep_every: keep the checkpoints of every so many steps; None for no more.
    """
    sweep_unfinished(folder)
    for path in list_saved(folder)[:-keep_last]:
        step = step_of(path)
        if step not in keep_steps and not (keep_every and step % keep_every == 0):
            with writing(path):
                path.with_suffix(".json").unlink(missing_ok=True)
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def explain_failed_write(folder: Path) -> Iterator[None]:
    """Let a run that cannot write, as on a full disk, end with what is kept and how it goes on.

    Args:
        folder: the run's `checkpoints` folder.

    Raises:
        RunStopped: a write failed.
    """
    try:
        yield
    except WriteError as error:
        saved = list_saved(folder)
        kept = (
            f"the checkpoint of step {step_of(saved[-1])} is kept" if saved else "there is no checkpoint yet"
        )
        hint = "make room, or fix what is named, and run the same command to resume"
        raise RunStopped(f"{error}; {kept}: {hint}", exit_code=1) from None


def _check_manifest(path: Path) -> None:
    manifest_path = path.with_suffix(".json")
    if not path.exists():
        raise CheckpointError(_describe_missing(path))
    try:
        manifest = read_json(manifest_path, limit=LARGEST_MANIFEST)
        size, sha256 = manifest["size"], manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(
            f"{path}: refused, its checksum {manifest_path.name} is missing or unreadable"
        ) from None
    if not path.is_file():
        raise CheckpointError(f"{path}: refused, it is not a regular file")
    if path.stat().st_size != size:
        raise CheckpointError(f"{path}: refused, it has {path.stat().st_size} bytes instead of {size}")
    if _sha256(path) != sha256:
        raise CheckpointError(
            f"{path}: refused, its contents do not match the sha256 in {manifest_path.name}"
        )


def _describe_missing(path: Path) -> str:
    match = _NAME.fullmatch(path.name)
    name = f"at step {int(match[1])}" if match else f"{path.name} in {path.parent}"
    steps = [str(step_of(saved)) for saved in list_saved(path.parent)]
    return f"no checkpoint {name}; available: {', '.join(steps) or 'none'}"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
