"""The jobs that Hydra calls with a composed config.

torch is imported only when work starts.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from capsexp.cli.torchrun import launcher, processes, report_once
from capsexp.config.compose import VERSION_BASE, conf_dir, to_plain
from capsexp.config.overrides import plugins
from capsexp.config.paths import stored_form, with_absolute_paths
from capsexp.config.settings import GROUPS
from capsexp.config.values import root_problems
from capsexp.errors import JobFailed, RunStopped, UserError, exit_code, print_error
from capsexp.text import printable
from capsexp.training.run_dir import RunDir

if TYPE_CHECKING:
    from capsexp.config.components import Components

# Hydra takes plugins only from the package hydra_plugins. This one adds the launcher of sweeps.
_PLUGINS = str(Path(__file__).with_name("sweep") / "_plugins")
if _PLUGINS not in sys.path:  # the process that started this one may have passed its path on
    sys.path.append(_PLUGINS)

_argv = tuple(sys.argv)  # as typed: `call_hydra` replaces it


def typed_command() -> list[str]:
    """Return the command as it was typed."""
    return [*launcher(), "capsexp", *_argv[1:]]


def call_hydra(arguments: Sequence[str], config_name: str, job: Callable[[DictConfig], Any]) -> int:
    """Let Hydra compose a config from the arguments after a command, and call the job with it."""
    sys.argv = [sys.argv[0], *arguments]
    hydra.main(config_path=conf_dir(), config_name=config_name, version_base=VERSION_BASE)(job)()
    return 0


def training_job(composed: DictConfig) -> float | None:
    """Train one run, in the directory that Hydra was given; return its best validation accuracy."""
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    path = Path(HydraConfig.get().runtime.output_dir)
    if sweeping:
        print(
            f"\njob {HydraConfig.get().job.num}: {printable(' '.join(HydraConfig.get().overrides.task))}",
            flush=True,
        )
    try:
        with report_once():  # inside the job, because Hydra adds a line to errors that leave it
            _train_until_stopped(RunDir(path), composed)
    except UserError as error:
        code = print_error(error)
        if not sweeping or code > 128:  # a signal ends the whole sweep
            raise SystemExit(code) from None
        raise JobFailed(*error.problems) from None
    return RunDir(path).best_accuracy()


def _train_until_stopped(run: RunDir, composed: DictConfig) -> None:
    try:
        _train_in(run, composed)
    except KeyboardInterrupt as interrupt:  # before the first step, or a second Ctrl-C
        line = f"{interrupt or 'SIGINT'}: stopped; run the same command with run={run.path} to continue"
        raise RunStopped(line, exit_code=exit_code(interrupt)) from None


def _train_in(run: RunDir, composed: DictConfig) -> None:
    from capsexp.config.build import build_components
    from capsexp.training.memory import explain_out_of_memory
    from capsexp.training.run_data import data_to_resume
    from capsexp.training.start import require_resumable
    from capsexp.training.train import train

    plain = with_absolute_paths(to_plain(composed))
    manifest = data_to_resume(plain, run.path)
    components = build_components(plain, plugins=plugins(HydraConfig.get().overrides.task), manifest=manifest)
    with run.locked():
        finished = run.is_finished(plain)
        if plain["resume"] == "force" and not finished:
            require_resumable(components, run.checkpoints)
        run.check_config(plain, resume=plain["resume"], command=typed_command())
        hydra_node = {"hydra": HydraConfig.get()}
        stored = stored_form(composed, plain)
        run.write_composed(config=stored, hydra=hydra_node, overrides=HydraConfig.get().overrides.task)
        processes().broadcast(lambda: None if finished else run.path)
        if finished:
            metrics = "  ".join(
                f"{name} {value:.4f}" for name, value in run.status().get("results", {}).items()
            )
            print(f"{printable(run.path)} is complete: {metrics}")
            return
        choices = {group: HydraConfig.get().runtime.choices.get(group) for group in GROUPS}
        attempt = run.track_status({group: choice for group, choice in choices.items() if choice})
        with attempt, explain_out_of_memory(components, plain, training=True):
            train(components, run, plain, processes())
    path = printable(run.path)
    print(f"run: {path}\ncurves: tensorboard --logdir {path}")


def train_as_worker(components: "Components", plain: dict[str, Any]) -> int:
    """Train beside rank 0, the only process that writes, unless the run is complete."""
    from capsexp.training.memory import explain_out_of_memory
    from capsexp.training.train import train

    path = processes().broadcast(lambda: None)
    if path is not None:
        with explain_out_of_memory(components, plain, training=True):
            train(components, RunDir(path, writes=False), plain, processes())
    return 0


def evaluation_job(composed: DictConfig) -> None:
    """Evaluate a run for `capsexp eval`."""
    from capsexp.analysis.evaluate_run import evaluate_run
    from capsexp.analysis.run_components import run_components
    from capsexp.training.memory import explain_out_of_memory

    plain = to_plain(composed)
    try:
        components = run_components(plain, plugins=plugins(HydraConfig.get().overrides.task))
        with explain_out_of_memory(components, plain, training=False):
            evaluate_run(components, plain)
    except UserError as error:
        raise SystemExit(print_error(error)) from None


def no_op(composed: DictConfig) -> None:
    """Do nothing: the job of a call that only prints a config or help."""


def validate(composed: DictConfig, overrides: Sequence[str]) -> "Components":
    """Build the components of a run to train, its network on the meta device.

    Raises:
        UserError: every mistake in the config, before any work starts.
    """
    from capsexp.config.build import build_components
    from capsexp.training.run_data import data_to_resume

    plain = to_plain(composed)
    run = plain.get("run")
    manifest = data_to_resume(plain, Path(run) if isinstance(run, str) else None)
    return _checked(plain, lambda: build_components(plain, plugins=plugins(overrides), manifest=manifest))


def validate_saved(composed: DictConfig, overrides: Sequence[str]) -> "Components":
    """Build the components of a trained run; like `validate`."""
    from capsexp.analysis.run_components import run_components

    plain = to_plain(composed)
    return _checked(plain, lambda: run_components(plain, plugins=plugins(overrides)))


def _checked(plain: Mapping[str, Any], build: "Callable[[], Components]") -> "Components":
    """Build the components; add the mistakes in settings that no component has."""
    problems = [line for line in root_problems(plain) if not line.startswith("seed:")]  # the build says that
    try:
        components = build()
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    if problems:
        raise UserError(*problems)
    return components
