"""The command `capsexp`: its commands, their help, and which function runs each.

A command's modules are imported when it runs, so help and completion appear at once.
"""

import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from capsexp.cli.torchrun import is_distributed, run_distributed
from capsexp.errors import RunStopped, UserError, exit_code, first_line, nearest, print_error
from capsexp.text import prepare_streams


class Command(NamedTuple):
    """What `capsexp --help` and `capsexp COMMAND --help` print."""

    summary: str
    arguments: str
    """As they follow the command."""
    example: str
    settings: dict[str, str] = {}  # noqa: RUF012 - never changed
    """The command's own settings, with their meaning and default."""
    group: str = ""
    """Config group whose options the help lists."""


WEIGHTS = "best (default), last, or the number of a step with a checkpoint"
COMMANDS = {
    "train": Command(
        "train a capsule network, or a sweep of networks",
        "[GROUP=OPTION] [KEY=VALUE] [-m KEY=A,B,C]",
        "capsexp train model=em_routing trainer.max_epochs=5 seed=1",
    ),
    "eval": Command(
        "measure a trained network on a split of its dataset",
        "run=DIR [split=SPLIT] [weights=WEIGHTS] [KEY=VALUE]",
        "capsexp eval run=outputs/demo split=validation routing.iterations=1",
        {
            "run": "directory of the run",
            "split": "test (default), validation, train, or familiar (test images like the training images)",
            "weights": WEIGHTS,
            "KEY=VALUE": "changes the run's config for this evaluation",
        },
    ),
    "predict": Command(
        "classify image files",
        "run=DIR FILES [top=N] [reconstructions=false] [output=DIR] [weights=WEIGHTS] [KEY=VALUE]",
        "capsexp predict run=outputs/demo digit.png top=5",
        {
            "run": "directory of the run",
            "top": "number of classes to print (3)",
            "FILES": "images, and folders of images",
            "reconstructions": "true (default) writes FILE.reconstruction.png if the network has a decoder",
            "output": "folder of the reconstructions (null: RUN/predictions)",
            "weights": WEIGHTS,
            "KEY=VALUE": "changes the run's config for these predictions",
        },
    ),
    "analyze": Command(
        "run a study of a trained network",
        "study=NAME run=DIR [limit=N] [weights=WEIGHTS] [KEY=VALUE]",
        "capsexp analyze study=reconstructions run=outputs/demo limit=500",
        {
            "study": "the study",
            "run": "directory of the run",
            "limit": "number of images to use (null: all)",
            "weights": WEIGHTS,
            "KEY=VALUE": "changes the study's settings or the run's config",
        },
        group="study",
    ),
    "runs": Command("list runs", "[DIRS] [FILTERS]", "capsexp runs outputs/sweeps status=failed,died"),
    "compare": Command(
        "compare runs: the settings that differ, and metrics",
        "[DIRS] [FILTERS] [OPTIONS]",
        "capsexp compare outputs/sweeps model=em_routing --group-by seed --show train/loss",
    ),
    "report": Command(
        "write an HTML page with runs, curves and images",
        "[DIRS] [FILTERS] [OPTIONS]",
        "capsexp report outputs/sweeps iterations=2,3 --sort-by test -o report.html",
    ),
    "data": Command(
        "list, download or verify datasets",
        "[list|prepare|verify] [NAMES] [data_root=DIR]",
        "capsexp data prepare mnist",
        {
            "list": "print which datasets are on this machine (default)",
            "prepare": "download and unpack the datasets named",
            "verify": "check the files of the datasets named, or of all",
            "data_root": "folder of all datasets ($CAPSEXP_DATA or ~/.cache/capsexp)",
        },
        group="dataset",
    ),
    "bench": Command(
        "measure speed and memory of a network",
        "[GROUP=OPTION] [KEY=VALUE] [compiled=true] [growth=FILE]",
        "capsexp bench model=em_routing dataset=smallnorb",
        {
            "GROUP=OPTION": "the network, as for capsexp train",
            "compiled": "true also measures the network under torch.compile (false)",
            "growth": "measure how time and memory grow instead, and draw it to this file",
        },
    ),
    "doctor": Command(
        "check the installation",
        "[data_root=DIR]",
        "capsexp doctor",
        {"data_root": "folder of all datasets ($CAPSEXP_DATA or ~/.cache/capsexp)"},
    ),
}
WRITING = ("train", "eval", "predict", "analyze", "report", "data", "bench")  # their work is more than output
OTHER_HELP = ("train", "runs", "compare", "report")  # commands whose help Hydra or argparse prints


def main() -> int:
    """Run the command line; return the exit code. `capsexp.cli.main` calls this in a process of its own."""
    # Bugs keep their whole traceback; a UserError prints one line per problem.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    prepare_streams()
    try:
        if is_distributed():
            return run_distributed(lambda: dispatch(sys.argv[1:]))
        return dispatch(sys.argv[1:])
    except UserError as error:
        return print_error(error)
    except MemoryError as error:  # the commands that build a network explain more
        return print_error(RunStopped(f"out of memory: {first_line(error)}", exit_code=1))
    except KeyboardInterrupt as interrupt:
        return exit_code(interrupt)


def dispatch(arguments: Sequence[str]) -> int:
    """Run a command with its arguments; return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    command, *rest = arguments
    if command in ("-sc", "--shell-completion"):
        return _complete(arguments)
    if command == "--version":
        print(f"capsexp {_version()}")
        return 0
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}{nearest(command, COMMANDS)}")
    if command not in OTHER_HELP and {"-h", "--help"} & {*rest}:
        print(command_help(command))
        return 0
    if command != "train" and is_distributed():
        raise UserError(f"capsexp {command} works in one process: start it without torchrun")
    if command in ("runs", "compare", "report"):
        from capsexp.compare.command import run

        return run(command, rest, heading=_heading(command), example=COMMANDS[command].example)
    from capsexp.cli.commands import RUN

    return RUN[command](rest)


def usage() -> str:
    """Return the text of `capsexp --help`."""
    commands = "\n".join(f"  {name:8} {command.summary}" for name, command in COMMANDS.items())
    blocks = (
        "Train, evaluate and compare capsule networks.",
        "usage: capsexp COMMAND [ARGUMENTS]",
        commands,
        "`capsexp COMMAND --help` has the details. To begin: capsexp train",
    )
    return "\n\n".join(blocks)


def command_help(name: str) -> str:
    """Return the text of `capsexp NAME --help`."""
    command = COMMANDS[name]
    blocks = [_heading(name)]
    if command.settings:
        blocks.append("\n".join(f"  {key:16} {text}" for key, text in command.settings.items()))
    if command.group:
        from capsexp.config.compose import option_names

        blocks.append(f"{command.group}: {', '.join(option_names(command.group))}")
    return "\n\n".join([*blocks, f"example: {command.example}"])


def _heading(name: str) -> str:
    command = COMMANDS[name]
    return f"{command.summary[0].upper()}{command.summary[1:]}.\n\nusage: capsexp {name} {command.arguments}"


def _complete(arguments: Sequence[str]) -> int:
    """Print completions for the shell: commands from here, their arguments from Hydra."""
    if arguments[1:] and arguments[1].startswith("query="):
        line = os.environ.get("COMP_LINE", "")
        typed = line[: int(os.environ.get("COMP_POINT", len(line)))].split(" ")
        if len(typed) <= 2:
            print(" ".join(name for name in COMMANDS if name.startswith(typed[-1])))
            return 0
        program, _, rest = line.split(" ", 2)
        os.environ["COMP_LINE"] = f"{program} {rest}"
        os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))
    from capsexp.cli.jobs import call_hydra, no_op

    return call_hydra(arguments, "train", no_op)


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("capsexp")
