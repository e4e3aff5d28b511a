"""The tests of a run: that at its end, and those of `capsexp eval` afterwards."""

from collections.abc import Mapping
from typing import Any

from page_parts import rounded

from capsexp.compare.fields import get_count, get_number
from capsexp.compare.runs import Run
from capsexp.config.settings import changes, comparable
from capsexp.documents import damage, parse_json
from capsexp.errors import UserError
from capsexp.files import read_regular

CROPS = "dataset.preprocess.test_crops"
NOT_COMPARED = {CROPS, "trainer.batch_size", "split", "weights"}
"""Settings of `capsexp eval` that a record describes, or that change no result."""


def own_test(run: Run, status: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the test at the end of a run: weights, step, crops, and errors in %; None without one.

    Raises:
        UserError: it was a test of some images only, or its result is missing.
    """
    for key in ("trainer.limit_eval_batches", "trainer.overfit"):
        if run.settings.get(key) not in (None, False):
            raise UserError(f"{run.path} has {key}={run.settings[key]}: no test of the whole split")
    weights = run.settings.get("trainer.test")
    if weights == "none":
        return None
    results = status.get("results")
    if run.test is None or not isinstance(results, dict):
        raise UserError(f"{run.path}: status.json has no test/accuracy")
    step = _chosen_step(status) if weights == "best" else None
    place = {"weights": weights, "step": run.step if step is None else step, "crops": _crops(run.settings)}
    return {**place, **_errors(results, "test/")}


def sorted_tests(run: Run, own: dict[str, Any] | None) -> dict[str, list[dict[str, Any]]]:
    """Return the `tests` of the weights of a run's own test, and `other_tests`, of other weights.

    Of equal weights and crops the first test counts. Without a test of its own, the weights are those of the
    first evaluation.

    Raises:
        UserError: evaluations.jsonl is damaged, or holds a test with other settings.
    """
    found: dict[tuple[Any, Any], dict[str, Any]] = {}
    for test in ([] if own is None else [own]) + _evaluations(run):
        found.setdefault((test["step"], test["crops"]), test)
    tests = [*found.values()]
    same = [test | {"weights": tests[0]["weights"]} for test in tests if test["step"] == tests[0]["step"]]
    others = [test for test in tests if test["step"] != tests[0]["step"]]
    return {"tests": sorted(same, key=lambda test: test["crops"]), "other_tests": others}


def _evaluations(run: Run) -> list[dict[str, Any]]:
    file = run.path / "evaluations.jsonl"
    try:
        entries = [parse_json(line) for line in read_regular(file).splitlines()]
        return [_evaluation(entry, run) for entry in entries if entry["split"] == "test"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {damage(error)}") from None


def _evaluation(entry: Mapping[str, Any], run: Run) -> dict[str, Any]:
    settings = comparable(entry["config"])
    shown = {key: value for key, value in settings.items() if key not in NOT_COMPARED}
    known = {key: value for key, value in run.settings.items() if key not in NOT_COMPARED}
    for change in changes(known, shown):
        line = f"{run.path}/evaluations.jsonl has a test with {change.key}={change.new}"
        raise UserError(f"{line}, which a record cannot describe")
    place = {"weights": entry["config"]["weights"], "step": entry["step"], "crops": _crops(settings)}
    return {**place, **_errors(entry, "")}


def _crops(settings: Mapping[str, Any]) -> int:
    return settings.get(CROPS) or 1


def _chosen_step(status: Mapping[str, Any]) -> int | None:
    """Return the step of the best weights: that at which an accuracy ended the run, or validation's best."""
    for key in ("stopped", "best"):
        if isinstance(chosen := status.get(key), dict):
            return get_count(chosen, "step")
    return None


def _errors(metrics: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Return the error of images, and of digits where an image has several."""
    names = {"error": f"{prefix}accuracy", "digit_error": f"{prefix}digit_accuracy"}
    values = {name: get_number(metrics, key) for name, key in names.items()}
    if values["error"] is None:
        raise ValueError("a test without accuracy")
    return {name: rounded(100 - 100 * value) for name, value in values.items() if value is not None}
