"""Checkpoints that are there whole or not at all, and are believed only after their checksum.

checkpoints/step-00000400.pt     torch.save of plain dicts, tensors and numbers
checkpoints/step-00000400.json   sha256, size, step: written last, it makes the checkpoint count
checkpoints/last.pt, best.pt     links to two of them; without validation pictures the last is the best
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any

import torch

from capsexp.errors import UserError
from capsexp.files import write_atomic

SCHEMA = 1
_NAME = re.compile(r"step-(\d{8})\.pt")


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


def save(folder: Path, state: dict[str, Any], *, step: int) -> Path:
    """Write the checkpoint of a step and let `last.pt` point to it.

    A kill at any moment leaves the earlier checkpoints as they were.

    Args:
        folder: the run's `checkpoints` folder.
        state: dicts, lists, numbers, strings and tensors only: what `weights_only` loading accepts.
        step: optimiser steps done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name_of(step)

    def write(file: IO[bytes]) -> None:
        torch.save({"schema": SCHEMA, **state}, file)
        file.flush()
        # The JSON of an earlier file of that name would vouch for a file that it does not describe. It
        # goes only when the new file is complete: if that fails, the earlier checkpoint stays good.
        path.with_suffix(".json").unlink(missing_ok=True)

    write_atomic(path, write)
    manifest = {"sha256": _sha256(path), "size": path.stat().st_size, "step": step, "schema": SCHEMA}
    write_atomic(path.with_suffix(".json"), lambda file: file.write(json.dumps(manifest).encode()))
    link(folder, "last", step)
    return path


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU.

    Raises:
        CheckpointError: the file or its checksum is missing, damaged, of another schema, or holds
            anything but tensors and plain values.
    """
    path = path.resolve()
    _check_manifest(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling can fail in any way: each is a refusal of this file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: refused, it cannot be read safely: {reason}") from None
    schema = state.get("schema") if isinstance(state, dict) else None
    if schema != SCHEMA:
        raise CheckpointError(f"{path}: refused, its schema is {schema!r}, this version reads {SCHEMA}")
    return state


def newest(folder: Path, *, tell: Callable[[str], None]) -> dict[str, Any] | None:
    """The state of the newest checkpoint that can be used; None if there has never been one.

    Args:
        folder: the run's `checkpoints` folder.
        tell: gets one line for every checkpoint that was refused.

    Raises:
        CheckpointError: there are checkpoints and none can be used. A run is never begun anew over them.
    """
    paths = sorted(saved(folder), reverse=True)
    refusals = []
    for path in paths:
        try:
            return load(path)
        except CheckpointError as error:
            refusals.append(str(error))
            tell(f"{error}; trying the one before")
    if refusals:
        raise CheckpointError(
            *refusals, f"no usable checkpoint is left in {folder}; start in another directory"
        )
    return None


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first.

    A file without its JSON counts, to be refused by name, unless it is the newest: that is what a kill
    between the two leaves behind.
    """
    paths = sorted(path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name))
    if paths and not paths[-1].with_suffix(".json").exists():
        paths.pop()
    return paths


def name_of(step: int) -> str:
    """The file name of a step's checkpoint."""
    return f"step-{step:08d}.pt"


def step_of(path: Path) -> int:
    """The step that a checkpoint's file name tells."""
    match = _NAME.fullmatch(path.resolve().name)
    if match is None:
        raise CheckpointError(f"{path}: no checkpoint is named like that")
    return int(match[1])


def link(folder: Path, name: str, step: int) -> None:
    """Let `NAME.pt` be the checkpoint of a step."""
    link, new = folder / f"{name}.pt", folder / f".{name}.{os.getpid()}.tmp"
    new.unlink(missing_ok=True)
    new.symlink_to(name_of(step))
    os.replace(new, link)


def prune(folder: Path, *, keep_last: int, keep_steps: Collection[int], keep_every: int | None) -> None:
    """Delete what nobody needs: leftovers of killed saves, and old checkpoints but those to keep."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    for path in saved(folder)[:-keep_last]:
        step = step_of(path)
        if step not in keep_steps and not (keep_every and step % keep_every == 0):
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def _check_manifest(path: Path) -> None:
    manifest_path = path.with_suffix(".json")
    if not path.exists():
        raise CheckpointError(f"{path}: refused, there is no such file")
    try:
        manifest = json.loads(manifest_path.read_text())
        size, sha256 = manifest["size"], manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{path}: refused, its checksum {manifest_path.name} is missing or unreadable"
        ) from None
    if path.stat().st_size != size:
        raise CheckpointError(f"{path}: refused, it has {path.stat().st_size} bytes instead of {size}")
    if _sha256(path) != sha256:
        raise CheckpointError(
            f"{path}: refused, its contents do not match the sha256 in {manifest_path.name}"
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
