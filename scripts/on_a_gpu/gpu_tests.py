"""Part 1: the tests that need a card."""

import os
import re
from collections import Counter
from pathlib import Path

from scripts.on_a_gpu.child import ROOT, Child, python, run_child
from scripts.on_a_gpu.parts import Outcome, Plan

MARK = "pytest.mark.gpu"
OPTIONS = "--strict-markers --import-mode=importlib"
"""Those of the Makefile: without jaxtyping's checks of every call."""
DRY = "compiled_kernels or large_logits or not_kept"
"""Tests of the kernels for a card, which are skipped without one, and two that use Triton's interpreter."""
MOST_WORKERS = 8  # each has Triton compile its own kernels, and a context on the card
_RESULT = re.compile(r"(?:^|\s)(PASSED|FAILED|ERROR|SKIPPED)(?:\s|$)")


def run(plan: Plan, end: float) -> Outcome:
    """Run the tests and count the results."""
    files = files_with_mark(ROOT / "tests")
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    which = ["-k", DRY] if plan.cpu else ["-m", "gpu", "-n", str(workers)]
    command = [python(), "-P", "-m", "pytest", "-v", "-p", "no:cacheprovider", "-o", f"addopts={OPTIONS}"]
    return outcome(run_child([*command, *which, *map(str, files)], end=end))


def files_with_mark(folder: Path) -> list[Path]:
    """Return the test files in which some test needs a card, so that the others are not imported."""
    return [path for path in sorted(folder.rglob("test_*.py")) if MARK in path.read_text(encoding="utf-8")]


def outcome(child: Child) -> Outcome:
    """Return what pytest with `-v` printed, also if it did not come to its end."""
    counts, failures = results(child.out)
    result = {"counts": counts, "failures": failures}
    message = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    if failures:
        message += f"; the first: {failures[0]}"
    if not child.in_time:
        late = f"{message}, then stopped" if message else "stopped before a test came to its end"
        return Outcome("out of time", late, result)
    well = child.code == 0 and counts["passed"] > 0
    return Outcome("ok" if well else "failed", message or child.last_line(), result)


def results(printed: str) -> tuple[dict[str, int], list[str]]:
    """Return the number of tests for each result, and a line for each failure."""
    lines = printed.splitlines()
    # pytest's summary repeats failures at the start of a line, with their message.
    summary = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    found = Counter(match[1] for line in lines if line not in summary and (match := _RESULT.search(line)))
    counts = {
        "passed": found["PASSED"],
        "failed": found["FAILED"] + found["ERROR"],
        "skipped": found["SKIPPED"],
    }
    return counts, [line.partition(" ")[2][:300] for line in summary]
