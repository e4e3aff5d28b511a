"""Costs, intervals over toys, gaps to a baseline and folds in tables, curves and the report."""

import csv
import io
import json

import pytest

from capsexp.compare import report, tables
from capsexp.compare.comparison import compare
from capsexp.compare.curves import TIME_TAGS, learning_curves, mean_over_seeds
from capsexp.compare.find import find_all
from capsexp.compare.means import Spread
from capsexp.compare.runs import read_all
from capsexp.errors import Notes

CLASSES = ("a", "b")


def content(errors):
    """A file of errors: two toys of 50 images in each of two classes."""
    groups = [
        {"name": f"{name} {toy}", "class": name, "images": 50, "errors": errors[2 * place + toy]}
        for place, name in enumerate(CLASSES)
        for toy in range(2)
    ]
    classes = [
        {"name": name, "images": 100, "errors": sum(errors[2 * place : 2 * place + 2])}
        for place, name in enumerate(CLASSES)
    ]
    counts = [entry["errors"] for entry in classes]
    confusion = [[100 - counts[0], counts[0]], [counts[1], 100 - counts[1]]]
    return {
        **{"split": "test", "images": 200, "errors": sum(errors), "classes": classes},
        **{"group": "toy", "groups": groups, "confusion": confusion},
    }


@pytest.fixture
def notes():
    return Notes()


@pytest.fixture
def write_tested(write_run):
    """`write_tested(NAME, ROUTING, SEED, ERRORS)`: a finished run whose test got so many images wrong."""

    def write(name, routing, seed, errors, *, costs=(1000, 20_000_000), settings=(), **fields):
        numbers = {"parameters": costs[0], "multiplications": costs[1], "peak_memory": 300 * 2**20}
        path = write_run(
            name,
            {"seed": seed, "trainer.batch_size": 64, "routing.kind": routing, **dict(settings)},
            test=1 - sum(errors) / 200,
            choices={"model": "small", "dataset": "toys", "routing": routing},
            costs=numbers,
            training_seconds=6.0,
            **fields,
        )
        (path / "test_errors.json").write_text(json.dumps(content(errors)))
        return path

    return write


@pytest.fixture
def league(write_tested, tmp_path, notes):
    """Two routings of two seeds each, at equal images."""
    for seed in (0, 1):
        write_tested(f"em-{seed}", "em", seed, (2, 4 + seed, 1, 1))
        write_tested(f"uniform-{seed}", "uniform", seed, (4, 6 + seed, 3, 3), costs=(900, 3_000_000))
    return lambda: read_all(find_all([tmp_path], notes), notes)


def column(comparison, name):
    return {row.cells["routing"]: row.cells.get(name) for row in comparison.rows}


def test_costs_are_columns_where_they_differ(league, notes):
    table = compare(league(), notes, group_by=["seed"])
    assert column(table, "parameters") == {
        "em": Spread(1000.0, 0.0, 2),
        "uniform": Spread(900.0, 0.0, 2),
    }
    assert column(table, "images_per_second")["em"].mean == 30 * 64 / 6
    text = tables.markdown(table)
    assert "| parameters | multiplications | images/s (n) | peak memory (n) |" in text
    assert "| 1,000 | 20M | 320 ± 0 (2) | 300 MiB ± 0 MiB (2) |" in text
    alike = compare([run for run in league() if run.parameters == 900], notes)
    assert "parameters" not in [column.name for column in alike.columns]
    sorted_by = compare(league(), notes, group_by=["seed"], sort_by="multiplications")
    assert [row.cells["routing"] for row in sorted_by.rows] == ["uniform", "em"]


def test_an_older_run_has_no_speed(write_run, notes, tmp_path):
    write_run("one", {"trainer.batch_size": 64})
    (run,) = read_all(find_all([tmp_path], notes), notes)
    assert run.images_per_second is None
    assert run.parameters is None


def test_the_test_error_has_an_interval_over_toys(league, notes):
    table = compare(league(), notes, group_by=["seed"])
    interval = column(table, "test/error_over_groups")["em"]
    assert interval.mean == pytest.approx(100 * 8.5 / 200)
    assert interval.low < interval.mean < interval.high
    rows = list(csv.DictReader(io.StringIO(tables.csv_text(table))))
    assert float(rows[0]["test/error_over_groups.low"]) == interval.low
    assert json.loads(tables.json_text(table))[0]["test/error_over_groups.high"] == interval.high
    assert f"4.25 [{interval.low:.2f}, {interval.high:.2f}]" in tables.markdown(table)


def test_the_gap_to_a_baseline_is_paired_over_toys(league, notes):
    table = compare(league(), notes, group_by=["seed"], baselines=["uniform"])
    gap = column(table, "test/gap_to_uniform")
    assert gap["uniform"] is None
    assert gap["em"].mean == pytest.approx(-4)  # 8 of 200 images fewer, 2 on every toy
    assert (gap["em"].low, gap["em"].high) == pytest.approx((-4, -4))
    assert "gap to uniform, points [95 %]" in tables.markdown(table)
    by_run = compare(league(), notes, baselines=["uniform"])
    assert sum("test/gap_to_uniform" in row.cells for row in by_run.rows) == 2
    assert notes == Notes()


def test_a_setting_names_a_baseline_too(league, notes):
    table = compare(league(), notes, group_by=["seed"], baselines=["routing.kind=uniform"])
    assert column(table, "test/gap_to_routing.kind=uniform")["em"].mean == pytest.approx(-4)


def test_without_toys_a_gap_has_no_interval(league, notes, tmp_path):
    (tmp_path / "em-0" / "test_errors.json").unlink()
    table = compare(league(), notes, group_by=["seed"], baselines=["uniform"])
    gap = column(table, "test/gap_to_uniform")["em"]
    assert (gap.mean, gap.low, gap.high) == (pytest.approx(-4), None, None)
    assert column(table, "test/error_over_groups")["em"] is None


def test_gaps_are_at_equal_images_or_at_equal_time(league, write_tested, notes):
    for routing, errors in (("em", (1, 1, 1, 1)), ("uniform", (9, 9, 9, 9))):
        timed = {"trainer.max_seconds": 60}
        write_tested(f"{routing}-timed", routing, 0, errors, settings=timed, step=10 + len(routing))
    write_tested("em-longer", "em", 0, (0, 0, 0, 0), step=60, total=60)
    table = compare(league(), notes, baselines=["uniform"])
    gaps = {row.runs[0].path.name: row.cells.get("test/gap_to_uniform") for row in table.rows}
    assert gaps["em-timed"].mean == pytest.approx(-16)
    assert gaps["em-0"].mean == pytest.approx(-4.25)
    assert gaps["em-longer"] is None


def test_a_baseline_has_the_same_images(league, write_tested, notes):
    """Another row of the same choice, on other crops, is no baseline and does not make it unclear."""
    write_tested("uniform-crops", "uniform", 0, (9, 9, 9, 9), settings={"dataset.validation": 0.3})
    table = compare(league(), notes, baselines=["uniform"])
    gaps = {row.runs[0].path.name: row.cells.get("test/gap_to_uniform") for row in table.rows}
    assert gaps["em-0"].mean == pytest.approx(-4.25)
    assert notes == Notes()


def test_a_baseline_that_no_run_has_and_one_that_is_not_clear(league, write_tested, notes):
    compare(league(), notes, baselines=["unifrm", "routing.kid=em"])
    assert notes.errors[0] == "--baseline: no run has unifrm"
    assert notes.errors[1].startswith("--baseline: unknown key 'routing.kid': did you mean")
    write_tested("uniform-other", "uniform", 0, (9, 9, 9, 9), settings={"loss.weight_decay": 0.1})
    notes = Notes()
    compare(league(), notes, group_by=["seed"], baselines=["uniform"])
    assert any("differ in more than the seed" in line for line in notes.warnings)


@pytest.fixture
def folds(write_run, tmp_path, notes):
    """A routing on five folds, of two seeds on one of them; fold 9 is far below the others."""
    for fold, accuracies in {4: (0.8,), 6: (0.7, 0.8), 7: (0.9,), 8: (0.85,), 9: (0.5,)}.items():
        for seed, accuracy in enumerate(accuracies):
            path = write_run(
                f"fold-{fold}-{seed}",
                {"dataset.validation_instance": fold, "seed": seed},
                validation=[0.1, 0.9],
            )
            with open(path / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": 30, "validation/balanced_accuracy": accuracy}) + "\n")
    write_run("all", {"dataset.validation_instance": None})
    return read_all(find_all([tmp_path], notes), notes)


def test_folds_are_a_row_with_the_fifth_beside_the_mean_of_four(folds, notes):
    table = compare(folds, notes, folds=True)
    (row,) = table.rows
    assert len(row.runs) == 6
    four = row.cells["validation/folds_4_6_7_8"]
    assert (four.mean, four.n) == (pytest.approx((0.8 + 0.75 + 0.9 + 0.85) / 4), 4)
    assert row.cells["validation/fold_9"] == Spread(0.5, None, 1)
    assert "| folds 4, 6, 7, 8 (n) | fold 9 (n) |" in tables.markdown(table)


def test_older_runs_have_the_balanced_accuracy_in_their_errors(folds, notes, tmp_path):
    run = next(run for run in folds if run.path.name == "fold-9-0")
    (run.path / "metrics.jsonl").write_text("")
    (run.path / "validation_errors.json").write_text(json.dumps({"last": content((20, 20, 0, 0))}))
    (row,) = compare(folds, notes, folds=True).rows
    assert row.cells["validation/fold_9"].mean == pytest.approx(0.8)


def test_folds_need_runs_with_toys_held_out(league, notes):
    assert compare(league(), notes, folds=True).rows == []
    assert notes.errors == ["--folds: no run has a toy held out, dataset.validation_instance=4"]


def test_curves_over_the_seconds_of_training(write_run, notes, tmp_path):
    for seed, pace in ((0, 1.0), (1, 2.0)):
        path = write_run(str(seed), {"seed": seed}, validation=[0.5, 0.75, 1.0])
        lines = [{"step": step, "training_seconds": pace * step} for step in (10, 30)]
        (path / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    means = mean_over_seeds(compare(read_all(find_all([tmp_path], notes), notes), notes), notes)
    (curve,) = learning_curves(means, TIME_TAGS, notes, x_axis="seconds")
    # Step 20 is not in the file: it is halfway between the two that are.
    assert [(point.x, point.mean) for point in curve.points["validation/error"]] == [
        (15, 50),
        (30, 25),
        (45, 0),
    ]
    assert [point.mean for point in curve.points["train/error"]] == [50, 50, 50]
    assert notes == Notes()


def test_a_run_without_a_clock_has_no_points_over_time(write_run, notes, tmp_path):
    write_run("old", validation=[0.5])
    means = mean_over_seeds(compare(read_all(find_all([tmp_path], notes), notes), notes), notes)
    assert learning_curves(means, TIME_TAGS, notes, x_axis="seconds") == []


def test_the_figure_of_errors_over_time(league, capsexp, tmp_path):
    file = tmp_path / "time.png"
    code, _, error = capsexp("compare", tmp_path, "--plot", file, "--x-axis", "seconds")
    assert code == 0
    assert not file.exists()  # no run has a clock
    for name in ("em-0", "em-1"):
        (tmp_path / name / "timing.jsonl").write_text('{"step": 10, "training_seconds": 4.5}\n')
    code, _, error = capsexp("compare", tmp_path, "--plot", file, "--x-axis", "seconds")
    assert code == 0
    assert file.stat().st_size > 1000
    assert f"curves: {file}" in error


def test_a_stopped_run_is_named_with_the_command_that_resumes_it(write_run, capsexp, tmp_path):
    path = write_run("stopped", status="interrupted", step=12)
    (path / ".hydra").mkdir()
    (path / ".hydra" / "overrides.yaml").write_text("- routing.iterations=3\n- run=elsewhere\n")
    code, out, _ = capsexp("compare", path)
    command = f"capsexp train routing.iterations=3 run={path}"
    assert code == 0
    assert out.splitlines()[-1] == f"stopped has stopped at step 12 of 30; resume it with: {command}"
    capsexp("report", path, "-o", tmp_path / "page.html")
    assert command in (tmp_path / "page.html").read_text()


def test_the_report_shows_errors_by_class_and_toy(league, notes, tmp_path):
    page = tmp_path / "page.html"
    report.write(page, compare(league(), notes), ("train/loss",), notes)
    text = page.read_text()
    assert "Test errors by class and toy" in text
    assert '<th scope="col">a 1</th>' in text
    assert '<td class="number" style="--heat: 13%">9.0</td>' in text  # em on a 1: 4 and 5 of 50
    assert "1,000" in text  # the parameters


def test_the_report_shows_toys_held_out(folds, notes, tmp_path):
    page = tmp_path / "page.html"
    report.write(page, compare(folds, notes), ("train/loss",), notes)
    assert "Toys held out" in page.read_text()
    assert "fold 9" in page.read_text()


def test_a_report_without_errors_by_class_has_no_such_table(write_run, notes, tmp_path):
    write_run("one")
    report.write(
        tmp_path / "page.html",
        compare(read_all(find_all([tmp_path], notes), notes), notes),
        ("train/loss",),
        notes,
    )
    assert 'class="heat"' not in (tmp_path / "page.html").read_text()
