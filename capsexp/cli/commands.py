"""The commands that compose a config: check it, then do the work.

torch is imported only when work starts, so `--cfg`, `--info` and error messages appear at once.
"""

import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from capsexp.cli.jobs import call_hydra, compose_checked, evaluation_job, no_op, train_as_worker, training_job
from capsexp.cli.sweep.job_process import JOB_VARIABLE, end_with_launcher
from capsexp.cli.torchrun import is_distributed, processes
from capsexp.config.compose import compose, conf_dir, option_names, to_plain
from capsexp.config.naming import new_run_dir
from capsexp.config.overrides import parse, plugins, value
from capsexp.config.saved import register_saved_config
from capsexp.config.typed_paths import expanded, quoted
from capsexp.config.values import root_problems
from capsexp.errors import UserError, nearest
from capsexp.files import make_folder

DATA_ACTIONS = ("list", "prepare", "verify")
RENAMED_SETTINGS = {"part": "split"}  # of `capsexp eval`: the old name is still accepted


def train(arguments: Sequence[str]) -> int:
    """Run `capsexp train`."""
    if JOB_VARIABLE in os.environ:
        end_with_launcher()
    options, flags, overrides = parse(arguments)
    if _asks_for_help(options):
        return call_hydra([*flags, *overrides], "train", no_op)
    if options.multirun:
        from capsexp.cli.sweep.command import sweep

        return sweep(options, flags, overrides)
    name = options.config_name or "train"
    if options.cfg or options.info:
        return _show(name, options, flags, overrides)
    if is_distributed():
        from capsexp.cli.agreement import require_agreement

        composed = compose(name, overrides, config_dir=options.config_dir)
        require_agreement(to_plain(composed), processes())
    composed, components = compose_checked(name, overrides, config_dir=options.config_dir)
    components.dataset.require_files()
    if is_distributed():
        from capsexp.training.parallel import check

        check(components, processes())
        if not processes().is_main:
            return train_as_worker(components, to_plain(composed))
    place = _run_override(composed, overrides)
    return call_hydra([*flags, *overrides, "hydra.output_subdir=null", *place], "train", training_job)


def evaluate(arguments: Sequence[str]) -> int:
    """Run `capsexp eval`."""
    options, flags, overrides = parse(arguments)
    overrides = _with_new_names(overrides, RENAMED_SETTINGS)
    register_saved_config(overrides, command="eval", split="test", weights="best")
    if options.cfg or options.info:
        return _show("eval_run", options, flags, overrides)
    compose_checked("eval_run", overrides, config_dir=options.config_dir, saved=True)
    return call_hydra([*flags, *overrides], "eval_run", evaluation_job)


def predict(arguments: Sequence[str]) -> int:
    """Run `capsexp predict`."""
    options, flags, rest = parse(arguments)
    files = [text for text in rest if "=" not in text or os.path.exists(text)]
    overrides = [text for text in rest if text not in files]
    extra: dict[str, Any] = {"top": 3, "weights": "best", "reconstructions": True, "output": None}
    register_saved_config(overrides, command="predict", **extra)
    if options.cfg or options.info:
        return _show("predict_run", options, flags, overrides)
    if not files:
        raise UserError("capsexp predict needs images: capsexp predict run=DIR FILES")
    from capsexp.analysis.predict import predict
    from capsexp.training.memory import explain_out_of_memory

    composed, components = compose_checked(
        "predict_run", overrides, config_dir=options.config_dir, saved=True
    )
    plain = to_plain(composed)
    files = [text if os.path.exists(text) else expanded(text) for text in files]
    with explain_out_of_memory(components, plain, training=False):
        return predict(components, plain, files)


def analyze(arguments: Sequence[str]) -> int:
    """Run `capsexp analyze`."""
    options, flags, overrides = parse(arguments)
    register_saved_config(overrides, command="analyze", groups={"study": "???"}, weights="best", limit=None)
    if not any(text.startswith("study=") for text in overrides):
        raise UserError(f"capsexp analyze needs a study: study=NAME{nearest('', option_names('study'))}")
    if options.cfg or options.info:
        return _show("analyze_run", options, flags, overrides)
    composed, components = compose_checked(
        "analyze_run", overrides, config_dir=options.config_dir, saved=True
    )
    from capsexp.analysis.analyze import analyze
    from capsexp.config.build import build_checked
    from capsexp.training.memory import explain_out_of_memory

    packages, plain = plugins(overrides), to_plain(composed)
    study = build_checked(plain["study"], at="study", plugins=packages)
    name = composed.hydra.runtime.choices["study"]
    with explain_out_of_memory(components, plain, training=False):
        analyze(study, name, components, plain, plugins=packages)
    return 0


def bench(arguments: Sequence[str]) -> int:
    """Run `capsexp bench`."""
    options, flags, overrides = parse(arguments)
    if _asks_for_help(options):
        return call_hydra([*flags, *overrides], "train", no_op)
    file, compiled = value(overrides, "growth"), value(overrides, "compiled") or False
    overrides = [text for text in overrides if text.partition("=")[0] not in ("growth", "compiled")]
    if not isinstance(compiled, bool):
        raise UserError(f"compiled must be true or false, got {compiled}")
    name = options.config_name or "train"
    if options.cfg or options.info:
        return _show(name, options, flags, overrides)
    composed, components = compose_checked(name, overrides, config_dir=options.config_dir)
    plain = to_plain(composed)
    from capsexp.training.memory import explain_out_of_memory

    with explain_out_of_memory(components, plain, training=True):
        if file is not None:
            from capsexp.analysis.speed.growth import growth

            growth(plain, Path(str(file)), plugins=plugins(overrides))
        else:
            from capsexp.analysis.speed.bench import bench

            bench(plain, plugins=plugins(overrides), compiled=compiled)
    return 0


def data(arguments: Sequence[str]) -> int:
    """Run `capsexp data`."""
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
    return prepare.run_action(action, datasets)


def doctor(arguments: Sequence[str]) -> int:
    """Run `capsexp doctor`."""
    from capsexp.cli.doctor import report

    report(_datasets(arguments, None))
    return 0


RUN: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "analyze": analyze,
    "data": data,
    "bench": bench,
    "doctor": doctor,
}


def _asks_for_help(options: Namespace) -> bool:
    return bool(options.help or options.hydra_help)


def _show(name: str, options: Namespace, flags: Sequence[str], overrides: Sequence[str]) -> int:
    """Let Hydra print a config, or what it knows about it."""
    composed = compose(name, overrides, config_dir=options.config_dir)
    package = options.package
    if package is not None and OmegaConf.select(composed, package) is None:
        raise UserError(f"-p {package}: the config has no such part{nearest(package, map(str, composed))}")
    return call_hydra([*flags, *overrides], name, no_op)


def _with_new_names(overrides: Sequence[str], renamed: Mapping[str, str]) -> list[str]:
    keys = (text.partition("=")[0] for text in overrides)
    return [renamed.get(key, key) + text.removeprefix(key) for key, text in zip(keys, overrides, strict=True)]


def _run_override(composed: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Return an override that names a new directory for the run, unless the user chose a directory."""
    if composed.run is not None:
        run = expanded(composed.run)
        make_folder(Path(run))  # Hydra would fail with a traceback
        return [f"run={quoted(run)}"] if run != composed.run else []
    if "hydra.run.dir" in {text.partition("=")[0] for text in overrides}:
        return []
    choices = composed.hydra.runtime.choices
    folder = choices.get("experiment") or f"{choices['model']}-{choices['dataset']}"
    in_folder = ("model", "dataset", "experiment")
    settings = [text for text in overrides if text.partition("=")[0] not in in_folder]
    return [
        f"run={quoted(new_run_dir(Path(expanded(composed.output_root)) / folder, label='-'.join(settings)))}"
    ]


def _datasets(overrides: Sequence[str], names: Sequence[str] | None) -> dict[str, Any]:
    """Build the datasets named; without names those that need no further setting."""
    from capsexp.config.build import build_checked

    known = sorted(path.stem for path in Path(conf_dir(), "dataset").glob("*.yaml"))
    for name in names or []:
        if name not in known:
            raise UserError(f"unknown dataset {name!r}{nearest(name, known)}")
    datasets = {}
    for name in names or known:
        composed = compose("train", [f"dataset={name}", *overrides], config_dir=None)
        if names is None and OmegaConf.missing_keys(composed.dataset):
            continue
        plain = to_plain(composed)
        if problems := list(root_problems(plain)):
            raise UserError(*problems)
        datasets[name] = build_checked(plain["dataset"], at="dataset", plugins=plugins(overrides))
    return datasets
