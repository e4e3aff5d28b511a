"""The index beside the runs changes how long tables take, and never what they show."""

import json
import os
import random

import pytest

from capsexp.compare import index, runs
from capsexp.compare.find import find_all
from capsexp.compare.index import NAME, Index
from capsexp.compare.runs import read_all
from capsexp.errors import Notes


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Three runs are many, and files are settled at once."""
    monkeypatch.setattr(runs, "MIN_RUNS", 3)
    monkeypatch.setattr(index, "MIN_RUNS", 1)
    monkeypatch.setattr(index, "SETTLED_SECONDS", 0.0)


@pytest.fixture
def folder(write_run, tmp_path):
    for number in range(4):
        settings = {"seed": number, "paper": {"error": 0.25}, "loss.name": ["a", {"b": None}]}
        path = write_run(f"sweep/{number}", settings, validation=[0.1 * number], test=0.5)
        (path / "command.txt").write_text(f"capsexp train seed={number} name=é\n")
    return tmp_path / "sweep"


def read(folder, monkeypatch, *, indexed=True):
    """All runs below a folder, the notes, and how many configs were parsed."""
    parsed = []
    with monkeypatch.context() as patch:
        parse = runs.parse_saved
        patch.setattr(runs, "parse_saved", lambda text: parsed.append(text) or parse(text))
        if not indexed:
            patch.setattr(runs, "MIN_RUNS", 10**9)
        notes = Notes()
        found = read_all(find_all([folder], notes), notes)
    return found, notes, len(parsed)


def same_as_without(folder, monkeypatch):
    """How many configs were parsed; the result is that without an index."""
    found, notes, count = read(folder, monkeypatch)
    expected, expected_notes, _ = read(folder, monkeypatch, indexed=False)
    assert (found, notes) == (expected, expected_notes)
    return count


def test_the_second_time_no_config_is_parsed(folder, monkeypatch):
    assert [same_as_without(folder, monkeypatch) for _ in range(3)] == [4, 0, 0]
    assert [path.name for path in folder.iterdir() if path.is_file()] == [NAME]


def test_small_folders_get_no_index(folder, monkeypatch):
    monkeypatch.setattr(runs, "MIN_RUNS", 5)
    read(folder, monkeypatch)
    assert not (folder / NAME).exists()


CHANGES = {
    "edited in place": lambda run: edit(run / "status.json", b'"step": 30', b'"step": 29'),
    "replaced": lambda run: replace(run / "status.json", b"0.5", b"0.6"),
    "config edited": lambda run: edit(run / "resolved_config.yaml", b"conv_channels: 8", b"conv_channels: 9"),
    "config removed": lambda run: (run / "resolved_config.yaml").unlink(),
    "environment removed": lambda run: (run / "env.json").unlink(),
    "damaged": lambda run: (run / "status.json").write_bytes(b"{"),
    "running again": lambda run: edit(run / "status.json", b"completed", b"running"),
    "command lost": lambda run: (run / "command.txt").unlink(),
    "renamed": lambda run: run.rename(run.with_name("renamed")),
    "exchanged": lambda run: exchange(run, run.with_name("2")),
    "a folder": lambda run: ((run / "env.json").unlink(), (run / "env.json").mkdir()),
    "a link": lambda run: link(run / "status.json", run.with_name("3") / "status.json"),
}


def edit(file, old, new):
    """Change a file in place, with its old time of change."""
    status, content = file.stat(), file.read_bytes()
    assert old in content
    with open(file, "r+b") as opened:
        opened.write(content.replace(old, new))
        opened.truncate()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(file, old, new):
    content = file.read_bytes().replace(old, new)
    file.unlink()
    file.write_bytes(content)


def exchange(one, other):
    one.rename(one.with_name("x"))
    other.rename(one)
    one.with_name("x").rename(other)


def link(file, target):
    file.unlink()
    file.symlink_to(target)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_run_is_read_again(change, folder, monkeypatch):
    read(folder, monkeypatch)
    CHANGES[change](folder / "1")
    assert same_as_without(folder, monkeypatch) <= 2
    same_as_without(folder, monkeypatch)


def test_runs_that_have_not_ended_or_are_damaged_are_never_in_the_index(folder, write_run, monkeypatch):
    write_run("sweep/0", status="running", host="elsewhere", heartbeat=0)
    write_run("sweep/1", status="interrupted", seconds=-1)
    (folder / "2" / "env.json").write_text("[")
    for _ in range(3):
        same_as_without(folder, monkeypatch)
    names = json.loads((folder / NAME).read_bytes().partition(b"\n")[2])
    assert {*names} == {"1", "3"}  # what status.json says is checked each time


def test_a_file_that_has_just_changed_is_not_trusted(folder, monkeypatch):
    monkeypatch.setattr(index, "SETTLED_SECONDS", 3600.0)
    read(folder, monkeypatch)
    assert not (folder / NAME).exists()


def checksummed(body: bytes) -> bytes:
    return index._head(body) + b"\n" + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        checksummed(b"["),
        checksummed(b"[" * 100_000),
        checksummed(b"[]"),
        checksummed(b'{"0": 5, "1": {"signature": 1}, "2": {}}'),
        "shortened",
        "one bit",
        "another version",
    ],
)
def test_a_damaged_index_is_read_as_empty_and_written_anew(content, folder, monkeypatch):
    read(folder, monkeypatch)
    good = (folder / NAME).read_bytes()
    damaged = {
        "shortened": good[:-1],
        "one bit": good.replace(b"0.5", b"0.7"),
        "another version": b"x" + good,
    }
    (folder / NAME).write_bytes(damaged.get(content, content))
    assert same_as_without(folder, monkeypatch) == 4
    assert same_as_without(folder, monkeypatch) == 0
    assert json.loads((folder / NAME).read_bytes().partition(b"\n")[2]).keys() == {"0", "1", "2", "3"}


@pytest.mark.parametrize("field", ["status", "settings", "paper", "command", "version"])
@pytest.mark.parametrize("value", [None, 5, "x", [], [1, "x", 3], {"status": "odd"}])
def test_entries_of_a_wrong_kind_are_never_an_error(field, value, folder, monkeypatch):
    read(folder, monkeypatch)
    entries = json.loads((folder / NAME).read_bytes().partition(b"\n")[2])
    entries["1"][field] = value
    (folder / NAME).write_bytes(checksummed(json.dumps(entries).encode()))
    found, notes, _ = read(folder, monkeypatch)
    assert len(found) == 4
    assert notes.errors == []


def test_links_and_places_that_cannot_be_written_are_left_alone(folder, tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (folder / NAME).symlink_to(precious)
    assert same_as_without(folder, monkeypatch) == 4
    assert (folder / NAME).is_symlink()
    assert precious.read_text() == "mine"
    (folder / NAME).unlink()
    (tmp_path / "link").symlink_to(folder)
    assert same_as_without(tmp_path / "link", monkeypatch) == 4
    assert not (folder / NAME).exists()
    (folder / NAME).mkdir()
    assert same_as_without(folder, monkeypatch) == 4


def test_a_folder_of_another_user_gets_no_index(folder, monkeypatch):
    monkeypatch.setattr(index.os, "geteuid", lambda: os.getuid() + 1)
    assert [same_as_without(folder, monkeypatch) for _ in range(2)] == [4, 4]
    assert not (folder / NAME).exists()


def test_any_series_of_changes_shows_the_same_with_and_without_the_index(folder, write_run, monkeypatch):
    order = random.Random(0)
    for step in range(25):
        alive = [path for path in folder.iterdir() if path.is_dir()]
        change = order.choice([None, None, *CHANGES])
        try:
            if change is None:
                write_run(f"sweep/{order.randrange(4)}", {"seed": step}, validation=[order.random()])
            else:
                CHANGES[change](order.choice(alive))
        except (OSError, AssertionError):  # the run is already changed in another way
            continue
        same_as_without(folder, monkeypatch)


def test_removed_runs_leave_the_index(folder, write_run, monkeypatch):
    read(folder, monkeypatch)
    (folder / "0").rename(folder.parent / "elsewhere")
    write_run("sweep/new")
    read(folder, monkeypatch)
    assert json.loads((folder / NAME).read_bytes().partition(b"\n")[2]).keys() == {"1", "2", "3", "new"}
    assert Index(folder).get("1", [None] * 4) is None
