"""`capsexp train -m`: the jobs of a sweep checked, and then run in the sweep's folder."""

import shlex
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from hydra.errors import InstantiationException
from omegaconf import DictConfig

from capsexp.cli.jobs import call_hydra, training_job, typed_command
from capsexp.cli.sweep.folder import Sweep
from capsexp.cli.sweep.tables import checked_sweep, with_rows
from capsexp.cli.torchrun import is_distributed
from capsexp.config.naming import sweep_name
from capsexp.config.overrides import quoted, value
from capsexp.config.sweeps import constants_and_swept, with_constants_swept
from capsexp.errors import JobFailed, UserError


def sweep(options: Namespace, flags: Sequence[str], overrides: Sequence[str]) -> int:
    """Check all jobs of a sweep, then run them.

    Args:
        options: Hydra's.
        flags: the same as words.
        overrides: as typed.

    Returns:
        The exit code: 1 if any job has failed.

    Raises:
        UserError: every mistake in any job, before the first is run.
    """
    if is_distributed():
        raise UserError("a sweep starts its runs by itself: start it without torchrun")
    name, folder = options.config_name or "train", options.config_dir
    jobs, rows = with_rows(overrides, config_dir=folder)
    composed, parts = checked_sweep(name, jobs, rows=rows, config_dir=folder)
    if composed.run is not None:
        raise UserError("run: a sweep makes a directory for each of its runs; choose hydra.sweep.dir=DIR")
    parts.dataset.require_files()
    words = with_constants_swept(jobs, config_dir=folder)
    return _run(_folder(composed, overrides), [*flags, *words, "hydra.output_subdir=null"])


def _folder(composed: DictConfig, overrides: Sequence[str]) -> Path:
    """The folder of a sweep: the user's choice, or one that the same command always has."""
    if composed.hydra.sweep.dir != "auto":
        return Path(composed.hydra.sweep.dir)
    constants, swept = constants_and_swept(overrides)
    typed = value(overrides, "experiment")  # of a table its name, not its first row
    choices = {**composed.hydra.runtime.choices, **({"experiment": typed} if isinstance(typed, str) else {})}
    return Path(composed.output_root) / "sweeps" / sweep_name(choices, constants, swept)


def _run(path: Path, words: Sequence[str]) -> int:
    """Run the jobs by whichever launcher was chosen."""
    with Sweep(path).held():
        Sweep(path).begin(shlex.join(typed_command()))
        try:
            call_hydra([*words, f"hydra.sweep.dir={quoted(path)}"], "train", training_job)
        except JobFailed:  # told by the launcher, and in the table
            pass
        except InstantiationException as error:  # of a launcher or sweeper, by its settings
            key = str(error).rpartition("full_key: ")[2]
            raise UserError(f"{key}: {error.__cause__ or error}") from None
        except ValueError as error:
            if "No trials are completed" not in str(error):
                raise
            raise UserError(f"{error} A trial needs a validation accuracy: dataset.validation > 0") from None
        finally:
            Sweep(path).finish()
        return 0 if Sweep(path).succeeded() else 1
