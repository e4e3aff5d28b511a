"""The tables of docs/results.md and of README.md; every number of them comes from runs.json."""

import shlex
from collections.abc import Iterator, Sequence

from page_parts import NONE, table

from results_page.groups import (
    Group,
    duration,
    gap,
    groups,
    machine,
    of_row,
    ours,
    paper,
    recipe,
    seeds,
    tested_weights,
    time,
    training,
)
from results_page.store import Data, Record

BEST_ROWS = 6
"""Rows of README's table."""
HASH_LETTERS = 12
"""Letters of a checksum that the page shows."""
COLUMNS = (
    *("dataset", "row", "paper, %", "goal, %", "ours, %", "gap", "training", "time of training, machine"),
    *("seeds", "recipe", "runs", "weights"),
)


def headlines(data: Data) -> str:
    """Return the table of the papers' headline rows, ours beside them, and what to keep in mind."""
    found, lines = groups(data), []
    for headline in data["headlines"]:
        source = f" ({headline['paper']})" if headline["paper"] else ""
        first = [headline["dataset"], headline["title"], paper(headline) + source, _goal(headline)]
        beside = [*of_row(found, headline["row"])]
        lines += [[*first, *_cells(group, headline)] for group in beside]
        if not beside:
            lines.append([*first, "no long run yet", *[NONE] * (len(COLUMNS) - len(first) - 1)])
    return "\n".join([table(COLUMNS, lines), *_remarks(data)])


def _goal(headline: Record) -> str:
    return NONE if headline["goal"] is None else f"{headline['goal']:g}"


def _cells(group: Group, headline: Record) -> list[str]:
    return [
        f"**{ours(group)}**",
        gap(group, headline),
        training(group),
        time(group),
        seeds(group),
        recipe(group),
        _numbers(group),
        group.distinct(tested_weights),
    ]


def _numbers(group: Group) -> str:
    return ", ".join(map(str, group.numbers))


def _remarks(data: Data) -> Iterator[str]:
    """Yield what the stars mean, notes on rows, and the caveats of the datasets of kept runs."""
    if any(headline["chosen_on_test"] for headline in data["headlines"]):
        yield "\\* The paper or its code chose the epoch or the run by test images.\n"
    for headline in data["headlines"]:
        if headline["note"]:
            yield f"- {headline['dataset']}, {headline['title']}: {headline['note']}"
    caveats: dict[str, list[int]] = {}
    for number, run in enumerate(data["runs"], 1):
        for line in run["caveats"] if run["kept"] else ():
            caveats.setdefault(line, []).append(number)
    for line, numbers in caveats.items():
        yield f"- Runs {', '.join(map(str, numbers))}: {line}"
    yield ""


def errors(data: Data) -> str:
    """Return the errors by class and by toy of the groups beside headline rows, a table for each dataset."""
    beside = [group for group in groups(data) if group.first["row"] and group.first["kept"]]
    datasets = dict.fromkeys(group.first["dataset"] for group in beside)
    parts = []
    for dataset in datasets:
        same = [group for group in beside if group.first["dataset"] == dataset]
        for field, kind in (("classes", "class"), ("groups", _kind(same))):
            if having := [group for group in same if group.first[field]]:
                parts.append(f"**{dataset}: errors by {kind}, %**\n\n{_by_name(having, field, kind)}")
    return "\n".join(parts) if parts else "No run yet.\n"


def _kind(same: Sequence[Group]) -> str:
    return next((group.first["group"] for group in same if group.first["group"]), "group")


def _by_name(having: Sequence[Group], field: str, kind: str) -> str:
    names = dict.fromkeys(name for group in having for name, _, _ in group.first[field])
    means = [_means(group, field) for group in having]
    lines = [[name, *(f"{mean[name]:.2f}" if name in mean else NONE for mean in means)] for name in names]
    return table([kind, *(f"`{group.first['recipe']}`, {_runs(group)}" for group in having)], lines)


def _runs(group: Group) -> str:
    return f"run{'s' * (len(group.numbers) > 1)} {_numbers(group)}"


def _means(group: Group, field: str) -> dict[str, float]:
    shares: dict[str, list[float]] = {}
    for run in group.records:
        for name, wrong, images in run[field]:
            if images:
                shares.setdefault(name, []).append(100 * wrong / images)
    return {name: sum(values) / len(values) for name, values in shares.items()}


def all_runs(data: Data) -> str:
    """Return the table of every run whose directory was kept."""
    lines = [_run(number, run) for number, run in enumerate(data["runs"], 1) if run["kept"]]
    titles = (
        *("run", "command", "test error, %", "other weights, %", "training", "with validation and test"),
        *("date", "commit", "machine, torch", "parameters", "sha256 of metrics.jsonl"),
    )
    return table(titles, lines) if lines else "No run yet.\n"


def _run(number: int, run: Record) -> list[str]:
    others = [f"{test['error']:.2f} ({_place(test)})" for test in run["other_tests"]]
    commit = (
        NONE if run["commit"] is None else f"{run['commit'][:HASH_LETTERS]}{', changed' * bool(run['dirty'])}"
    )
    return [
        str(number),
        f"`{command(run)}`",
        ours(Group((run,), (number,))),
        "; ".join(others) or NONE,
        _seconds(run["training_seconds"]),
        _seconds(run["wall_seconds"]),
        run["date"] or NONE,
        commit,
        ", ".join(part for part in (machine(run), run["torch"]) if part) or NONE,
        NONE if run["parameters"] is None else f"{run['parameters']:,}",
        NONE if run["sha256"] is None else f"`{run['sha256'][:HASH_LETTERS]}`",
    ]


def _place(test: Record) -> str:
    crops = "" if test["crops"] == 1 else f", {test['crops']} crops"
    return f"{test['weights']}, step {test['step']}{crops}"


def _seconds(seconds: float | None) -> str:
    return NONE if seconds is None else duration(seconds)


def command(run: Record) -> str:
    """Return the command that trains a run again."""
    seed = [] if run["seed"] is None else [f"seed={run['seed']}"]
    return shlex.join(["capsexp", "train", f"experiment={run['recipe']}", *run["overrides"], *seed])


def earlier(data: Data) -> str:
    """Return the table of short runs whose directories were not kept."""
    rows = {headline["row"]: headline for headline in data["headlines"]}
    lines = []
    for group in groups(data):
        if not group.first["kept"]:
            headline = rows.get(group.first["row"])
            lines.append(
                [
                    f"`{' '.join([group.first['recipe'], *group.first['overrides']])}`",
                    NONE if headline is None else paper(headline),
                    ours(group),
                    training(group),
                    time(group),
                    seeds(group),
                    group.distinct(tested_weights),
                    group.distinct(lambda run: run["note"] or ""),
                ]
            )
    titles = ("recipe", "paper, %", "ours, %", "training", "time, machine", "seeds", "weights", "remarks")
    return table(titles, lines) if lines else "No run.\n"


def readme(data: Data) -> str:
    """Return README's table: the best group beside each headline row, of the rows nearest to their papers."""
    found = groups(data)
    best = [(headline, _best(found, headline["row"])) for headline in data["headlines"]]
    rows = [(headline, group) for headline, group in best if group and headline["error"] is not None]
    rows.sort(key=lambda pair: (not pair[1].first["kept"], _ratio(*pair)))
    chosen = rows[:BEST_ROWS]
    chosen.sort(key=lambda pair: data["headlines"].index(pair[0]))
    lines = [
        [
            f"{headline['dataset']}: {headline['title']}",
            paper(headline),
            f"**{ours(group)}**",
            training(group),
            time(group),
            recipe(group),
        ]
        for headline, group in chosen
    ]
    titles = ("row", "paper, %", "ours, %", "our training", "time of training, machine", "recipe")
    return table(titles, lines)


def _best(found: Sequence[Group], row: str) -> Group | None:
    """Return the group with the lowest error beside a row; of runs that were not kept only without others."""
    tested = [group for group in found if group.first["row"] == row and group.main_error is not None]
    return min(tested, key=lambda group: (not group.first["kept"], _error(group)), default=None)


def _error(group: Group) -> float:
    assert group.main_error is not None
    return group.main_error.mean


def _ratio(headline: Record, group: Group) -> float:
    return _error(group) / headline["error"]
