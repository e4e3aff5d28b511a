"""The command line of `scripts/on_a_gpu.sh`."""

import argparse
import datetime
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capsexp.child import python_command
from capsexp.errors import UserError, print_error
from capsexp.outputs import write_output
from scripts.on_a_gpu import gpu_tests, machine, parity, speed, training
from scripts.on_a_gpu.child import ROOT, run_child
from scripts.on_a_gpu.parts import DRY_MINUTES, MINUTES, Part, Plan, run_parts
from scripts.on_a_gpu.report import markdown

PARTS = (
    Part("tests", "GPU tests", 105, gpu_tests.run),
    Part("parity", "Parity with float64", 65, parity.run),
    Part("speed", "Speed", 190, speed.run),
    Part("training", "Training", 220, training.run),
)
FAILED, NO_CARD, INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts and write the report. Return the exit status."""
    plan, parts = _parse(arguments)
    if not plan.cpu and not machine.has_card():
        print(machine.no_card(), file=sys.stderr)
        return NO_CARD
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        return check(plan, parts)
    except OSError as error:
        return print_error(UserError(f"on_a_gpu: cannot write to {plan.folder}: {error.strerror or error}"))
    except KeyboardInterrupt:
        print("on_a_gpu: interrupted; the report has the parts that were finished", file=sys.stderr)
        return INTERRUPTED


def check(plan: Plan, parts: Sequence[Part]) -> int:
    """Run the parts; write the report after each, so that nothing is lost. Return the exit status."""
    start, started = time.monotonic(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report: dict[str, Any] = {"started": started, "dry_run": plan.cpu, "minutes": plan.minutes}
    report["machine"] = describe_machine()

    def write(entries: list[dict[str, Any]]) -> None:
        failed = any(entry["status"] != "ok" for entry in entries)
        status = "failed" if failed else "ok" if len(entries) == len(parts) else "unfinished"
        report.update(status=status, seconds=round(time.monotonic() - start, 1), parts=entries)
        text = json.dumps(report, indent=1, default=str)
        write_output(plan.folder / "on_a_gpu.json", f"{text}\n".encode())
        write_output(plan.folder / "on_a_gpu.md", markdown(report).encode())

    entries = run_parts(parts, plan, write)
    print(f"written: {plan.folder / 'on_a_gpu.md'} and on_a_gpu.json")
    return FAILED if any(entry["status"] != "ok" for entry in entries) else 0


def describe_machine() -> dict[str, Any]:
    """Return the machine as a process of its own sees it, so that this one never opens the card."""
    command = python_command("from scripts.on_a_gpu.machine import answer; answer()")
    child = run_child(command, end=time.monotonic() + 60)
    try:
        return dict(json.loads(child.out.splitlines()[-1]))
    except (IndexError, ValueError):
        return {"error": child.last_line()}


def _parse(arguments: Sequence[str] | None) -> tuple[Plan, tuple[Part, ...]]:
    parser = argparse.ArgumentParser(
        prog="scripts/on_a_gpu.sh",
        description="Check capsexp on this machine's CUDA card: tests, parity, speed, and a training.",
        epilog="Exit status: 0 all parts are ok, 1 some part is not, 2 there is no CUDA card.",
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=ROOT / "outputs",
        help="for on_a_gpu.json, on_a_gpu.md and the training's run, which replace those of an earlier call"
        " (default: outputs)",
    )
    parser.add_argument(
        "--cpu", action="store_true", help="a dry run: the same parts, small, on the CPU, in about a minute"
    )
    parser.add_argument(
        "--minutes",
        type=_minutes,
        help=f"for everything (default: {MINUTES:g}, or {DRY_MINUTES:g} with --cpu)",
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=f"of {', '.join(names)}")
    given = parser.parse_args(arguments)
    minutes = given.minutes or (DRY_MINUTES if given.cpu else MINUTES)
    plan = Plan(given.cpu, given.folder.absolute(), minutes)
    return plan, tuple(part for part in PARTS if not given.only or part.name in given.only)


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"must be > 0, got {text}")
    return minutes


if __name__ == "__main__":
    sys.exit(main())
