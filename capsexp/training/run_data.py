"""The data of a run: stored when it begins, and compared when it resumes."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from capsexp.config.paths import absolute_settings
from capsexp.config.saved import read_saved
from capsexp.data.dataset import NO_LIST, OTHER_DATA, Dataset
from capsexp.data.manifest import Manifest
from capsexp.errors import UserError


def data_to_resume(config: Mapping[str, Any], run: Path | None) -> Manifest | None:
    """Return what a run stored of its data; None for a new run, and for `resume=force`, which takes others.

    Also None for a config with another dataset, with which the run will not resume.

    Args:
        config: the plain config.
        run: the directory; None if it is not made yet.

    Raises:
        UserError: the stored manifest cannot be read.
    """
    if run is None or config.get("resume") == "force":
        return None
    try:
        saved = read_saved(run / "resolved_config.yaml")
    except (OSError, ValueError):
        return None
    return Manifest.load(run) if _dataset(saved) == _dataset(config) else None


def keep_data(run: Path, dataset: Dataset, *, force: bool, report: Callable[[str], None]) -> None:
    """Store the data of a new run; for a resumed run, check that they are the same. Call it before reading.

    Args:
        run: the directory.
        dataset: of the run.
        force: whether the data as they are replace those of the run.
        report: prints a line.

    Raises:
        UserError: the data are not those of the run; one line for each difference.
    """
    if dataset.stored is not None:
        return  # checked whenever it is read
    stored, now = _load(run, force, report), dataset.manifest()
    changes = [] if stored is None else list(stored.differences(now))
    if changes and not force:
        raise UserError(*changes, OTHER_DATA)
    _report(changes, report)
    if stored is None and dataset.lists_files and any((run / "checkpoints").glob("*.pt")):
        report(NO_LIST)
    if stored is not None and not changes:
        now = replace(now, fingerprints={**stored.fingerprints, **now.fingerprints})
    if stored != now:
        now.save(run)


def keep_fingerprints(run: Path, dataset: Dataset, *, report: Callable[[str], None]) -> None:
    """Store the checksums of arrays that are known only after reading."""
    stored, now = Manifest.load(run), dataset.manifest(())
    if stored is None or now.fingerprints.items() <= stored.fingerprints.items():
        return
    _report(stored.differences(replace(now, files=stored.files)), report)
    replace(stored, fingerprints={**stored.fingerprints, **now.fingerprints}).save(run)


def _dataset(config: Mapping[str, Any]) -> dict[str, Any]:
    return absolute_settings({"dataset": config.get("dataset")})


def _load(run: Path, force: bool, report: Callable[[str], None]) -> Manifest | None:
    try:
        return Manifest.load(run)
    except UserError as error:
        if not force:
            raise
        report(f"{error}; it is replaced")
        return None


def _report(changes: Iterable[str], report: Callable[[str], None]) -> None:
    for line in changes:
        report(f"{line}; the run continues with the data as they are now")
