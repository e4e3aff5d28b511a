"""The record of a finished run: what docs/results/runs.json keeps of its directory."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from page_parts import few, rounded

from capsexp.compare.group_errors import Part, test_errors
from capsexp.compare.history import seconds_at
from capsexp.compare.runs import Run, read
from capsexp.documents import damage, parse_json, read_json
from capsexp.errors import Notes, UserError, is_integer, is_number
from capsexp.files import read_regular
from capsexp.training.run_dir import RunDir
from capsexp.training.timing import read_timing
from results_page.tested import own_test, sorted_tests

NOT_SETTINGS = {"experiment", "seed", "run", "resume", "output_root", "data_root", "dataset.root", "device"}
"""Overrides that are no setting of a record: those with a field of their own, and places."""
ROUNDING = 1e-9
"""Largest difference of the same accuracy in two files."""


def record(path: Path, *, cpu: str | None = None) -> dict[str, Any]:
    """Return the record of a finished run.

    Args:
        path: the run directory.
        cpu: model of the processor, for a run whose env.json lacks it.

    Returns:
        See docs/results.md; times in seconds, errors in %.

    Raises:
        UserError: no finished run, damaged files, or a test that a record cannot describe; one line.
    """
    if not (path / "status.json").is_file():
        raise UserError(f"{path} is no run directory: it has no status.json")
    notes = Notes()
    run = read(path, notes)
    if run.status != "finished":
        raise UserError(f"{path}: only finished runs have a record; the status of this one is {run.status}")
    status, environment = RunDir(path).status(), _environment(path)
    lines, sha256 = _metrics(path)
    own = own_test(run, status)
    if own is not None and not _repeats(lines, run.test):
        raise UserError(f"{path}/metrics.jsonl does not hold the test of status.json")
    errors = test_errors(path, run.test, notes)
    found = {
        "row": None,
        **_identity(run),
        "kept": True,
        "note": None,
        "dataset": run.choices.get("dataset"),
        "date": None if run.started is None else f"{datetime.fromtimestamp(run.started, UTC):%Y-%m-%d}",
        "commit": environment.get("commit"),
        "dirty": environment.get("dirty"),
        "resumes": len(status.get("resumes", ())),
        **_work(run),
        **_machine(environment, cpu),
        "parameters": run.parameters,
        **sorted_tests(run, own),
        "classes": [] if errors is None else [_counts(part) for part in errors.classes],
        "group": None if errors is None else errors.group,
        "groups": [] if errors is None else [_counts(part) for part in errors.groups],
        "curve": _curve(run, lines),
        "caveats": _caveats(path, status),
        "sha256": sha256,
    }
    if notes.warnings:
        raise UserError(notes.warnings[0])
    if not (found["tests"] or found["curve"]):
        raise UserError(f"{path} was neither tested nor validated: it has no error to show")
    return found


def _identity(run: Run) -> dict[str, Any]:
    """Return recipe, settings that differ from it, and seed: records with equal ones replace each other."""
    recipe = run.choices.get("experiment")
    if recipe is None:
        raise UserError(f"{run.path} has no recipe: it was trained without experiment=NAME")
    if not (run.path / ".hydra" / "overrides.yaml").is_file():
        raise UserError(f"{run.path} has no .hydra/overrides.yaml: the settings that differ are not known")
    overrides = [text for text in RunDir(run.path).overrides() if _is_setting(text)]
    return {"recipe": recipe, "overrides": overrides, "seed": run.settings.get("seed")}


def _is_setting(override: str) -> bool:
    key = override.partition("=")[0].lstrip("+~")
    return key not in NOT_SETTINGS and not key.startswith("device.")


def _work(run: Run) -> dict[str, Any]:
    batch = run.settings.get("trainer.batch_size")
    if run.step is None or not is_integer(batch) or run.training_seconds is None:
        raise UserError(f"{run.path} does not say how long it trained: an earlier version made it")
    return {
        "steps": run.step,
        "images": run.step * batch,
        "epochs": None if run.epochs is None else rounded(run.epochs),
        "training_seconds": rounded(run.training_seconds),
        "wall_seconds": None if run.seconds is None else rounded(run.seconds),
    }


def _environment(path: Path) -> Mapping[str, Any]:
    try:
        found = read_json(path / "env.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/env.json cannot be read: {damage(error)}") from None
    return found if isinstance(found, dict) else {}


def _machine(environment: Mapping[str, Any], cpu: str | None) -> dict[str, Any]:
    """Return the machine without its name."""
    device, versions = str(environment.get("device", "")), environment.get("versions")
    threads = re.search(r"\((\d+) thread", device)
    return {
        "device": device.partition(" (")[0] if threads else device,
        "threads": int(threads[1]) if threads else None,
        "cpu": environment.get("cpu") or cpu,
        "cores": environment.get("cores"),
        "torch": versions.get("torch") if isinstance(versions, dict) else None,
    }


def _metrics(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Return the lines of metrics.jsonl and the checksum of the file.

    Raises:
        UserError: a line is damaged.
    """
    file = path / "metrics.jsonl"
    try:
        content = read_regular(file)
        lines = [parse_json(line) for line in content.splitlines()]
        if not content.endswith(b"\n") or not all(is_integer(line.get("step")) for line in lines):
            raise ValueError("incomplete lines")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {damage(error)}") from None
    return lines, hashlib.sha256(content).hexdigest()


def _repeats(lines: Sequence[Mapping[str, Any]], accuracy: float | None) -> bool:
    """Whether the last test in metrics.jsonl has this accuracy."""
    found = [line["test/accuracy"] for line in lines if is_number(line.get("test/accuracy"))]
    return bool(found) and accuracy is not None and abs(found[-1] - accuracy) < ROUNDING


def _counts(part: Part) -> list[Any]:
    return [part.name, part.errors, part.images]


def _curve(run: Run, lines: Sequence[Mapping[str, Any]]) -> list[list[int | float]]:
    """Return images, seconds of training and error of the validation rounds, with the last one."""
    clock, batch = read_timing(run.path), run.settings["trainer.batch_size"]
    points = []
    for line in lines:
        accuracy, seconds = line.get("validation/accuracy"), seconds_at(line["step"], clock)
        if is_number(accuracy) and seconds is not None:
            points.append([line["step"] * batch, rounded(seconds), rounded(100 - 100 * accuracy)])
    return [*reversed(few([*reversed(points)]))]


def _caveats(path: Path, status: Mapping[str, Any]) -> list[str]:
    """Return the caveats of the dataset; of a run whose status lacks them, the lines of its log."""
    known = status.get("caveats")
    if isinstance(known, list):
        return [str(line) for line in known]
    try:
        log = read_regular(path / "train.log").decode(errors="replace")
    except OSError as error:
        raise UserError(f"{path}/train.log cannot be read: {damage(error)}") from None
    # The first lines of a run: its data, its network, the caveats; then its training.
    introduction = re.search(r" INFO [^\n]* parameters[^\n]*\n(.*?)(?=^[^\n]* INFO epoch )", log, re.M | re.S)
    return re.findall(r" INFO (.*)", introduction[1]) if introduction else []
