"""Whether the processes of a run agree: all need the same settings and the same code.

A difference would not be noticed later: every process makes its own batches and steps, and only their
gradients are exchanged.
"""

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capsexp.config.settings import leaves, without_routing_copy
from capsexp.errors import UserError
from capsexp.text import a_few
from capsexp.training.parallel import ProcessGroup

OWN = ("data_root",)  # settings in which machines may differ
PACKAGES = ("capsexp", "torch", "numpy")
CODE = (".py", ".cpp", ".h", ".cu")
MOST_SHOWN = 6


def require_agreement(config: Mapping[str, Any], processes: ProcessGroup) -> None:
    """Compare this process with the others of the run.

    Args:
        config: the plain config of this process.
        processes: all of them call this function.

    Raises:
        UserError: they differ, in one line.
    """
    facts = processes.gather({**_settings(config), **_code()})
    problem = processes.broadcast(lambda: describe_difference(facts))
    if problem is not None:
        raise UserError(problem)


def describe_difference(facts: Sequence[Mapping[str, str]]) -> str | None:
    """Return in which settings the first process that differs from rank 0 does so; None if all are equal.

    Args:
        facts: of each process, by rank.
    """
    first = facts[0]
    for rank, other in enumerate(facts):
        keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
        if keys:
            texts = [
                f"{key} is {first.get(key, 'absent')} in rank 0 and {other.get(key, 'absent')} in rank {rank}"
                for key in keys
            ]
            shown = a_few(texts, most=MOST_SHOWN, separator="; ")
            return f"the processes of this run have different settings: {shown}"
    return None


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    shared = {key: value for key, value in without_routing_copy(config).items() if key not in OWN}
    return {key: str(value) for key, value in leaves(shared)}


def _code() -> dict[str, str]:
    """Return the versions and the fingerprint of the code that this process runs."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in CODE):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    versions = {f"the version of {name}": importlib.metadata.version(name) for name in PACKAGES}
    python = {"the version of Python": platform.python_version()}
    return {**versions, **python, "the code of capsexp": digest.hexdigest()[:8]}
