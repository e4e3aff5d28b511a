"""The code and the machine that a run uses, for its env.json."""

import importlib.metadata
import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("capsexp", "torch", "torchvision", "hydra-core", "omegaconf", "tensorboard", "numpy")


def describe(device: str) -> tuple[dict[str, Any], str]:
    """Return versions, commit, machine and process, and the uncommitted changes of the code.

    Args:
        device: the device of the run, in words.
    """
    commit, patch = _git_state(Path(__file__).resolve().parents[2])
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    machine = {"platform": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()}
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "device": device}
    return {"versions": versions, "commit": commit, "dirty": bool(patch), **machine, **owner}, patch


def _git_state(folder: Path) -> tuple[str | None, str]:
    """Return commit and uncommitted changes of the code; (None, "") if it is no git checkout."""
    if not (folder / ".git").exists():
        return None, ""
    try:
        git = ["git", "-C", str(folder)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        patch = subprocess.run([*git, "diff", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, ValueError, subprocess.CalledProcessError):  # ValueError: a patch that is not UTF-8
        return None, ""
    return commit.stdout.strip(), patch.stdout
