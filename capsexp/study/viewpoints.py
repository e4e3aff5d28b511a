"""Familiar and novel viewpoints: where a network errs as the camera moves round smallNORB's toys."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int64
from rich.table import Table
from torch import Tensor

from capsexp.analysis.findings import Findings
from capsexp.analysis.trained_run import TrainedRun
from capsexp.dataset.smallnorb import FACTORS, FAMILIAR, SmallNORB
from capsexp.errors import UserError

DEGREES = {"azimuth": (0, 10), "elevation": (30, 5)}
"""Degrees of the code 0, and of a step of 1."""


class Seen(NamedTuple):
    """What one network makes of the test toys."""

    name: str
    parameters: int
    right: Bool[Tensor, " N"]
    factors: Int64[Tensor, "N 4"]

    def error(self, chosen: Bool[Tensor, " N"]) -> float:
        """Share of these pictures that it gets wrong."""
        return 1 - self.right[chosen].double().mean().item()

    def accuracy_by(self, factor: str) -> dict[int, float]:
        """Share of the pictures that it gets right, by the degrees of a factor."""
        start, step = DEGREES[factor]
        codes = self.factors[:, FACTORS.index(factor)]
        return {start + step * code: 1 - self.error(codes == code) for code in codes.unique().tolist()}


class Viewpoints:
    """Errors on familiar and novel views: Table 2 of Hinton et al., "Matrix capsules" (ICLR 2018).

    Each picture is its centre crop. Both kinds of views are of toys that no training has seen.
    Differs from it in: nothing, if the runs compared have the same error on familiar views; their difference
    is told. That comparison looks at familiar test pictures, in the paper as here.

    Args:
        others: directories of runs to compare with.
        published: rows of others' tables: a name, and for `azimuth` and `elevation` the errors in % on
            familiar and novel views.
    Raises:
        ValueError: a row of another form.
    """

    def __init__(self, *, others: Sequence[str], published: Sequence[Mapping[str, Any]]) -> None:
        for row in published:
            if set(row) != {"name", *DEGREES} or any(len(row[factor]) != 2 for factor in DEGREES):
                raise ValueError(f"published must give name, azimuth: [., .], elevation: [., .], got {row}")
        self.others, self.published = others, published

    def __call__(self, subject: TrainedRun) -> Findings:
        """The errors, and accuracy by azimuth and elevation, of the run and the others."""
        subjects = [subject, *map(subject.other_run, self.others)]
        split_by = {_smallnorb(one).viewpoint for one in subjects}
        if len(split_by) > 1:
            names = " and ".join(sorted(f"dataset.viewpoint={one or 'null'}" for one in split_by))
            raise UserError(f"study.others: the runs must be trained on the same views, got {names}")
        (viewpoint,) = split_by
        seen = [_seen(one) for one in subjects]
        runs = [_numbers(one, viewpoint) for one in seen]
        numbers = {**{key: value for key, value in runs[0].items() if key != "run"}, "runs": runs}
        if viewpoint is not None:
            numbers["published"] = [
                {"name": row["name"], viewpoint: row[viewpoint]} for row in self.published
            ]
            differences = [abs(run["familiar_error"] - runs[0]["familiar_error"]) for run in runs[1:]]
            numbers |= {"largest_familiar_difference": max(differences)} if differences else {}
        table = _table(runs, self.published, viewpoint)
        return Findings(numbers, {"viewpoints": _drawn(seen, viewpoint)}, table)


def _smallnorb(subject: TrainedRun) -> SmallNORB:
    dataset = subject.components.dataset
    if not isinstance(dataset, SmallNORB):
        raise UserError(
            f"study=viewpoints is for runs on smallnorb, whose views are known; {subject.path} is one on "
            f"{dataset.name}"
        )
    return dataset


def _seen(subject: TrainedRun) -> Seen:
    everything = _smallnorb(subject).with_test_views("all")
    split, factors = everything.read("test"), everything.factors("test")
    right = [
        (output.scores.argmax(1) == batch.labels).cpu()
        for batch, output in subject.outputs(split, description=subject.path.name)
    ]
    parameters = sum(parameter.numel() for parameter in subject.model.parameters())
    return Seen(subject.path.name, parameters, torch.cat(right), factors[subject.sampled(split.size)])


def _numbers(seen: Seen, viewpoint: str | None) -> dict[str, Any]:
    everywhere = torch.ones_like(seen.right)
    numbers: dict[str, Any] = {"run": seen.name, "parameters": seen.parameters, "pictures": len(seen.right)}
    numbers["error"] = seen.error(everywhere)
    if viewpoint is not None:
        codes = seen.factors[:, FACTORS.index(viewpoint)]
        familiar = torch.isin(codes, torch.tensor(FAMILIAR[viewpoint]))
        numbers |= {"familiar_error": seen.error(familiar), "novel_error": seen.error(~familiar)}
    return numbers | {f"accuracy_by_{factor}": seen.accuracy_by(factor) for factor in DEGREES}


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


def _drawn(seen: Sequence[Seen], viewpoint: str | None) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    polar, line = figure.add_subplot(121, projection="polar"), figure.add_subplot(122)
    for one in seen:
        around = one.accuracy_by("azimuth")
        closed = [*around.items(), *list(around.items())[:1]]
        polar.plot([math.radians(at) for at, _ in closed], [value for _, value in closed], "o-", ms=3)
        up = one.accuracy_by("elevation")
        line.plot([*up], [*up.values()], "o-", ms=3, label=f"{one.name} ({one.parameters:,} parameters)")
    lowest = min(value for one in seen for factor in DEGREES for value in one.accuracy_by(factor).values())
    floor = max(0.0, math.floor(10 * lowest - 0.5) / 10)
    polar.set_ylim(floor, 1)
    polar.tick_params(axis="y", labelsize=7)
    polar.set_title("accuracy by azimuth, degrees")
    line.set(title="accuracy by elevation", xlabel="degrees above the horizon", ylim=(floor, 1.01))
    shaded: dict[str, Any] = {"color": "tab:green", "alpha": 0.12, "lw": 0}
    if viewpoint == "azimuth":
        polar.bar(math.radians(350), 1 - floor, math.radians(120), floor, label="views of training", **shaded)
        polar.legend(loc="lower left", bbox_to_anchor=(-0.3, -0.12), fontsize=8)
    elif viewpoint == "elevation":
        line.axvspan(27.5, 42.5, label="views of training", **shaded)
    line.legend(fontsize=8)
    return figure
