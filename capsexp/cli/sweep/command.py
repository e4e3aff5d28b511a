"""`capsexp train -m`: check the jobs of a sweep, then run them in the sweep's folder."""

import importlib
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from hydra.core.plugins import Plugins
from hydra.errors import InstantiationException
from omegaconf import DictConfig

from capsexp.cli.jobs import call_hydra, training_job, typed_command
from capsexp.cli.sweep.directories import is_chosen, require_directories
from capsexp.cli.sweep.folder import Sweep
from capsexp.cli.sweep.tables import check_sweep, expand_tables, require_data, searches
from capsexp.cli.torchrun import is_distributed
from capsexp.config.naming import sweep_name
from capsexp.config.overrides import FAILURES, one_line, value
from capsexp.config.sweeps import constants_and_swept, with_constants_swept
from capsexp.config.typed_paths import expanded, quoted
from capsexp.errors import JobFailed, UserError


def sweep(options: Namespace, flags: Sequence[str], overrides: Sequence[str]) -> int:
    """Check all jobs of a sweep, then run them.

    Args:
        options: Hydra's options, parsed.
        flags: the same options as command-line arguments.
        overrides: as typed.

    Returns:
        The exit code: 1 if any job failed.

    Raises:
        UserError: all errors in all jobs, before the first job runs.
    """
    if is_distributed():
        raise UserError("a sweep starts its own processes: run it without torchrun")
    name, config_dir = options.config_name or "train", options.config_dir
    expanded, rows = expand_tables(overrides, config_dir=config_dir)
    checked = check_sweep(name, expanded, rows=rows, config_dir=config_dir)
    composed = checked[0][0]
    if composed.run is not None:
        raise UserError("run: a sweep names the directories of its runs; use hydra.sweep.dir=DIR instead")
    require_data(checked, name, expanded, config_dir=config_dir)
    arguments = with_constants_swept(expanded, config_dir=config_dir)
    if is_chosen(composed) and not searches(composed):
        require_directories(name, arguments, config_dir=config_dir)
    return _run(_folder(composed, overrides), [*flags, *arguments, "hydra.output_subdir=null"])


def _folder(composed: DictConfig, overrides: Sequence[str]) -> Path:
    """Return the folder of a sweep: the user's choice, or one that depends only on the command."""
    if composed.hydra.sweep.dir != "auto":
        return Path(expanded(composed.hydra.sweep.dir))
    constants, swept = constants_and_swept(overrides)
    choices = dict(composed.hydra.runtime.choices)
    experiment = value(overrides, "experiment")
    if isinstance(experiment, str):  # as typed: the name of a table, and not of its first row
        choices["experiment"] = experiment
    return Path(expanded(composed.output_root)) / "sweeps" / sweep_name(choices, constants, swept)


def _register_launcher() -> None:
    """Add the launcher of sweeps to Hydra, which may have searched for plugins before.

    Hydra takes plugins only from the package `hydra_plugins`.
    """
    folder = str(Path(__file__).with_name("_plugins"))
    if folder not in sys.path:
        sys.path.append(folder)
    module = importlib.import_module("hydra_plugins.capsexp_process")
    Plugins.instance().register(module.ProcessLauncher)


def _run(path: Path, arguments: Sequence[str]) -> int:
    """Run the jobs with the chosen launcher."""
    _register_launcher()
    with Sweep(path).locked():
        Sweep(path).write_command(shlex.join(typed_command()))
        try:
            call_hydra([*arguments, f"hydra.sweep.dir={quoted(path)}"], "train", training_job)
        except JobFailed:  # the launcher has reported it, and the table shows it
            pass
        except InstantiationException as error:  # wrong settings of a launcher or sweeper
            key = str(error).rpartition("full_key: ")[2]
            raise UserError(f"{key}: {error.__cause__ or error}") from None
        except FAILURES as error:
            raise UserError(one_line(error)) from None
        except ValueError as error:
            if "No trials are completed" not in str(error):
                raise
            raise UserError(f"{error} A trial needs a validation accuracy: dataset.validation > 0") from None
        finally:
            Sweep(path).finish()
        return 0 if Sweep(path).succeeded() else 1
