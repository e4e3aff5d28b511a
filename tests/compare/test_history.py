import json

import pytest

from capsexp.compare import history
from capsexp.errors import Notes


@pytest.fixture
def notes():
    return Notes()


@pytest.fixture
def run(tmp_path):
    lines = [
        {"step": 1, "epoch": 1, "train/loss": 0.5, "train/accuracy": 0.25},
        {"step": 2, "epoch": 1, "train/loss": 0.25},
        {"step": 2, "epoch": 1, "validation/accuracy": 0.75},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def append(run, content):
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(content)


def test_series_and_last_values(run, notes):
    found = history.all_values(run, ["train/loss", "validation/accuracy", "none"], notes)
    assert found == {"train/loss": {1: 0.5, 2: 0.25}, "validation/accuracy": {2: 0.75}, "none": {}}
    last = history.last_values(run, ["train/loss", "train/accuracy", "none"], notes)
    assert last == {"train/loss": 0.25, "train/accuracy": 0.25}
    assert history.logged_tags(run) == {"train/loss", "train/accuracy", "validation/accuracy"}
    assert notes == Notes()


def test_a_run_without_a_log_has_no_metrics(tmp_path, notes):
    assert history.all_values(tmp_path, ["train/loss"], notes) == {"train/loss": {}}
    assert history.last_values(tmp_path, ["train/loss"], notes) == {}
    assert history.logged_tags(tmp_path) == set()
    assert notes == Notes()


@pytest.mark.parametrize(
    "fragment", [b'{"step": 3, "epoch": 1, "train/lo', b'{"step": 3, "train/loss": 0.1}']
)
def test_an_incomplete_last_line_is_ignored_with_a_warning(fragment, run, notes):
    append(run, fragment)
    assert history.last_values(run, ["train/loss"], notes) == {"train/loss": 0.25}
    assert notes.warnings == [f"{run}/metrics.jsonl: ignored the incomplete last line"]


@pytest.mark.parametrize(
    "line",
    [b"\0\0\0", b'{"step": 3, "train/loss": }', b'{"train/loss": 1.0}', b'{"step": "x", "train/loss": 1}'],
)
def test_damaged_lines_are_ignored_with_one_warning(line, run, notes):
    append(run, line + b"\n" + line + b"\n" + b'{"step": 4, "train/loss": 0.125}\n')
    assert history.all_values(run, ["train/loss"], notes)["train/loss"] == {1: 0.5, 2: 0.25, 4: 0.125}
    assert notes.warnings == [f"{run}/metrics.jsonl: ignored damaged lines"]


def test_only_needed_lines_are_parsed(run, notes, monkeypatch):
    parsed = []
    monkeypatch.setattr(
        history.json, "loads", lambda line: parsed.append(line) or {"step": 2, "train/loss": 1.0}
    )
    history.last_values(run, ["train/loss"], notes)
    assert [line[:12] for line in parsed] == [b'{"step": 2, ']


def test_values_that_are_not_numbers_are_ignored(run, notes):
    append(run, b'{"step": 3, "train/loss": "x"}\n{"step": 4, "train/loss": true}\n')
    assert history.last_values(run, ["train/loss"], notes) == {"train/loss": 0.25}


def test_an_unreadable_file_is_reported(tmp_path, notes):
    (tmp_path / "metrics.jsonl").mkdir()
    assert history.last_values(tmp_path, ["train/loss"], notes) == {}
    assert "Is a directory" in notes.warnings[0]
