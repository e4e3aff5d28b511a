import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from capsexp import files
from capsexp.training import checkpoint
from capsexp.training.checkpoint import (
    CheckpointError,
    link,
    list_saved,
    load,
    load_newest,
    prune,
    save,
    step_of,
)


def state(step=0):
    """The state of a run without optimizer state, moving average and GPUs."""
    return {
        **{"step": step, "epoch": 1, "batch": 0, "recorded": 15, "best_accuracy": 0.5, "best_step": None},
        "model": {"w": torch.arange(5000) + step},
        "optimizer": {"state": {}, "param_groups": []},
        "average": None,
        "random": torch.get_rng_state(),
        "random_cuda": [],
    }


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 10 and 20."""
    for step in (10, 20):
        save(tmp_path, state(step), step=step)
    return tmp_path


@pytest.fixture
def lines():
    """The lines that `load_newest` reports."""
    return []


def pt(folder, step):
    return folder / f"step-{step:08d}.pt"


def manifest(path):
    """Write the JSON for a file, as `save` does."""
    content = path.read_bytes()
    text = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "step": 20, "schema": 1}
    path.with_suffix(".json").write_text(json.dumps(text))


def assert_same(loaded, expected):
    assert loaded.keys() == expected.keys()
    assert torch.equal(loaded["model"].pop("w"), expected["model"].pop("w"))
    assert torch.equal(loaded.pop("random"), expected.pop("random"))
    assert loaded == expected


def test_a_saved_state_is_loaded(folder):
    assert_same(load(pt(folder, 20)), {"schema": 1, **state(20)})


def test_the_newest_is_the_highest_step(folder, lines):
    assert load_newest(folder, report=lines.append)["step"] == 20
    assert lines == []


def test_an_empty_or_missing_folder_has_no_newest(tmp_path, lines):
    assert load_newest(tmp_path, report=lines.append) is None
    assert load_newest(tmp_path / "missing", report=lines.append) is None
    assert lines == []


# Damage: each function damages a checkpoint; DAMAGE has the reason for which it is then refused.


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def one_flipped_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def a_zeroed_block(path):
    content = bytearray(path.read_bytes())
    content[8192:12288] = bytes(4096)
    path.write_bytes(content)


def json_without_keys(path):
    path.with_suffix(".json").write_text("{}")


def json_that_is_garbage(path):
    path.with_suffix(".json").write_bytes(b"\x80{]")


def json_of_a_list(path):
    path.with_suffix(".json").write_text("[1, 2]")


def json_of_another_file(path):
    other = pt(path.parent, 10)
    path.with_suffix(".json").write_bytes(other.with_suffix(".json").read_bytes())


def empty_with_json(path):
    empty(path)
    manifest(path)


def truncated_with_json(path):
    truncated(path)
    manifest(path)


def another_schema(path):
    torch.save({**state(20), "schema": 2}, path)
    manifest(path)


def no_schema(path):
    torch.save(state(20), path)
    manifest(path)


def no_dict(path):
    torch.save([1, 2], path)
    manifest(path)


DAMAGE = {
    truncated: r"it has \d+ bytes instead of \d+",
    empty: r"it has 0 bytes instead of \d+",
    one_flipped_bit: "its contents do not match the sha256 in step-00000020.json",
    a_zeroed_block: "its contents do not match the sha256 in step-00000020.json",
    json_without_keys: "its checksum step-00000020.json is missing or unreadable",
    json_that_is_garbage: "its checksum step-00000020.json is missing or unreadable",
    json_of_a_list: "its checksum step-00000020.json is missing or unreadable",
    json_of_another_file: "its contents do not match the sha256 in step-00000020.json",
    empty_with_json: r"it cannot be read safely: \w",
    truncated_with_json: r"it cannot be read safely: .",
    another_schema: "its schema is 2, this version reads 1",
    no_schema: "its schema is None, this version reads 1",
    no_dict: "its schema is None, this version reads 1",
}
damaged = pytest.mark.parametrize(
    ("damage", "reason"), DAMAGE.items(), ids=lambda value: getattr(value, "__name__", "")
)


@damaged
def test_a_damaged_checkpoint_is_refused_by_name_and_the_previous_one_is_used(damage, reason, folder, lines):
    damage(pt(folder, 20))
    refusal = f"^{re.escape(str(pt(folder, 20)))}: refused, {reason}"
    with pytest.raises(CheckpointError, match=refusal):
        load(pt(folder, 20))
    assert load_newest(folder, report=lines.append)["step"] == 10
    assert len(lines) == 1
    assert re.match(refusal, lines[0])
    assert lines[0].endswith("; trying the previous one")


@damaged
def test_if_all_are_refused_no_new_run_starts(damage, reason, folder, lines):
    if damage is json_of_another_file:
        pt(folder, 10).write_bytes(b"")
    else:
        damage(pt(folder, 10))
    damage(pt(folder, 20))
    with pytest.raises(
        CheckpointError, match=r"no usable checkpoint is left in .*; start in another directory"
    ):
        load_newest(folder, report=lines.append)
    assert len(lines) == 2


@pytest.mark.parametrize("silent", [one_flipped_bit, a_zeroed_block])
def test_torch_loads_the_damaged_file_without_an_error(silent, folder):
    silent(pt(folder, 20))
    loaded = torch.load(pt(folder, 20), weights_only=True)
    assert not torch.equal(loaded["model"]["w"], state(20)["model"]["w"])


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_hostile_pickle_with_a_valid_checksum_is_refused_and_does_not_run(folder, lines, tmp_path):
    marker, path = tmp_path / "it_ran", pt(folder, 20)
    torch.save({"schema": 1, **state(20), "extra": Payload(marker)}, path)
    manifest(path)
    with pytest.raises(CheckpointError, match=f"{path}: refused, it cannot be read safely: "):
        load(path)
    assert load_newest(folder, report=lines.append)["step"] == 10
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the payload works


def test_a_missing_json_of_an_older_checkpoint_is_reported(folder, lines):
    save(folder, state(30), step=30)
    pt(folder, 20).with_suffix(".json").unlink()
    pt(folder, 30).write_bytes(b"")
    assert load_newest(folder, report=lines.append)["step"] == 10
    assert len(lines) == 2
    assert "step-00000020.pt: refused, its checksum step-00000020.json is missing" in lines[1]


def test_a_checkpoint_without_json_is_refused_by_name(folder):
    pt(folder, 20).with_suffix(".json").unlink()
    with pytest.raises(CheckpointError, match=r"its checksum step-00000020\.json is missing or unreadable"):
        load(folder / "last.pt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("best.pt", r"no checkpoint best\.pt in .*; available: 10, 20"),
        ("step-00000030.pt", "no checkpoint at step 30; available: 10, 20"),
    ],
)
def test_a_missing_checkpoint_is_an_error_with_those_that_exist(name, message, folder):
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        load(folder / name)


def test_a_missing_checkpoint_of_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"^no checkpoint at step 30; available: none$"):
        load(pt(tmp_path, 30))


# Atomic writes

SAVING = """
import itertools, sys, torch
from pathlib import Path
from capsexp import files
from capsexp.training import checkpoint
real = files.write_atomic
def stuck(path, write):
    if path.name == sys.argv[2]:
        print("here", flush=True)
        sys.stdin.read()
    real(path, write)
checkpoint.write_atomic = stuck
checkpoint.save(Path(sys.argv[1]), {"step": 30}, step=30)
"""


def test_a_kill_between_the_file_and_its_json_leaves_the_previous_one(folder, lines):
    command = [sys.executable, "-c", SAVING, str(folder), "step-00000030.json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"here\n"
        process.kill()
    assert pt(folder, 30).exists()
    assert load_newest(folder, report=lines.append)["step"] == 20
    assert load(folder / "last.pt")["step"] == 20
    save(folder, state(30), step=30)
    assert load_newest(folder, report=lines.append)["step"] == 30
    assert lines == []


def test_an_only_checkpoint_without_json_counts_as_unfinished(tmp_path, lines):
    save(tmp_path, state(10), step=10)
    pt(tmp_path, 10).with_suffix(".json").unlink()
    assert load_newest(tmp_path, report=lines.append) is None


@pytest.mark.parametrize("step", [20, 30])
def test_a_failing_save_changes_no_file_with_its_final_name(step, folder, lines, monkeypatch):
    before = pt(folder, 20).read_bytes()

    def full(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        save(folder, state(step), step=step)
    monkeypatch.undo()
    assert pt(folder, 20).read_bytes() == before
    assert not pt(folder, 30).exists()
    assert sorted(path.name for path in folder.glob("*") if path.name.startswith(".")) == []
    assert load_newest(folder, report=lines.append)["step"] == 20


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda number: calls.append("fsync"))
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), real(*names)))
    files.write_atomic(tmp_path / "a", lambda file: file.write(b"x"))
    assert calls == ["fsync", "replace", "fsync"]
    assert (tmp_path / "a").read_bytes() == b"x"


# Links and pruning


def test_last_and_best_link_to_their_steps(folder):
    link(folder, "best", 10)
    assert load(folder / "best.pt")["step"] == 10
    assert load(folder / "last.pt")["step"] == 20
    assert (folder / "best.pt").readlink().name == "step-00000010.pt"
    link(folder, "best", 20)
    assert load(folder / "best.pt")["step"] == 20
    assert step_of(folder / "best.pt") == 20


def test_a_name_without_a_step_is_refused(folder):
    with pytest.raises(CheckpointError, match="not the name of a checkpoint"):
        step_of(folder / "step-12.pt")


def saved_steps(folder):
    assert {path.stem for path in folder.glob("step-*.json")} == {
        path.stem for path in folder.glob("step-*.pt")
    }
    return [step_of(path) for path in list_saved(folder)]


@pytest.mark.parametrize(
    ("best", "every", "expected"),
    [
        ([], None, [60, 70]),
        ([20], None, [20, 60, 70]),
        ([70], None, [60, 70]),
        ([], 30, [30, 60, 70]),
        ([10], 20, [10, 20, 40, 60, 70]),
    ],
)
def test_the_last_two_the_best_and_every_kth_stay(best, every, expected, tmp_path):
    for step in range(10, 80, 10):
        save(tmp_path, state(step), step=step)
        prune(tmp_path, keep_last=2, keep_steps=[saved for saved in best if saved <= step], keep_every=every)
    assert saved_steps(tmp_path) == expected
    assert load(tmp_path / "last.pt")["step"] == 70


def test_only_leftovers_of_killed_saves_are_deleted(folder):
    (folder / ".step-00000030.pt.123.tmp").write_bytes(b"half")
    (folder / ".last.123.tmp").symlink_to("step-00000020.pt")
    (folder / "notes.txt").write_text("mine")
    prune(folder, keep_last=2, keep_steps=[], keep_every=None)
    assert sorted(path.name for path in folder.iterdir()) == [
        "last.pt",
        "notes.txt",
        "step-00000010.json",
        "step-00000010.pt",
        "step-00000020.json",
        "step-00000020.pt",
    ]


def test_a_file_with_another_name_is_not_a_checkpoint(folder):
    (folder / "step-20.pt").write_bytes(b"")
    (folder / "step-000000200.pt").write_bytes(b"")
    assert [path.name for path in list_saved(folder)] == ["step-00000010.pt", "step-00000020.pt"]
    assert checkpoint.SCHEMA == 1
