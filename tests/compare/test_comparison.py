import math
import time

import numpy as np
import pytest

from capsexp.compare.comparison import beside_paper, compare, row_label
from capsexp.compare.find import find_all
from capsexp.compare.means import Spread, spread
from capsexp.compare.runs import read_all
from capsexp.errors import Notes

VALIDATION, TEST = "validation/best_accuracy", "test/accuracy"


@pytest.fixture
def notes():
    return Notes()


@pytest.fixture
def sweep(write_run, tmp_path):
    """Two settings of three seeds each; the last run failed early, the last two lack a test accuracy."""
    for iterations in (1, 3):
        for seed in range(3):
            failed = {"status": "failed", "error": "X"} if (iterations, seed) == (3, 2) else {}
            test = None if iterations == 3 and seed else 0.3 + 0.01 * iterations + 0.001 * seed**2
            validation = [0.1, 0.4 + 0.01 * iterations + 0.002 * seed**2]
            settings = {"routing.iterations": iterations, "seed": seed}
            write_run(f"{iterations}-{seed}", settings, validation=validation, test=test, **failed)
    return read_all(find_all([tmp_path], Notes()), Notes())


def column(comparison, name):
    return [row.cells.get(name) for row in comparison.rows]


def names(comparison):
    return [row.runs[0].path.name for row in comparison.rows]


def test_rows_are_runs_with_settings_and_metrics(sweep, notes):
    found = compare(sweep, notes)
    titles = [column.title for column in found.columns]
    assert titles == ["iterations", "seed", "validation", "test", "steps", "time", "status", "run"]
    assert names(found) == ["3-2", "3-1", "3-0", "1-2", "1-1", "1-0"]
    assert column(found, "routing.iterations") == [3, 3, 3, 1, 1, 1]
    assert column(found, VALIDATION)[0] == max(run.best for run in sweep)
    assert column(found, TEST)[:2] == [None, None]
    assert column(found, "status") == ["failed", *["finished"] * 5]
    assert (found.order.title, found.descending, found.grouped_by) == ("validation", True, ())
    assert notes == Notes()


def test_means_over_seeds_match_numpy(sweep, notes):
    found = compare(sweep, notes, group_by=["seed"])
    assert found.grouped_by == ("seed",)
    assert column(found, "routing.iterations") == [3, 1]
    for row in found.rows:
        finished = [run for run in row.runs if run.status == "finished"]
        for name, values in (
            (VALIDATION, [run.best for run in finished]),
            (TEST, [run.test for run in finished]),
        ):
            present = np.array([value for value in values if value is not None])
            cell = row.cells[name]
            assert cell.n == len(present)
            assert cell.mean == pytest.approx(present.mean(), rel=1e-12)
            if cell.n > 1:
                assert cell.sd == pytest.approx(present.std(ddof=1), rel=1e-12)
    assert (found.rows[0].cells[TEST].n, found.rows[0].cells[TEST].sd) == (1, None)
    assert column(found, "status") == ["2 finished, 1 failed", "3 finished"]
    assert notes == Notes()


def test_averaging_over_all_differing_settings_leaves_one_row(sweep, notes):
    for over in (["seed", "iterations"], ["seed", "routing"]):
        (row,) = compare(sweep, notes, group_by=over).rows
        assert row.cells[VALIDATION].n == 5  # the sixth has failed
        assert row_label(row, compare(sweep, notes, group_by=over).columns) == ""


@pytest.mark.parametrize("status", ["failed", "interrupted", "running", "died", "strange"])
@pytest.mark.parametrize("over", ["seed", "routing"])
def test_only_finished_runs_enter_a_mean(status, over, write_run, notes, tmp_path):
    fields = {"status": "running", "host": "elsewhere"} if status == "died" else {"status": status}
    fields |= {"host": "elsewhere", "heartbeat": time.time()} if status == "running" else {}
    for number in range(3):
        write_run(f"{number}", {"seed": number, "routing.iterations": 1}, validation=[0.9])
    write_run("other", {"seed": 0, "routing.iterations": 2}, validation=[0.1], test=0.1, **fields)
    found = compare(read_all(find_all([tmp_path], notes), notes), notes, group_by=["seed", over])
    cells = [row.cells for row in found.rows]
    assert [cell.mean for row in cells for cell in [row.get(VALIDATION)] if cell] == [0.9]
    assert sum(row[VALIDATION].n for row in cells if VALIDATION in row) == 3
    assert not any(TEST in row for row in cells)
    shown = {"strange": "unknown"}.get(status, status)
    assert sum(f"1 {shown}" in row["status"] for row in cells) == 1
    assert all(run.status == "finished" for row in found.rows for run in row.counted)


@pytest.mark.parametrize("damage", ["{{{ no yaml", None, "[1]", "", "x: &x [*x]"])
def test_each_run_without_known_settings_has_its_own_row(damage, write_run, notes, tmp_path):
    for name in ("0", "1", "unknown", "lost"):
        path = write_run(name, {"seed": int(name) if name.isdigit() else 0}, validation=[0.5])
        if not name.isdigit() and damage is None:
            (path / "resolved_config.yaml").unlink()
        elif not name.isdigit():
            (path / "resolved_config.yaml").write_text(damage)
    found = compare(read_all(find_all([tmp_path], notes), notes), notes, group_by=["seed"])
    assert sorted(len(row.runs) for row in found.rows) == [1, 1, 2]
    assert {row.cells.get("settings") for row in found.rows} == {None, "unknown: unknown", "unknown: lost"}
    assert "settings" in [column.title for column in found.columns]


@pytest.mark.parametrize("version", ["0.0.1", None])
def test_runs_that_lack_a_setting_are_averaged_apart(version, write_run, notes, tmp_path):
    versions = {} if version is None else {"version": version}
    for seed in range(2):
        write_run(f"new{seed}", {"seed": seed, "loss.scale": 1.0}, validation=[0.9])
        write_run(f"old{seed}", {"seed": seed}, validation=[0.1], **versions)
    found = compare(read_all(find_all([tmp_path], notes), notes), notes, group_by=["seed"])
    assert sorted(cell.mean for cell in column(found, VALIDATION)) == [0.1, 0.9]
    if version:  # an earlier version may not know the setting: it makes no column of its own
        assert {*column(found, "settings")} == {None, "without loss.scale"}


def test_a_repeated_seed_counts_once_and_the_newest_finished_run_counts(write_run, notes, tmp_path):
    write_run("old", {"seed": 0}, validation=[0.1], started=1.0)
    write_run("new", {"seed": 0}, validation=[0.5], started=3.0)
    write_run("failed", {"seed": 0}, validation=[0.2], started=4.0, status="failed")
    write_run("other", {"seed": 1}, validation=[0.7], started=2.0)
    (row,) = compare(read_all(find_all([tmp_path], notes), notes), notes, group_by=["seed"]).rows
    assert (row.cells[VALIDATION].mean, row.cells[VALIDATION].n) == (0.6, 2)
    assert row.cells["status"] == "3 finished, 1 failed"
    assert len(row.runs) == 4
    assert [run.path.name for run in row.counted] == ["new", "other"]
    (line,) = notes.warnings
    assert line.startswith("of runs with equal seed only the newest finished one enters a mean; left out: ")
    assert line.endswith(f": {tmp_path}/old")


def test_runs_with_other_differences_are_not_averaged(sweep, write_run, notes, tmp_path):
    write_run("odd", {"routing.iterations": 3, "model.decoder.hidden": [9]}, validation=[0.9])
    runs = read_all(find_all([tmp_path], notes), notes)
    assert sorted(len(row.runs) for row in compare(runs, notes, group_by=["seed"]).rows) == [1, 3, 3]


@pytest.mark.parametrize(
    "values", [[1.0, 2.0, 4.0], [1e200, -1e200], [1.0, math.inf], [math.inf, -math.inf], [1e308, 1e308]]
)
def test_spread_matches_numpy(values):
    with np.errstate(all="ignore"):
        expected = np.mean(values), np.std(values, ddof=1)
    actual = spread(values)
    np.testing.assert_allclose([actual.mean, actual.sd], expected)


def test_last_values_of_tags_become_columns(sweep, notes):
    found = compare(sweep, notes, show=["train/loss", "validation/accuracy", TEST])
    titles = [column.title for column in found.columns]
    assert titles[-4:] == ["train/loss", "validation/accuracy", "status", "run"]
    assert column(found, "train/loss") == [1 / 3] * 6
    assert column(compare(sweep, notes, show=["train/loss"], group_by=["seed"]), "train/loss")[0] == Spread(
        1 / 3, 0.0, 2
    )
    assert notes == Notes()


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("validation", "3-2", "1-0"),
        (VALIDATION, "3-2", "1-0"),
        ("test", "3-0", "3-2"),
        ("seed", "1-0", "3-2"),
        ("iterations", "1-0", "3-2"),
        ("routing.iterations", "1-0", "3-2"),
        ("status", "3-2", "3-1"),
        ("run", "1-0", "3-2"),
        ("validation/accuracy", "3-2", "1-0"),
    ],
)
def test_rows_are_sorted_by_any_column_best_metrics_first(name, first, last, sweep, notes):
    found = compare(sweep, notes, sort_by=name)
    assert (names(found)[0], names(found)[-1]) == (first, last)
    assert notes == Notes()


def test_rows_without_the_value_come_last_in_either_order(sweep, notes):
    for descending in (True, False):
        assert names(compare(sweep, notes, sort_by="test", descending=descending))[-2:] == ["3-1", "3-2"]
    assert names(compare(sweep, notes, sort_by="test", descending=False))[0] == "1-0"
    assert names(compare(sweep, notes, sort_by="seed", descending=True))[0] == "1-2"


def test_small_losses_come_first_and_nan_last(write_run, notes, tmp_path):
    for name, loss in {"a": "0.5", "b": "NaN", "c": "0.25"}.items():
        (write_run(name) / "metrics.jsonl").write_text(f'{{"step": 1, "x/loss": {loss}}}\n')
    runs = read_all(find_all([tmp_path], notes), notes)
    assert names(compare(runs, notes, sort_by="x/loss")) == ["c", "a", "b"]


def test_the_sorting_column_is_shown(sweep, notes):
    for name in ("train/accuracy", "conv_channels", "dataset"):
        assert name in [column.title for column in compare(sweep, notes, sort_by=name).columns]


def test_numbers_sort_before_strings(write_run, notes, tmp_path):
    for name, value in {"a": "none", "b": 10, "c": 9, "d": None}.items():
        write_run(name, {"loss.margin": value})
    runs = read_all(find_all([tmp_path], notes), notes)
    assert names(compare(runs, notes, sort_by="margin")) == ["c", "b", "a", "d"]


def test_failed_and_died_runs_can_be_hidden(sweep, write_run, notes, tmp_path):
    write_run("died", status="running", host="elsewhere")
    runs = read_all(find_all([tmp_path], notes), notes)
    found = compare(runs, notes, hide_failed=True)
    assert {run.status for row in found.rows for run in row.runs} == {"finished"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"show": ["train/los"]}, "--show: no run has the metric 'train/los': did you mean 'train/loss'?"),
        (
            {"sort_by": "train/los"},
            "--sort-by: no run has the metric 'train/los': did you mean 'train/loss'?",
        ),
        ({"sort_by": "sed"}, "--sort-by: unknown key 'sed': did you mean 'seed'?"),
        ({"sort_by": "validaton"}, "--sort-by: unknown key 'validaton': did you mean 'validation'?"),
        (
            {"sort_by": "weight_decay"},
            "--sort-by: 'weight_decay' is ambiguous: write optimizer.weight_decay or loss.weight_decay",
        ),
        ({"group_by": ["sed"]}, "--group-by: unknown key 'sed': did you mean 'seed'?"),
        ({"group_by": ["seed"], "sort_by": "seed"}, "--sort-by: the rows are means over seed"),
    ],
)
def test_an_invalid_option_is_reported_and_the_table_is_still_built(options, message, sweep, notes):
    found = compare(sweep, notes, **options)
    assert notes.errors == [message]
    assert len(found.rows) == (2 if options.get("group_by") == ["seed"] else 6)
    assert found.order.title == "validation"


def test_no_runs_make_an_empty_table(notes):
    found = compare([], notes, show=["x/y"], sort_by="z", group_by=["w"])
    assert found.rows == []
    assert notes == Notes()


# Beside a paper


PAPER = {"error": 0.25, "sd": 0.005}


@pytest.fixture
def table(write_run, tmp_path, notes):
    """Two recipes of two seeds each, the better one second, and a control without a published error."""
    for name, paper, tests in (
        ("worse", PAPER, (0.90, 0.94)),
        ("better", {"error": 9.7}, (0.99, 0.97)),
        ("control", None, (0.5,)),
    ):
        for seed, test in enumerate(tests):
            settings = {"seed": seed, "routing.iterations": len(name), "paper": paper}
            status = {"choices": {"experiment": name}, "total": 40, "steps_per_epoch": 20}
            write_run(f"{name}-{seed}", settings, validation=[0.5], test=test, **status)
    return read_all(find_all([tmp_path], notes), notes)


def test_our_errors_are_shown_beside_the_papers_in_the_same_unit_and_order(table, notes):
    found = beside_paper(table, notes, recipes=["worse", "better", "control"])
    titles = [column.title for column in found.columns]
    assert titles == [
        *("recipe", "test error, %", "paper, %", "steps", "of", "epochs", "time", "status", "run")
    ]
    assert column(found, "experiment") == ["worse", "better", "control"]
    assert [(cell.mean, cell.n) for cell in column(found, "test/error")] == [
        (pytest.approx(error), n) for error, n in ((8, 2), (2, 2), (50, 1))
    ]
    assert column(found, "test/error")[0].sd == pytest.approx(np.std([10, 6], ddof=1))
    assert column(found, "paper/error") == [Spread(0.25, 0.005, None), Spread(9.7, None, None), None]
    assert column(found, "epochs")[0].mean == 30 / 20
    assert column(found, "total")[0].mean == 40


def test_settings_that_differ_within_a_recipe_get_their_own_rows(table, write_run, notes, tmp_path):
    more = {"routing.iterations": 6, "paper": PAPER, "loss.present": 0.8}
    write_run("better-longer", more, choices={"experiment": "better"}, test=0.99)
    runs = read_all(find_all([tmp_path], notes), notes)
    found = beside_paper(runs, notes, recipes=["worse", "better", "control"])
    assert [(row.cells["experiment"], row.cells.get("loss.present")) for row in found.rows] == [
        *(("worse", None), ("better", None), ("better", 0.8), ("control", None))
    ]


def test_the_papers_error_is_a_metric_column_and_not_a_setting(table, notes):
    found = compare(table, notes)
    titles = [column.title for column in found.columns]
    assert titles == [
        *("experiment", "iterations", "seed", "validation", "test", "test error, %", "paper, %"),
        *("steps", "of", "epochs", "time", "status", "run"),
    ]
    assert column(compare(table, notes, sort_by="test/error"), "test/error")[0] == pytest.approx(1)
    assert column(compare(table, notes, sort_by="paper, %"), "paper/error")[0].mean == 0.25
    means = compare(table, notes, group_by=["seed", "experiment", "iterations"])
    assert (len(means.rows), means.rows[0].cells.get("paper/error")) == (1, None)  # the papers' errors differ
    assert notes == Notes()


def test_without_a_published_error_there_are_no_paper_columns(sweep, notes):
    assert not {"test/error", "paper/error"} & {column.name for column in compare(sweep, notes).columns}
    assert "epochs" not in {column.name for column in compare(sweep, notes).columns}


def test_an_invalid_published_error_is_reported_and_the_run_is_still_read(write_run, notes, tmp_path):
    write_run("a", {"paper": {"error": "low"}}, test=0.5)
    (run,) = read_all(find_all([tmp_path], notes), notes)
    assert (run.paper, run.test) == (None, 0.5)
    assert "paper must be null or {error: PERCENT" in notes.warnings[0]
