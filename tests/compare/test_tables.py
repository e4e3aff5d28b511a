import csv
import io
import json
import re
import sys
import time

import pytest

from capsexp.compare import tables
from capsexp.compare.comparison import compare
from capsexp.compare.find import find_all
from capsexp.compare.runs import read_all
from capsexp.compare.tables import (
    as_csv,
    csv_text,
    json_text,
    markdown,
    print_comparison,
    print_runs,
)
from capsexp.errors import Notes


def print_table(paths, notes, *, group_by=()):
    found = read_all(find_all(paths, notes), notes)
    print_comparison(compare(found, notes, group_by=group_by))


VALUE = 0.1 + 0.2  # needs seventeen digits


@pytest.fixture
def notes():
    return Notes()


@pytest.fixture
def runs(write_run, tmp_path, notes):
    write_run("sweep/a", {"model.decoder.hidden": [8, 9], "loss.name": "x|y,z"}, validation=[VALUE], test=0.5)
    write_run("sweep/b", {"seed": 1, "loss.name": None}, status="failed", error="X: [red]no[/] way\nmore")
    return read_all(find_all([tmp_path], notes), notes)


def test_csv_has_full_names_and_every_digit(runs, notes, tmp_path):
    rows = list(csv.DictReader(io.StringIO(csv_text(compare(runs, notes)))))
    assert list(rows[0]) == [
        "loss.name",
        "model.decoder.hidden",
        "seed",
        "validation/best_accuracy",
        "test/accuracy",
        "steps",
        "seconds",
        "status",
        "run",
    ]
    assert list(rows[0].values()) == [
        *("x|y,z", "[8, 9]", "0", repr(VALUE), "0.5", "30", "60.0", "finished", f"{tmp_path}/sweep/a")
    ]
    assert (rows[1]["loss.name"], rows[1]["validation/best_accuracy"]) == ("null", "")
    assert as_csv([tmp_path], notes) == csv_text(compare(runs, notes))


def test_json_keeps_types_and_is_strict(runs, write_run, notes, tmp_path):
    (write_run("sweep/c", config={"seed": 2}) / "metrics.jsonl").write_text('{"step": 1, "x/loss": NaN}\n')
    runs = read_all(find_all([tmp_path], notes), notes)

    def refuse(constant):
        raise AssertionError(constant)

    first, second, third = json.loads(json_text(compare(runs, notes, show=["x/loss"])), parse_constant=refuse)
    assert (first["model.decoder.hidden"], first["validation/best_accuracy"], first["seed"]) == (
        [8, 9],
        VALUE,
        0,
    )
    assert (second["loss.name"], second["test/accuracy"], second["x/loss"]) == (None, None, None)
    assert "loss.name" not in third
    assert third["x/loss"] is None


def test_means_are_three_fields(runs, notes):
    grouped = compare(runs, notes, group_by=["seed", "hidden", "loss.name"])
    (record,) = json.loads(json_text(grouped))
    name = "validation/best_accuracy"
    assert (record[f"{name}.mean"], record[f"{name}.sd"], record[f"{name}.n"]) == (VALUE, None, 1)
    assert (record["steps.mean"], record["steps.sd"], record["steps.n"]) == (30.0, None, 1)
    assert record["run"] == [str(run.path) for run in runs]
    (row,) = csv.DictReader(io.StringIO(csv_text(grouped)))
    assert (row[f"{name}.mean"], row[f"{name}.sd"], row[f"{name}.n"]) == (repr(VALUE), "", "1")
    assert row["run"] == " ".join(str(run.path) for run in runs)
    assert row["status"] == "1 finished, 1 failed"


def test_markdown_is_the_table_for_people(runs, notes):
    head, rule, first, second = markdown(compare(runs, notes)).splitlines()
    assert head == "| name | hidden | seed | validation | test | steps | time | status | run |"
    assert set(rule) == {"|", "-", " "}
    assert first.startswith("| x\\|y,z | [8, 9] | 0 | 0.3000 | 0.5000 |")
    assert " | – | – | " in second  # noqa: RUF001
    head, _, means = markdown(compare(runs, notes, group_by=["seed", "hidden", "loss.name"])).splitlines()
    assert head.startswith("| validation (n) | test (n) |")
    assert means.startswith("| 0.3000 (1) | 0.5000 (1) |")


def test_the_table_for_people_is_rounded_and_names_the_common_folder(runs, notes, capsys, tmp_path):
    print_comparison(compare(runs, notes))
    out = capsys.readouterr().out
    head, _, first, second, end = out.splitlines()
    assert head.split() == [
        *("name", "hidden", "seed", "validation", "↓", "test", "steps", "time", "status", "run")
    ]
    assert re.split(r"\s{2,}", first.strip()) == [
        *("x|y,z", "[8, 9]", "0", "0.3000", "0.5000", "30", "1:00", "finished", "a")
    ]
    assert re.split(r"\s{2,}", second.strip())[3:5] == ["–", "–"]  # noqa: RUF001
    assert end == f"2 runs in {tmp_path}/sweep"
    print_table([tmp_path], notes)
    assert capsys.readouterr().out == out


def test_the_table_of_means_shows_the_number_of_runs(runs, notes, capsys, tmp_path, write_run):
    write_run("sweep/a2", {"model.decoder.hidden": [8, 9], "loss.name": "x|y,z", "seed": 2}, validation=[0.5])
    print_table([tmp_path], notes, group_by=["seed"])
    out = capsys.readouterr().out
    assert "0.4000 ± 0.1414 (2)" in out
    assert "0.5000 (1)" in out
    assert "2 finished" in out
    assert "1 failed" in out
    assert out.endswith(f"3 runs in {tmp_path}/sweep; mean ± sample sd over seed\n")


def test_the_list_of_runs_starts_with_the_newest_and_shows_errors(write_run, notes, capsys, tmp_path):
    now = time.time()
    write_run("old", started=now - 3 * 86400, validation=[0.5], test=0.25)
    write_run(
        "new", started=now - 7200, status="failed", error="X: [red]no[/] way\nmore", step=None, choices={}
    )
    print_runs(read_all(find_all([tmp_path], notes), notes))
    head, _, new, why, old = capsys.readouterr().out.splitlines()
    assert head.split() == ["status", "age", "model", "dataset", "step", "validation", "test", "run"]
    dash = "–"  # noqa: RUF001
    assert new.split() == ["failed", "2", "h", dash, dash, f"{dash}/30", dash, dash, f"{tmp_path}/new"]
    assert why.strip() == "X: [red]no[/] way"
    assert old.split() == [
        *("finished", "3", "d", "small", "digits", "30/30", "0.5000", "0.2500", f"{tmp_path}/old")
    ]


def test_control_characters_of_files_do_not_reach_the_terminal(write_run, notes, capsys, tmp_path):
    write_run("a", {"loss.name": "\x1b[31mred"}, status="failed", error="\n\x1b]0;title\x07\x1b[2Jgone")
    write_run("b", {"loss.name": "plain"})
    runs = read_all(find_all([tmp_path], notes), notes)
    print_runs(runs)
    print_comparison(compare(runs, notes))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[2Jgone" in out


def test_rows_are_not_wrapped_on_a_narrow_terminal(runs, notes, capsys, monkeypatch):
    print_comparison(compare(runs, notes))
    piped = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", "xterm")
    print_comparison(compare(runs, notes))
    shown = capsys.readouterr().out
    assert "\x1b[31mfailed" in shown
    assert "\x1b" not in piped
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines()
    assert [line.rstrip() for line in plain] == piped.splitlines()


def test_an_empty_table_is_a_heading_an_empty_list_or_nothing(notes, capsys):
    empty = compare([], notes)
    assert csv_text(empty) == "validation/best_accuracy,test/accuracy,steps,seconds,status,run\n"
    assert len(markdown(empty).splitlines()) == 2
    assert json.loads(json_text(empty)) == []
    print_comparison(empty)
    print_runs([])
    assert capsys.readouterr().out == ""


def test_absolute_and_relative_directories_have_no_common_folder(
    write_run, notes, tmp_path, monkeypatch, capsys
):
    write_run("a")
    write_run("b")
    monkeypatch.chdir(tmp_path)
    print_table([tmp_path / "a", tables.Path("b")], notes)
    assert capsys.readouterr().out.endswith("2 runs in .\n")


def test_a_published_error_is_written_in_every_format(write_run, notes, capsys, tmp_path):
    paper = {"error": 0.25, "sd": 0.005}
    for seed, test in enumerate((0.9888, 0.9871)):
        status = {"choices": {"experiment": "mine"}, "steps_per_epoch": 430}
        write_run(f"sweep/{seed}", {"seed": seed, "paper": paper}, test=test, **status)
    found = read_all(find_all([tmp_path], notes), notes)
    grouped = compare(found, notes, group_by=["seed"])
    print_comparison(grouped)
    head, _, row, _ = capsys.readouterr().out.splitlines()
    assert re.search(r" test error, % \(n\) +paper, % +steps \(n\) +of \(n\) +epochs \(n\) ", head)
    assert re.search(r" 1\.21 ± 0\.120 \(2\) +0\.25 ± 0\.005 +30 ± 0 \(2\) ", row)
    assert "| 1.21 ± 0.120 (2) | 0.25 ± 0.005 | 30 ± 0 (2) | 30 ± 0 (2) | 0.07 ± 0 (2) |" in markdown(grouped)
    (record,) = json.loads(json_text(grouped))
    assert (record["paper/error.mean"], record["paper/error.sd"]) == (0.25, 0.005)
    assert record["test/error.mean"] == pytest.approx(1.205)
    assert "paper/error.n" not in record
    rows = list(csv.DictReader(io.StringIO(csv_text(compare(found, notes)))))
    assert sorted(float(row["test/error"]) for row in rows) == pytest.approx([1.12, 1.29])
    assert {(row["paper/error.mean"], row["paper/error.sd"]) for row in rows} == {("0.25", "0.005")}
