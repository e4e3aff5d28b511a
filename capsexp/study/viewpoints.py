"""Familiar and novel viewpoints: a network's errors as the camera moves around smallNORB's toys."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from capsexp.analysis.findings import Findings
from capsexp.analysis.trained_run import TrainedRun
from capsexp.dataset.smallnorb import FACTORS, FAMILIAR, SmallNORB
from capsexp.errors import UserError, is_number, refuse
from capsexp.terminal import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEGREES = {"azimuth": (0, 10), "elevation": (30, 5)}
"""Degrees of code 0, and of a step of 1."""


class ViewResults(NamedTuple):
    """Which test images one network classifies correctly, and their viewpoints."""

    name: str
    parameters: int
    correct: Bool[Tensor, " N"]
    factors: Int64[Tensor, "N 4"]
    """Codes of each image, in the order of `FACTORS`."""

    def error(self, mask: Bool[Tensor, " N"]) -> float:
        """Return the error on the images of the mask."""
        return 1 - self.correct[mask].double().mean().item()

    def accuracy_by(self, factor: str) -> dict[int, float]:
        """Return the accuracy by the degrees of a factor."""
        start, step = DEGREES[factor]
        codes = self.factors[:, FACTORS.index(factor)]
        return {start + step * code: 1 - self.error(codes == code) for code in codes.unique().tolist()}


class Viewpoints:
    """Errors on familiar and novel views: Table 2 of Hinton et al., "Matrix capsules" (ICLR 2018).

    Each image is its center crop. Familiar and novel views are both of toys that are not in the training
    split. Differs from it in: nothing, if the compared runs have the same error on familiar views; the study
    reports the largest difference. That error is over test images, in the paper as here.

    Args:
        others: directories of runs to compare with.
        published: rows of others' tables: a name, and for `azimuth` and `elevation` the errors in % on
            familiar and novel views.

    Raises:
        ValueError: a row of another form.
    """

    def __init__(self, *, others: Sequence[str], published: Sequence[Mapping[str, Any]]) -> None:
        for row in published:
            if set(row) != {"name", *DEGREES} or not all(_is_pair(row[factor]) for factor in DEGREES):
                refuse(f"published must give name, azimuth: [., .], elevation: [., .], got {row}")
        self.others, self.published = others, published

    def __call__(self, run: TrainedRun) -> Findings:
        """Return the errors, and accuracy by azimuth and elevation, of the run and the others."""
        runs = [run, *map(run.other_run, self.others)]
        viewpoints = {_smallnorb(run).viewpoint for run in runs}
        if len(viewpoints) > 1:
            names = " and ".join(sorted(f"dataset.viewpoint={name or 'null'}" for name in viewpoints))
            raise UserError(f"study.others: the runs must be trained on the same views, got {names}")
        (viewpoint,) = viewpoints
        results = [_results(run) for run in runs]
        rows = [_numbers(result, viewpoint) for result in results]
        numbers = {**{key: value for key, value in rows[0].items() if key != "run"}, "runs": rows}
        if viewpoint is not None:
            numbers["published"] = [
                {"name": row["name"], viewpoint: row[viewpoint]} for row in self.published
            ]
            differences = [abs(row["familiar_error"] - rows[0]["familiar_error"]) for row in rows[1:]]
            numbers |= {"largest_familiar_difference": max(differences)} if differences else {}
        table = _table(rows, self.published, viewpoint)
        return Findings(numbers, {"viewpoints": _figure(results, viewpoint)}, table)


def _is_pair(errors: Any) -> bool:
    is_list = isinstance(errors, Sequence) and not isinstance(errors, str) and len(errors) == 2
    return is_list and all(is_number(error) and 0 <= error <= 100 for error in errors)


def _smallnorb(run: TrainedRun) -> SmallNORB:
    if not isinstance(run.dataset, SmallNORB):
        raise UserError(
            f"study=viewpoints is for runs on smallnorb, whose views are known; {run.path} is one on "
            f"{run.dataset.name}"
        )
    return run.dataset


def _results(run: TrainedRun) -> ViewResults:
    all_views = _smallnorb(run).with_test_views("all")
    split, factors = all_views.read("test"), all_views.factors("test")
    correct = [
        (output.scores.argmax(1) == batch.labels).cpu()
        for batch, output in run.outputs(split, description=run.path.name)
    ]
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    return ViewResults(run.path.name, parameters, torch.cat(correct), factors[run.sampled(split.size)])


def _numbers(result: ViewResults, viewpoint: str | None) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "run": result.name,
        "parameters": result.parameters,
        "pictures": len(result.correct),
        "error": result.error(torch.ones_like(result.correct)),
    }
    if viewpoint is not None:
        codes = result.factors[:, FACTORS.index(viewpoint)]
        familiar = torch.isin(codes, torch.tensor(FAMILIAR[viewpoint]))
        numbers |= {"familiar_error": result.error(familiar), "novel_error": result.error(~familiar)}
    return numbers | {f"accuracy_by_{factor}": result.accuracy_by(factor) for factor in DEGREES}


def _table(
    runs: Sequence[Mapping[str, Any]], published: Sequence[Mapping[str, Any]], viewpoint: str | None
) -> Table:
    if viewpoint is None:
        table = Table("run", "test error, %")
        for run in runs:
            table.add_row(run["run"], f"{100 * run['error']:.2f}")
        return table
    table = Table(f"by {viewpoint}, test error, %", "familiar", "novel")
    for run in runs:
        table.add_row(run["run"], *(f"{100 * run[f'{kind}_error']:.2f}" for kind in ("familiar", "novel")))
    table.add_section()
    for row in published:
        table.add_row(row["name"], *map(str, row[viewpoint]))
    return table


def _figure(results: Sequence[ViewResults], viewpoint: str | None) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    polar, line = figure.add_subplot(121, projection="polar"), figure.add_subplot(122)
    for result in results:
        azimuths = result.accuracy_by("azimuth")
        closed = [*azimuths.items(), *list(azimuths.items())[:1]]
        polar.plot([math.radians(angle) for angle, _ in closed], [value for _, value in closed], "o-", ms=3)
        elevations = result.accuracy_by("elevation")
        label = f"{result.name} ({result.parameters:,} parameters)"
        line.plot([*elevations], [*elevations.values()], "o-", ms=3, label=label)
    lowest = min(min(result.accuracy_by(factor).values()) for result in results for factor in DEGREES)
    floor = max(0.0, math.floor(10 * lowest - 0.5) / 10)
    polar.set_ylim(floor, 1)
    polar.tick_params(axis="y", labelsize=7)
    polar.set_title("accuracy by azimuth, degrees")
    line.set(title="accuracy by elevation", xlabel="degrees above the horizon", ylim=(floor, 1.01))
    shaded: dict[str, Any] = {"color": "tab:green", "alpha": 0.12, "lw": 0, "label": "training views"}
    if viewpoint == "azimuth":
        polar.bar(math.radians(350), 1 - floor, math.radians(120), floor, **shaded)
        polar.legend(loc="lower left", bbox_to_anchor=(-0.3, -0.12), fontsize=8)
    elif viewpoint == "elevation":
        line.axvspan(27.5, 42.5, **shaded)
    line.legend(fontsize=8)
    return figure
