"""Names of directories: of runs, of sweeps and of their jobs."""

import contextlib
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from capsexp.config.settings import NOT_COMPARED, fingerprint
from capsexp.files import make_folder

LONGEST_LABEL = 80


def new_run_dir(parent: Path, *, label: str = "") -> Path:
    """Create a directory that no other run has, even a run started in the same second.

    Raises:
        UserError: the directory cannot be created.
    """
    make_folder(parent)
    slug = _slug(label)[:60]
    while True:
        pieces = (time.strftime("%Y%m%d-%H%M%S"), slug, secrets.token_hex(2))
        name = "-".join(piece for piece in pieces if piece)
        with contextlib.suppress(FileExistsError):
            (parent / name).mkdir()
            return parent / name


def job_name(overrides: Sequence[str]) -> str:
    """Return the folder of a job: the same for the same settings, in every sweep and every order."""
    settings = sorted(filter(affects_results, overrides), key=_key)
    return f"{_label(settings) or 'default'}-{fingerprint(settings)}"


def sweep_name(choices: Mapping[str, str | None], constants: Sequence[str], swept: Sequence[str]) -> str:
    """Return the folder of a sweep: the same for the same command, and for one with longer lists.

    Args:
        choices: option of each config group.
        constants: overrides with one value.
        swept: keys of the overrides with several values.
    """
    # Of Hydra's own settings only the sweeper counts: another sweeper asks for other jobs.
    constants = sorted(text for text in constants if affects_results(text) or _key(text) == "hydra/sweeper")
    swept = sorted(swept)
    groups = ("experiment",) if choices.get("experiment") else ("model", "dataset")
    label = [str(choices[group]) for group in groups if group not in swept]
    label += [key.rpartition(".")[2] for key in swept]
    return f"{_slug('-'.join(label))}-{fingerprint((constants, swept))}"


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def affects_results(override: str) -> bool:
    """Return whether an override can change a run's results."""
    return re.split(r"[./]", _key(override))[0] not in (*NOT_COMPARED, "hydra")


def _label(overrides: Sequence[str]) -> str:
    texts = (f"{_key(text).rpartition('.')[2]}-{text.partition('=')[2]}" for text in overrides)
    return _slug("-".join(texts))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", text)[:LONGEST_LABEL].strip("-")
