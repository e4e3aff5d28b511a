"""The jobs that Hydra calls with a composed config.

torch is imported only when work starts.
"""

import functools
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from capsexp.cli.torchrun import launcher, processes, report_once
from capsexp.config.compose import VERSION_BASE, compose, conf_dir, to_plain
from capsexp.config.hydra_settings import hydra_problems
from capsexp.config.overrides import one_line, plugins
from capsexp.config.paths import stored_form, with_absolute_paths
from capsexp.config.settings import GROUPS
from capsexp.config.values import root_problems
from capsexp.errors import JobFailed, RunStopped, UserError, exit_code, noting, print_error
from capsexp.text import printable
from capsexp.training.run_dir import RunDir

if TYPE_CHECKING:
    from capsexp.config.components import Components

_argv = tuple(sys.argv)  # as typed: `call_hydra` replaces it


def typed_command() -> list[str]:
    """Return the command as it was typed."""
    return [*launcher(), "capsexp", *_argv[1:]]


def call_hydra(arguments: Sequence[str], config_name: str, job: Callable[[DictConfig], Any]) -> int:
    """Let Hydra compose a config from the arguments after a command, and call the job with it."""
    sys.argv = [sys.argv[0], *arguments]
    has_started = False

    @functools.wraps(job)
    def work(composed: DictConfig) -> Any:
        nonlocal has_started
        has_started = True
        return job(composed)

    try:
        hydra.main(config_path=conf_dir(), config_name=config_name, version_base=VERSION_BASE)(work)()
    except Exception as error:
        # Before a job there is only Hydra's own work, such as the settings of its log.
        if has_started or isinstance(error, UserError) or {"-m", "--multirun"} & {*arguments}:
            raise
        raise UserError(one_line(error)) from error
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


def compose_checked(
    name: str, overrides: Sequence[str], *, config_dir: str | None, sweep: bool = False, saved: bool = False
) -> "tuple[DictConfig, Components]":
    """Compose a config and build its components.

    After an error the overrides that it names are left out, and the others are checked again: a mistake must
    not hide another.

    Args:
        name: the root config; this and the next three are arguments of `capsexp.config.compose.compose`.
        overrides: as typed.
        config_dir: a folder of the user's own configs.
        sweep: the config is that of a sweep.
        saved: the config is that of a trained run.

    Raises:
        UserError: every mistake, before any work starts.
    """
    problems: list[str] = []
    rest = list(overrides)
    while True:
        try:
            composed = compose(name, rest, config_dir=config_dir, sweep=sweep)
            components = (validate_saved if saved else validate)(composed, rest)
        except UserError as error:
            left_out = {_key(text) for text in overrides if text not in rest}
            problems += [line for line in error.problems if not (left_out and _may_follow(line, left_out))]
            named = set().union(*(_named_in(line, rest) for line in error.problems))
            if not named:
                raise UserError(*dict.fromkeys(problems)) from error.__cause__
            rest = [text for text in rest if text not in named]
        else:
            if problems:
                raise UserError(*dict.fromkeys(problems))
            return composed, components


def _may_follow(problem: str, left_out: Collection[str]) -> bool:
    """Return whether a problem may come from overrides that are left out, such as a key of another option."""
    needs = any(repr(key) in problem for key in left_out)  # "You must specify 'study'"
    return needs or problem.startswith("unknown key") or _subject(problem) in left_out


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _subject(line: str) -> str:
    """Return the key that a line is about: `dataset.path has no value yet`, `seed: must be …`."""
    return re.split(r"[:\s]", line, maxsplit=1)[0]


def _named_in(problem: str, overrides: Sequence[str]) -> set[str]:
    """Return the overrides that a problem is about: those of its key, or else the choice of its group."""
    subject, words = _subject(problem), set(re.findall(r"\w+", problem))
    keys = {text: _key(text) for text in overrides}
    quoted = {text for text, key in keys.items() if repr(key) in problem or repr(text) in problem}
    inner = {text for text, key in keys.items() if _is_inside(key, subject, words)}
    outer = {text for text, key in keys.items() if re.match(rf"{re.escape(key)}(?=[.=\[]|$)", subject)}
    return quoted or inner or outer


def _is_inside(key: str, subject: str, words: Collection[str]) -> bool:
    """Return whether a key is below the subject of a problem that mentions the key's next word."""
    return key.startswith(f"{subject}.") and key.removeprefix(f"{subject}.").partition(".")[0] in words


def validate(composed: DictConfig, overrides: Sequence[str]) -> "Components":
    """Build the components of a run to train, its network on the meta device.

    Raises:
        UserError: every mistake in the config, before any work starts.
    """
    from capsexp.config.build import build_components
    from capsexp.training.run_data import data_to_resume

    def build(plain: dict[str, Any]) -> "Components":
        run = plain.get("run")
        manifest = data_to_resume(plain, Path(run) if isinstance(run, str) else None)
        return build_components(plain, plugins=plugins(overrides), manifest=manifest)

    return _checked(composed, overrides, build)


def validate_saved(composed: DictConfig, overrides: Sequence[str]) -> "Components":
    """Build the components of a trained run; like `validate`."""
    from capsexp.analysis.run_components import run_components

    return _checked(composed, overrides, lambda plain: run_components(plain, plugins=plugins(overrides)))


def _checked(
    composed: DictConfig, overrides: Sequence[str], build: "Callable[[dict[str, Any]], Components]"
) -> "Components":
    """Build the components; add the mistakes in settings that no component has."""
    from capsexp.config.build import build_checked

    plain = to_plain(composed)
    problems = [line for line in root_problems(plain) if not line.startswith("seed:")]  # the build says that
    problems += hydra_problems(composed)
    if "study" in plain:
        with noting(problems):
            build_checked(plain["study"], at="study", plugins=plugins(overrides))
    with noting(problems):
        components = build(plain)
    if problems:
        raise UserError(*problems)
    return components
