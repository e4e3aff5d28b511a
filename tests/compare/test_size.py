"""Many runs, long logs and large figures: everything ends, and says what it leaves out."""

import json
from itertools import pairwise

import matplotlib.image
import pytest

from capsexp.compare import curves, history, report
from capsexp.compare.comparison import compare
from capsexp.compare.curves import learning_curves, mean_over_seeds
from capsexp.compare.find import find_all
from capsexp.compare.runs import read_all
from capsexp.errors import Notes

PNG = report.PNG + bytes(20_000)


@pytest.fixture
def notes():
    return Notes()


def write_many(write_run, count, *, figure=PNG):
    for number in range(count):
        settings = {"seed": 0, "routing.iterations": number}
        path = write_run(f"outputs/{number}", settings, validation=[0.5, number / count], test=0.5)
        (path / "figures").mkdir()
        (path / "figures" / "a.png").write_bytes(figure)


def report_of(folder, notes):
    runs = read_all(find_all([folder], notes), notes)
    size = report.write(folder / "page.html", compare(runs, notes), curves.TAGS, notes)
    page = (folder / "page.html").read_text()
    assert size == len(page.encode())
    return page


@pytest.mark.parametrize("part", ["PANEL_BYTES", "TABLE_BYTES", "DETAILS_BYTES", "LARGEST_PAGE"])
def test_a_page_stays_below_its_size_and_says_what_it_leaves_out(
    part, write_run, tmp_path, monkeypatch, notes
):
    write_many(write_run, 30)
    limits = {"PANEL_BYTES": 7000, "TABLE_BYTES": 9000, "DETAILS_BYTES": 20_000, "LARGEST_PAGE": 600_000}
    monkeypatch.setattr(report, part, limits[part])
    page = report_of(tmp_path / "outputs", notes)
    assert len(page.encode()) <= report.LARGEST_PAGE
    name = {"PANEL_BYTES": "panel", "TABLE_BYTES": "rows of the table", "DETAILS_BYTES": "details of runs"}
    (line,) = notes.warnings
    assert f" {name.get(part, 'figures')}" in line
    assert line in page
    assert page.count("<details class=") <= page.count("<tr") - 1
    assert all(f'id="{anchor}"' in page for anchor in anchors(page))


def anchors(page):
    return [piece.partition('"')[0] for piece in page.split('href="#')[1:]]


def test_the_estimates_of_parts_are_upper_bounds(write_run, tmp_path, monkeypatch, notes):
    """Also of names full of letters that HTML escapes."""
    for number in range(20):
        name = "<'\"&>" * 60 + str(number)
        write_run(f"outputs/{number}", {"loss.name": name}, error=name, validation=[0.5], status="failed")
    monkeypatch.setattr(report, "PANEL_BYTES", 0)
    for table, details in ((20_000, 0), (10**6, 20_000)):
        monkeypatch.setattr(report, "TABLE_BYTES", table)
        monkeypatch.setattr(report, "DETAILS_BYTES", details)
        page = report_of(tmp_path / "outputs", Notes()).encode()
        fixed = page.count(b"<style>") and len(
            page.partition(b"</style>")[0] + page.partition(b"<script>")[2]
        )
        assert len(page) - fixed <= table + details + 30_000


def test_at_most_so_many_curves_are_drawn_and_the_rest_is_said(write_run, tmp_path, monkeypatch, capsexp):
    monkeypatch.setattr(curves, "MAX_LINES", 20)
    write_many(write_run, 25)
    code, _, error = capsexp("compare", tmp_path / "outputs", "--plot", tmp_path / "a.png")
    assert code == 0
    assert "capsexp: the first 10 of 25 curves are drawn, in the order of the table\n" in error
    assert matplotlib.image.imread(tmp_path / "a.png").ndim == 3


def test_a_curve_is_the_mean_of_at_most_so_many_runs(write_run, tmp_path, monkeypatch, notes):
    monkeypatch.setattr(curves, "MAX_RUNS", 3)
    for seed in range(5):
        write_run(f"{seed}", {"seed": seed}, validation=[seed / 10])
    table = compare(read_all(find_all([tmp_path], notes), notes), notes)
    (curve,) = learning_curves(mean_over_seeds(table, notes), curves.TAGS, notes)
    assert len(curve.runs) == 3
    assert notes.warnings == ["a curve is the mean of at most 3 runs; one setting has 5"]


@pytest.mark.parametrize("count", [1, 15, 16, 17, 32, 33, 100, 101, 1000])
def test_of_a_long_log_every_kth_value_and_the_last_are_drawn(count, tmp_path, monkeypatch, notes):
    monkeypatch.setattr(history, "MAX_VALUES", 16)
    lines = (json.dumps({"step": 10 * step, "x": step / 4}) for step in range(1, count + 1))
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    series = history.all_values(tmp_path, ["x"], notes)["x"]
    steps = list(series)
    assert len(steps) <= 17
    assert len(steps) >= min(count, 8)
    assert steps[-1] == 10 * count
    intervals = {(later - earlier) // 10 for earlier, later in pairwise(steps[:-1])}
    assert len(intervals) <= 1
    assert all(interval & (interval - 1) == 0 for interval in intervals)
    assert all(series[step] == step / 40 for step in steps)
    assert notes == Notes()


def test_the_steps_of_logs_of_other_lengths_coincide(tmp_path, monkeypatch, notes):
    monkeypatch.setattr(history, "MAX_VALUES", 16)
    drawn = {}
    for count in (40, 100, 300):
        lines = (json.dumps({"step": step, "x": 1.0}) for step in range(1, count + 1))
        (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
        drawn[count] = {*history.all_values(tmp_path, ["x"], notes)["x"]} - {count}
    assert {step for step in drawn[300] if step < 40} <= drawn[40]
    assert {step for step in drawn[300] if step < 100} <= drawn[100]


@pytest.mark.soak
def test_five_thousand_runs(write_run, tmp_path, capsexp):
    write_many(write_run, 5000)
    folder = tmp_path / "outputs"
    for _ in range(2):  # without an index, and with it
        code, out, error = capsexp("runs", folder)
        assert (code, error, out.count("\n")) == (0, "", 5002)
        code, out, error = capsexp("compare", folder, "--csv")
        assert (code, error, out.count("\n")) == (0, "", 5001)
    code, _, error = capsexp("compare", folder, "--plot", tmp_path / "a.png")
    assert (code, "60 of 5000 curves" in error) == (0, True)
    code, _, error = capsexp("report", folder, "-o", tmp_path / "page.html")
    assert (code, "the page leaves out" in error) == (0, True)
    assert (tmp_path / "page.html").stat().st_size <= 10_000_000


@pytest.mark.soak
def test_logs_of_a_hundred_thousand_lines(write_run, tmp_path, capsexp):
    line = '{{"step": {0}, "epoch": 1, "train/loss": 0.5, "validation/accuracy": 0.25}}\n'
    content = "".join(map(line.format, range(1, 100_001)))
    for seed in range(5):
        (write_run(f"outputs/{seed}", {"seed": seed}) / "metrics.jsonl").write_text(content)
    for command in (("compare", "--plot", tmp_path / "a.png"), ("report", "-o", tmp_path / "page.html")):
        code, _, _ = capsexp(*command, tmp_path / "outputs")
        assert code == 0
    assert (tmp_path / "page.html").stat().st_size < 200_000
