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
    machine["cpu"] = _processor()
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "device": device}
    return {"versions": versions, "commit": commit, "dirty": bool(patch), **machine, **owner}, patch


def _processor() -> str:
    """Return the model of the processor; where the system does not say it, its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


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
