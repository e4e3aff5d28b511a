"""The directories of a sweep's jobs, as `hydra.sweep.subdir` names them."""

from collections.abc import Iterator, Sequence
from pathlib import PurePath

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from capsexp.cli.sweep.folder import differing_overrides
from capsexp.config.compose import searching
from capsexp.config.overrides import FAILURES, one_line, parse_all
from capsexp.errors import UserError

AUTOMATIC = "${capsexp.job_name:${hydra.overrides.task}}"
"""The value in conf/train.yaml, which gives every job a directory of its own."""
RESERVED = ("sweep.json", "sweep.lock", "results.csv", "table.md", "multirun.yaml")


def is_chosen(config: DictConfig) -> bool:
    """Return whether the user has set `hydra.sweep.subdir`."""
    return bool(OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"] != AUTOMATIC)  # type: ignore[call-overload, index]


def job_config(loader: ConfigLoader, master: DictConfig, overrides: Sequence[str], number: int) -> DictConfig:
    """Return the config of a job of a sweep, and let Hydra's resolvers use it."""
    composed = loader.load_sweep_config(master, list(overrides))
    with open_dict(composed):
        composed.hydra.job.id, composed.hydra.job.num = str(number), number
    HydraConfig.instance().set_config(composed)
    return composed


def require_directories(config_name: str, overrides: Sequence[str], *, config_dir: str | None) -> None:
    """Check the directories that the user has chosen for the jobs of a plain sweep, before any is made.

    Raises:
        UserError: a directory is not below the sweep's folder, or jobs would share one.
    """
    with searching(config_dir):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        parsed = [item for item in parse_all(overrides)[0] if not item.key_or_group.startswith("hydra")]
        jobs = BasicSweeper.split_arguments(parsed, None)[0]
        master = hydra.compose_config(
            config_name, list(overrides), run_mode=RunMode.MULTIRUN, with_log_configuration=False
        )
        directories(hydra.config_loader, master, jobs, 0)


def directories(
    loader: ConfigLoader, master: DictConfig, jobs: Sequence[Sequence[str]], first_number: int
) -> list[str] | list[None]:
    """Return the directory of each job below the sweep's folder; None for each if the user has not set it.

    Args:
        loader: Hydra's.
        master: the config of the sweep.
        jobs: the overrides of each job.
        first_number: number of the first of these jobs in the sweep.

    Raises:
        UserError: a directory is not below the sweep's folder, or jobs would share one.
    """
    if not is_chosen(master):
        return [None] * len(jobs)
    try:
        configs = [job_config(loader, master, job, number) for number, job in enumerate(jobs, first_number)]
        names = [str(config.hydra.sweep.subdir) for config in configs]
    except FAILURES as error:
        raise UserError(f"hydra.sweep.subdir: {one_line(error)}") from None
    problems = list(dict.fromkeys(directory_problems(names, jobs)))
    if problems:
        raise UserError(*problems)
    return names


def directory_problems(names: Sequence[str], jobs: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield one line for each directory that a job cannot have.

    Args:
        names: the directory of each job, relative to the sweep's folder.
        jobs: the overrides of each job; a search may try the same ones again.
    """
    labels = differing_overrides(jobs)
    owners: dict[PurePath, int] = {}  # the first job of each directory
    for number in sorted(range(len(jobs)), key=lambda number: len(PurePath(names[number]).parts)):
        path, start = PurePath(names[number]), f"hydra.sweep.subdir={names[number]}"
        first = owners.setdefault(path, number)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            yield f"{start}: must be a path below the sweep's folder, without '..'"
        elif path.parts[0] in RESERVED:
            yield f"{start}: the sweep has a file of this name"
        elif list(jobs[first]) != list(jobs[number]):
            hint = "add what differs between jobs, such as ${hydra.job.num}"
            yield f"{start}: the directory of the jobs {labels[first]} and {labels[number]}; {hint}"
        elif outer := next((parent for parent in path.parents if parent in owners), None):
            yield f"{start}: inside {outer}, the directory of the job {labels[owners[outer]]}"
