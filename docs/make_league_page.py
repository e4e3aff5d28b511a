"""Write the tables and the figure of docs/league.md from finished runs, through docs/league.json.

    python docs/make_league_page.py FOLDER… [--alone FOLDER]  # read runs; write data, page and figure
    python docs/make_league_page.py            # write page and figure again from the data
    python docs/make_league_page.py --check    # exit code 1 if the page does not equal the data

Every number of the tables comes from docs/league.json, which this script writes. The page has text of its own
outside of the two markers. The runs below the folder after --alone had the machine to themselves: the speed
of a recipe, and the seconds in the figure, come from them where they exist.
"""

import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from page_parts import NONE, few, plain, replace_part, rounded, table

from capsexp.compare.comparison import compare
from capsexp.compare.curves import COLOURS, OTHER_COLOUR, learning_curves, mean_over_seeds
from capsexp.compare.group_errors import test_errors
from capsexp.compare.intervals import Interval
from capsexp.compare.means import Row, Spread, spread
from capsexp.compare.measures import CHOSEN, FOLD, FOLDS
from capsexp.compare.runs import Run, read_below
from capsexp.compare.unfinished import resume_command
from capsexp.documents import read_json
from capsexp.errors import Notes, is_number
from capsexp.files import write_atomic
from capsexp.training.run_dir import RunDir

DOCS = Path(__file__).resolve().parent
DATA, PAGE, FIGURE = DOCS / "league.json", DOCS / "league.md", DOCS / "images" / "league.png"
COMMAND = "python docs/make_league_page.py"
BASELINES = ("uniform", "pool")
CONFUSION = DOCS / "images" / "league-toy-9.png"
ODD_FOLD = 9
CURVE = "validation/error"

# Published test errors on smallNORB in %, by the end of a recipe's name: of larger networks or longer
# trainings than ours, beside our rows for orientation only.
EM, BEST = "parameters, full length; Hinton et al. 2018", "chosen on test images"
PUBLISHED = {
    "em_r1": f"9.7 (310K {EM})",
    "em_r2": f"2.2 (310K {EM})",
    "em_r3": f"2.2 (68K {EM})",
    "em": f"2.2 (310K {EM})",
    "cnn": f"5.2 (4.2M {EM})",
    "vb": "1.3 (169K parameters, 300 epochs; the authors' README)",
    "heinsen": f"0.9 (272K parameters at 96x96, the best of ten trainings, {BEST}; Heinsen 2019)",
    "cluster": f"1.57 ({BEST}; the authors' README)",
}
PUBLISHED |= {f"{name}_r3": PUBLISHED[name] for name in ("vb", "heinsen")}


def collect(folders: Sequence[Path], notes: Notes, alone: Sequence[Path] = ()) -> dict[str, Any]:
    """Return what the page shows of the league's runs at or below some folders.

    Args:
        folders: of the runs.
        notes: takes the warnings.
        alone: folders of short runs for speed, one at a time on a quiet machine.
    """
    speeds = _speeds(alone, notes)
    runs = [
        run for run in read_below(folders, notes) if run.choices.get("experiment", "").startswith("league_")
    ]
    final = [run for run in runs if run.settings.get(FOLD) is None]
    choices = {choice for run in final for choice in run.choices.values()}
    baselines = [name for name in BASELINES if name in choices]
    compared = compare(final, notes, group_by=["seed"], baselines=baselines, sort_by="test")
    folds = {_key(row): row for row in compare(runs, Notes(), folds=True).rows}
    rows = [_row(row, folds.pop(_key(row), None), notes) for row in compared.rows]
    rows += [_row(row, row, notes) for row in folds.values()]  # held out only: no test yet
    for row in rows:
        if row["recipe"] in speeds:
            row["measures"]["images_per_second"] = {"mean": rounded(speeds[row["recipe"]]), "n": 1}
    return {
        "rows": sorted(rows, key=_order),
        "curves": _curves(runs, speeds, notes),
        "odd_fold": _odd_fold(runs),
    }


def _odd_fold(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the confusion of the last validation of each recipe with toy `ODD_FOLD` held out."""
    found = []
    for run in runs:
        errors = run.path / "validation_errors.json"
        if run.settings.get(FOLD) == ODD_FOLD and errors.exists():
            last = read_json(errors)["last"]
            names = [part["name"] for part in last["classes"]]
            recipe = run.choices["experiment"]
            found.append({"recipe": recipe, "classes": names, "confusion": last["confusion"]})
    return found


def _speeds(folders: Sequence[Path], notes: Notes) -> dict[str, float]:
    """Return the training images per second of each recipe."""
    runs = read_below(folders, notes) if folders else []
    measured = [(run.choices.get("experiment", ""), run.images_per_second) for run in runs]
    return {recipe: speed for recipe, speed in measured if speed is not None}


def _key(row: Row) -> tuple[str, str]:
    run = row.runs[0]
    return run.choices["experiment"], _budget(run)


def _budget(run: Run) -> str:
    seconds = run.settings.get("trainer.max_seconds")
    if is_number(seconds):
        return f"{seconds / 60:g} minutes of training"
    steps, batch = run.settings.get("trainer.max_steps"), run.settings.get("trainer.batch_size")
    return f"{steps * batch:,} images" if is_number(steps) and is_number(batch) else "its own length"


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    error = row["measures"].get("test/error", {}).get("mean")
    return (row["dataset"], row["budget"], error is None, error, row["recipe"])


def _row(row: Row, folds: Row | None, notes: Notes) -> dict[str, Any]:
    """Return the values of a row, as JSON has them. A row that is its own `folds` has no test."""
    first, tested = row.runs[0], row.counted if row is not folds else ()
    cells = {name: value for name, value in row.cells.items() if tested or not name.startswith("test/")}
    if folds is not None:
        cells |= {column.name: folds.cells.get(column.name) for column in FOLDS}
    measures = {name: plain(value) for name, value in cells.items() if isinstance(value, Spread | Interval)}
    if error := [100 - 100 * run.test for run in tested if run.test is not None]:
        measures["test/error"] = plain(spread(error))
    errors = [found for run in tested if (found := test_errors(run.path, run.test, notes)) is not None]
    return {
        "recipe": first.choices["experiment"],
        "dataset": first.choices.get("dataset", ""),
        "budget": _budget(first),
        "routing": first.choices.get("routing"),
        "model": first.choices.get("model"),
        "seeds": sorted({run.settings["seed"] for run in row.counted if "seed" in run.settings}),
        "measures": measures,
        "entropies": _entropies(tested),
        "classes": _means_by_name([found.classes for found in errors]),
        "toys": _means_by_name([found.groups for found in errors]),
        "machine": sorted({_machine(run) for run in row.runs}),
        "command": _command(first),
        "status": row.cells["status"],
        "resume": [command for run in row.runs if (command := resume_command(run)) is not None],
    }


def _entropies(runs: Sequence[Run]) -> list[float]:
    """Return the coupling's entropy in the test, as a share of its maximum, by layer: means over runs."""
    found = []
    for run in runs:
        lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        last = next(
            (metrics for line in reversed(lines) if "test/accuracy" in (metrics := json.loads(line))), {}
        )
        found.append([value for name, value in last.items() if name.startswith("test/coupling_entropy/")])
    return [rounded(sum(layer) / len(layer)) for layer in zip(*found, strict=False)]


def _command(run: Run) -> str:
    """Return the command of a row, without what differs between its runs."""
    varied = ("seed=", f"{FOLD}=")
    overrides = [text for text in RunDir(run.path).overrides() if not text.startswith(varied)]
    return shlex.join(["capsexp", "train", *overrides])


def _means_by_name(runs: Sequence[Iterable[Any]]) -> dict[str, int | float]:
    """Return the error of each class or toy in %, averaged over runs."""
    shares: dict[str, list[float]] = {}
    for parts in runs:
        for part in parts:
            if part.images:
                shares.setdefault(part.name, []).append(100 * part.errors / part.images)
    return {name: rounded(sum(values) / len(values)) for name, values in shares.items()}


def _machine(run: Run) -> str:
    try:
        found = read_json(run.path / "env.json")
        return f"{found['device']}, {found['cores']} cores, torch {found['versions']['torch']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "unknown"


def _curves(runs: Sequence[Run], speeds: Mapping[str, float], notes: Notes) -> list[dict[str, Any]]:
    """Return the validation error of each recipe by seconds of training, a mean over seeds and folds.

    Of the folds 4, 6, 7 and 8 those count that every recipe has, since toys differ.

    Args:
        runs: of the league.
        speeds: images per second; the seconds of a recipe without are those of its runs.
        notes: takes the warnings.
    """
    held_out = [run for run in runs if run.settings.get(FOLD) in CHOSEN]
    if not held_out:
        return []
    by_recipe: dict[str, set[Any]] = {}
    for run in held_out:
        by_recipe.setdefault(run.choices["experiment"], set()).add(run.settings[FOLD])
    common = set.intersection(*by_recipe.values())
    held_out = [run for run in held_out if run.settings[FOLD] in common]
    means = mean_over_seeds(compare(held_out, notes, folds=True), notes)
    by_seconds = learning_curves(means, (CURVE,), Notes(), x_axis="seconds")
    by_step = learning_curves(means, (CURVE,), Notes())
    found = []
    for curve, steps in zip(by_seconds, by_step, strict=True):
        run, scale = curve.runs[0], 1.0
        if (speed := speeds.get(run.choices["experiment"])) is not None:
            curve, scale = steps, run.settings["trainer.batch_size"] / speed
        points = [[rounded(scale * point.x), rounded(point.mean)] for point in few(curve.points[CURVE])]
        found.append({"label": run.choices["experiment"], "points": points})
    return found


def tables(data: Mapping[str, Any]) -> str:
    """Return the part of the page between the markers."""
    if not data["rows"]:
        return "No row has run yet.\n"
    by_table = groupby(data["rows"], key=lambda row: (row["dataset"], row["budget"]))
    parts = [part for _, rows in by_table for part in _table([*rows])]
    if data["curves"]:
        parts.append("![Error on toys held out against seconds of training](images/league.png)\n")
    if data.get("odd_fold"):
        recipe = data["odd_fold"][0]["recipe"]
        parts.append(f"![Classes predicted for toy {ODD_FOLD}](images/{CONFUSION.name})\n")
        parts.append(
            f"*Toy {ODD_FOLD} of each class held out: images by class and predicted class, `{recipe}`.*\n"
        )
    return "\n".join([*parts, *_conditions(data["rows"])])


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the tables of one dataset and budget: errors and costs, then errors by class."""
    yield f"**{rows[0]['dataset']}, {rows[0]['budget']}**\n"
    columns = [column for column in COLUMNS if any(column[1](row) != NONE for row in rows)]
    yield table([title for title, _ in columns], [[cell(row) for _, cell in columns] for row in rows])
    for kind, title in (("classes", "class"), ("toys", "test toy")):
        names = list(dict.fromkeys(name for row in rows for name in row[kind]))
        lines = [
            [_name(row), *(f"{row[kind][name]:.1f}" if name in row[kind] else NONE for name in names)]
            for row in rows
        ]
        if names:
            yield f"Errors by {title}, %:\n"
            yield table(["row", *names], lines)


def _name(row: Mapping[str, Any]) -> str:
    return f"`{row['recipe']}`"


def _measure(name: str, form: str, scale: float = 1.0) -> Any:
    """Return the function that shows a measure of a row: mean ± deviation (n), or mean [low, high]."""

    def shown(row: Mapping[str, Any]) -> str:
        found = row["measures"].get(name)
        if not found:
            return NONE
        text = form.format(found["mean"] * scale)
        if "low" in found:
            return f"{text} [{form.format(found['low'] * scale)}, {form.format(found['high'] * scale)}]"
        if found.get("sd"):
            text += f" ± {form.format(found['sd'] * scale)}"
        return f"{text} ({found['n']})" if found.get("n", 1) > 1 and found.get("sd") else text

    return shown


COLUMNS = (
    ("row", _name),
    ("test error, %", _measure("test/error", "{:.2f}")),
    ("[95 %] over toys", _measure("test/error_over_groups", "{:.2f}")),
    ("gap to uniform", _measure("test/gap_to_uniform", "{:+.2f}")),
    ("gap to pool", _measure("test/gap_to_pool", "{:+.2f}")),
    ("accuracy on folds 4, 6, 7, 8, %", _measure("validation/folds_4_6_7_8", "{:.1f}", 100)),
    ("fold 9, %", _measure("validation/fold_9", "{:.1f}", 100)),
    (
        "coupling entropy by layer",
        lambda row: ", ".join(f"{value:.2f}" for value in row["entropies"]) or NONE,
    ),
    ("parameters", _measure("parameters", "{:,.0f}")),
    ("multiplications, million", _measure("multiplications", "{:.1f}", 1e-6)),
    ("images/s", _measure("images_per_second", "{:.0f}")),
    ("peak memory, MiB", _measure("peak_memory", "{:.0f}", 2.0**-20)),
    ("published, %", lambda row: PUBLISHED.get(row["recipe"].split("_", 2)[-1], NONE)),
    ("runs", lambda row: row["status"]),
)


def _conditions(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the commands, machines and seeds, and what is unfinished."""
    machines = sorted({machine for row in rows for machine in row["machine"]})
    yield f"Machine: {'; '.join(machines)}.\n"
    for row in rows:
        seeds = ", ".join(map(str, row["seeds"])) or "none finished"
        yield f"- {_name(row)}, {row['budget']}: `{row['command']}`, seeds {seeds}"
        for command in row["resume"]:
            yield f"    - unfinished; `{command}` resumes it"
    yield ""


def page(data: Mapping[str, Any], before: str) -> str:
    """Return the page with the tables of the data between its markers."""
    return replace_part(before, "tables", tables(data), origin=PAGE.name)


def draw(data: Mapping[str, Any], file: Path) -> None:
    """Draw the error on toys held out against time, a line for each recipe."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for place, curve in enumerate(data["curves"]):
        seconds, errors = zip(*curve["points"], strict=True)
        colour = COLOURS[place] if place < len(COLOURS) else OTHER_COLOUR
        axes.plot(seconds, errors, color=colour, label=curve["label"].removeprefix("league_"))
    axes.set(xlabel="seconds of training", ylabel="error on toys held out, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    write_atomic(file, lambda opened: figure.savefig(opened, format="png", dpi=130))


def draw_confusion(entry: Mapping[str, Any], file: Path) -> None:
    """Draw images by class and predicted class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    axes = figure.subplots()
    shares = [[count / max(1, sum(row)) for count in row] for row in entry["confusion"]]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, counts in enumerate(entry["confusion"]):
        for column, count in enumerate(counts):
            dark = shares[row][column] > 0.5
            axes.text(column, row, str(count), ha="center", va="center", color="white" if dark else "black")
    places = range(len(entry["classes"]))
    axes.set_xticks(places, entry["classes"])
    axes.set_yticks(places, entry["classes"])
    axes.set(xlabel="predicted class", ylabel="class")
    write_atomic(file, lambda opened: figure.savefig(opened, format="png", dpi=130))


def main(arguments: Sequence[str]) -> None:
    """Write data, page and figure, or check the page."""
    if [*arguments] == ["--check"]:
        written = PAGE.read_text(encoding="utf-8")
        if page(read_json(DATA), written) != written:
            raise SystemExit(f"{PAGE.name} does not equal {DATA.name}: run `{COMMAND}`")
        return
    if arguments:
        notes = Notes()
        folders = [Path(argument) for argument in arguments]
        place = folders.index(Path("--alone")) if "--alone" in arguments else len(folders)
        data = collect(folders[:place], notes, folders[place + 1 :])
        notes.print_warnings()
        content = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
        write_atomic(DATA, lambda file: file.write(content.encode()))
    data = read_json(DATA)
    content = page(data, PAGE.read_text(encoding="utf-8"))
    write_atomic(PAGE, lambda file: file.write(content.encode()))
    if data["curves"]:
        draw(data, FIGURE)
    if data.get("odd_fold"):
        draw_confusion(data["odd_fold"][0], CONFUSION)


if __name__ == "__main__":
    main(sys.argv[1:])
