"""The command `capsexp`: finds conf/, checks what was asked for, and hands over to Hydra.

torch is imported only when work starts, so that `--cfg`, `--info`, `--help` and completion answer at once.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from capsexp.cli.jobs import (
    call_hydra,
    evaluation_job,
    no_op,
    print_error,
    train_as_worker,
    training_job,
    validate,
)
from capsexp.cli.sweep.job_process import WATCHED, end_with_launcher
from capsexp.cli.torchrun import is_distributed, processes, run_distributed
from capsexp.config.compose import compose, conf_dir, to_plain
from capsexp.config.naming import new_run_dir
from capsexp.config.overrides import parse, plugins, quoted, value
from capsexp.config.saved import register_saved_config
from capsexp.errors import UserError, nearest
from capsexp.files import make_folder

COMMANDS = {
    "train": "train a network: capsexp train [GROUP=OPTION] [KEY=VALUE] [-m]",
    "eval": "evaluate a trained run: capsexp eval run=DIR [part=test|familiar|validation|train] [KEY=VALUE]",
    "predict": "classify pictures: capsexp predict run=DIR FILES… [KEY=VALUE]",
    "analyze": "study a trained run: capsexp analyze study=NAME run=DIR [limit=PICTURES] [KEY=VALUE]",
    "runs": "the runs there are: capsexp runs [DIRS] [FILTERS]",
    "compare": "what sets runs apart, beside their figures: capsexp compare [DIRS] [FILTERS] [OPTIONS]",
    "report": "runs, curves and pictures as one page: capsexp report [DIRS] [FILTERS] -o report.html",
    "data": "data sets: capsexp data list|prepare|verify [NAMES…] [data_root=DIR]",
    "bench": "speed and memory beside plain routing: capsexp bench [KEY=VALUE] [compiled=true] [growth=PNG]",
    "doctor": "versions, devices, data sets, compiler, and what each would enable",
}
WITHOUT_HYDRAS_HELP = ("eval", "predict", "analyze", "data", "doctor")
DATA_ACTIONS = ("list", "prepare", "verify")
USAGE = "usage: capsexp COMMAND …\n\n" + "\n".join(f"  {name:8} {text}" for name, text in COMMANDS.items())


def main() -> int:
    """Entry point of the console script and of `python -m capsexp`. Returns the exit code."""
    # A bug keeps its whole traceback; what a user can mend is told by UserError.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        if is_distributed():
            return run_distributed(lambda: _dispatch(sys.argv[1:]), print_error)
        return _dispatch(sys.argv[1:])
    except UserError as error:
        return print_error(error)
    except BrokenPipeError:  # `capsexp … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-sc", "--shell-completion"):
        return _complete(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    command, *rest = arguments
    if command in WITHOUT_HYDRAS_HELP and {"-h", "--help"} & {*rest}:
        print(f"{command}: {COMMANDS[command]}")
        return 0
    if command == "--version":
        print(f"capsexp {_version()}")
        return 0
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}{nearest(command, COMMANDS)}")
    if command != "train" and is_distributed():
        raise UserError(f"capsexp {command} works in one process: start it without torchrun")
    if command in ("runs", "compare", "report"):
        from capsexp.compare.command import run as look

        return look(command, rest, COMMANDS[command])
    run: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "eval": _eval,
        "predict": _predict,
        "analyze": _analyze,
        "data": _data,
        "bench": _bench,
        "doctor": _doctor,
    }
    return run[command](rest)


def _train(arguments: list[str]) -> int:
    if WATCHED in os.environ:
        end_with_launcher()
    options, flags, overrides = parse(arguments)
    if _only_shows(options):
        return call_hydra([*flags, *overrides], "train", no_op)
    name, folder = options.config_name or "train", options.config_dir
    if options.multirun:
        from capsexp.cli.sweep.command import sweep

        return sweep(options, flags, overrides)
    composed = compose(name, overrides, config_dir=folder)
    if options.cfg or options.info:
        return call_hydra([*flags, *overrides], "train", no_op)
    parts = validate(composed, overrides)
    parts.dataset.require_files()
    words = [*flags, *overrides, "hydra.output_subdir=null"]
    if is_distributed():
        from capsexp.training.parallel import check

        check(parts, processes())
        if not processes().is_main:
            return train_as_worker(parts, to_plain(composed))
    return call_hydra([*words, *_where(composed, overrides)], "train", training_job)


def _eval(arguments: list[str]) -> int:
    options, flags, overrides = parse(arguments)
    register_saved_config(overrides, command="eval", part="test", weights="best")
    composed = compose("eval_run", overrides, config_dir=options.config_dir)
    if not (options.cfg or options.info):
        validate(composed, overrides)
    return call_hydra([*flags, *overrides], "eval_run", evaluation_job)


def _predict(arguments: list[str]) -> int:
    files = [text for text in arguments if "=" not in text or Path(text).exists()]
    overrides = [text for text in arguments if text not in files]
    register_saved_config(overrides, command="predict", top=3, weights="best", reconstructions=True)
    composed = compose("predict_run", overrides, config_dir=None)
    if not files:
        raise UserError("capsexp predict needs pictures: capsexp predict run=DIR FILES…")
    from capsexp.analysis.predict import predict

    predict(validate(composed, overrides), to_plain(composed), files)
    return 0


def _analyze(arguments: list[str]) -> int:
    options, _, overrides = parse(arguments)
    register_saved_config(overrides, command="analyze", groups={"study": "???"}, weights="best", limit=None)
    composed = compose("analyze_run", overrides, config_dir=options.config_dir)
    parts, plain = validate(composed, overrides), to_plain(composed)
    from capsexp.analysis.analyze import analyze
    from capsexp.config.build import checked_part

    named = plugins(overrides)
    study = checked_part(plain["study"], at="study", plugins=named)
    analyze(study, composed.hydra.runtime.choices["study"], parts, plain, plugins=named)
    return 0


def _bench(arguments: list[str]) -> int:
    options, flags, overrides = parse(arguments)
    if _only_shows(options):
        return call_hydra([*flags, *overrides], "train", no_op)
    picture, compiled = value(overrides, "growth"), value(overrides, "compiled") or False
    overrides = [text for text in overrides if text.partition("=")[0] not in ("growth", "compiled")]
    if not isinstance(compiled, bool):
        raise UserError(f"compiled must be true or false, got {compiled}")
    composed = compose(options.config_name or "train", overrides, config_dir=options.config_dir)
    if options.cfg or options.info:
        return call_hydra([*flags, *overrides], "train", no_op)
    validate(composed, overrides)
    if picture is not None:
        from capsexp.analysis.speed.growth import growth

        growth(to_plain(composed), Path(str(picture)), plugins=plugins(overrides))
        return 0
    from capsexp.analysis.speed.bench import bench

    bench(to_plain(composed), plugins=plugins(overrides), compiled=compiled)
    return 0


def _data(arguments: list[str]) -> int:
    action, *rest = arguments or ["list"]
    if action not in DATA_ACTIONS:
        raise UserError(f"unknown command 'data {action}'{nearest(action, DATA_ACTIONS)}")
    names = [text for text in rest if "=" not in text]
    datasets = _datasets([text for text in rest if "=" in text], names or None)
    from capsexp.data import prepare

    if action == "list":
        prepare.print_list(datasets)
        return 0
    if action == "prepare" and not names:
        raise UserError(f"capsexp data prepare needs names: {', '.join(datasets)}")
    return prepare.work_through(action, datasets)


def _doctor(arguments: list[str]) -> int:
    from capsexp.cli.doctor import report

    report(_datasets(arguments, None))
    return 0


def _where(composed: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Overrides that send a run to a directory which no other run has, unless the user chose one."""
    if composed.run is not None:
        make_folder(Path(composed.run))  # Hydra would do it, and could not say in one line why not
    if composed.run is not None or "hydra.run.dir" in {text.partition("=")[0] for text in overrides}:
        return []
    choices = composed.hydra.runtime.choices
    folder = choices.get("experiment") or f"{choices['model']}-{choices['dataset']}"
    named = ("model", "dataset", "experiment")  # in the folder's name already
    settings = [text for text in overrides if text.partition("=")[0] not in named]
    return [f"run={quoted(new_run_dir(Path(composed.output_root) / folder, label='-'.join(settings)))}"]


def _datasets(overrides: Sequence[str], names: Sequence[str] | None) -> dict[str, Any]:
    """The data sets that need no further setting, or those named, by name."""
    from capsexp.config.build import build

    known = sorted(path.stem for path in Path(conf_dir(), "dataset").glob("*.yaml"))
    for name in names or []:
        if name not in known:
            raise UserError(f"unknown data set {name!r}{nearest(name, known)}")
    found = {}
    for name in names or known:
        composed = compose("train", [f"dataset={name}", *overrides], config_dir=None)
        if names is None and OmegaConf.missing_keys(composed.dataset):
            continue
        plain = to_plain(composed)
        found[name] = build(plain["dataset"], at="dataset", plugins=plugins(overrides))
    return found


def _only_shows(options: Namespace) -> bool:
    return bool(options.help or options.hydra_help)


def _complete(arguments: Sequence[str]) -> int:
    """Answer the shell: the subcommands by ourselves, everything after one through Hydra."""
    if arguments[1:] and arguments[1].startswith("query="):
        line = os.environ.get("COMP_LINE", "")
        words = line[: int(os.environ.get("COMP_POINT", len(line)))].split(" ")
        if len(words) <= 2:
            print(" ".join(name for name in COMMANDS if name.startswith(words[-1])))
            return 0
        program, _, rest = line.split(" ", 2)
        os.environ["COMP_LINE"] = f"{program} {rest}"
        os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))
    return call_hydra(list(arguments), "train", no_op)


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("capsexp")
