import json
import time

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from capsexp.errors import UserError
from capsexp.files import WriteError
from capsexp.training import events
from capsexp.training.record import Record, closing

SETTINGS = {
    "seed": 1,
    "model": {"leaky": True, "rate": 0.5, "name": "caps", "sizes": [1, 2]},
    "nothing": None,
}


def record(path, *, start_step=0, length=0, **settings):
    path.mkdir(exist_ok=True)
    return Record(path, start_step=start_step, length=length, settings=SETTINGS | settings)


def test_metrics_keep_every_digit(tmp_path):
    written = record(tmp_path)
    written.log_metrics(3, {"train/loss": 0.1234567890123456789, "train/accuracy": 1 / 3}, epoch=1)
    written.close("completed")
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 3, "epoch": 1, "train/loss": 0.1234567890123456789, "train/accuracy": 1 / 3}


def test_lines_after_the_checkpoint_are_cut_off(tmp_path):
    first = record(tmp_path)
    first.log_metrics(1, {"loss": 1.0})
    length = first.flushed_bytes()
    first.log_metrics(2, {"loss": 2.0})
    first.close("completed")
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 3, "lo')  # killed in the middle of a line
    second = record(tmp_path, start_step=1, length=length)
    assert second.flushed_bytes() == length
    second.log_metrics(2, {"loss": 2.5})
    second.close("completed")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.5}]


def test_a_file_that_is_shorter_than_at_the_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl is shorter than when its checkpoint was made"):
        record(tmp_path, start_step=1, length=10)


def test_the_table_has_each_setting_once_with_its_type(tmp_path):
    routing = {"iterations": 3, "_partial_": True, "_target_": "EM", "part": {"_target_": "Part"}}
    record(tmp_path, routing=routing, model={"routing": routing, "padding": None}, data_root="/x").close(
        "completed"
    )
    content = EventAccumulator(str(tmp_path / "tb")).Reload().SummaryMetadata(metadata.SESSION_START_INFO_TAG)
    hparams = metadata.parse_session_start_info_plugin_data(content.plugin_data.content).hparams
    assert {key: value.WhichOneof("kind") for key, value in hparams.items()} == {
        "seed": "number_value",
        "routing.iterations": "number_value",
        "routing._target_": "string_value",
    }


def test_timing_goes_only_to_tensorboard(tmp_path):
    written = record(tmp_path)
    written.log_timing(1, {"images_per_second": 100.0})
    written.close("completed")
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [event.value for event in events.Scalars("images_per_second")] == [100.0]


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_images_are_shown_in_rows(channels, tmp_path):
    written = record(tmp_path)
    images = torch.rand(4, channels, 5, 6)
    written.log_images(0, "reconstruction", [images, images])
    written.close("completed")
    (image,) = (
        EventAccumulator(str(tmp_path / "tb"), size_guidance={"images": 0}).Reload().Images("reconstruction")
    )
    assert (image.height, image.width) == (2 * 6 + 1, 4 * 7 + 1)
    with Image.open(tmp_path / "figures" / "reconstruction.png") as shown:
        assert shown.size == (4 * 7 + 1, 2 * 6 + 1)


# Checkpoints that do not fit metrics.jsonl


@pytest.mark.parametrize(
    ("start_step", "length"),
    [(2, 3), (2, 25), (1, 44), (3, 22), (0, 22), (0, 44), (5, 0)],
    ids=["in a line", "in a line", "later lines", "lost line", "step 0", "step 0", "all lines lost"],
)
def test_a_checkpoint_that_does_not_fit_the_metrics_changes_nothing(start_step, length, tmp_path):
    content = b"".join(b'{"step": %d, "a": 0.5}\n' % step for step in (1, 2, 3))
    assert len(content) == 3 * 22
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"does not fit the checkpoint of step {start_step}, which was saved"):
        record(tmp_path, start_step=start_step, length=length)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("line", [b"{", b"5", b"[1]", b'{"a": 1}', b'{"step": "1"}', b"\x80", b"[" * 9999])
def test_damaged_metrics_are_refused_in_one_line(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(line + b"\n")
    with pytest.raises(UserError, match="does not fit the checkpoint"):
        record(tmp_path, start_step=1, length=len(line) + 1)


# TensorBoard's files


def write_steps(written, *steps):
    for step in steps:
        written.log_metrics(step, {"loss": float(step)})
        written.log_timing(step, {"speed": 10.0 * step})
        written.log_images(step, "grid", [torch.full((1, 1, 2, 2), step / 100)])


def shown(path, kind="Scalars", tag="loss"):
    loaded = EventAccumulator(str(path / "tb"), size_guidance={"scalars": 0, "images": 0}).Reload()
    return [event.step for event in getattr(loaded, kind)(tag)]


@pytest.mark.parametrize("behind", [0, 86400, -86400, 1e9])
def test_a_resumed_run_is_shown_whole_whatever_the_clock_says(behind, tmp_path, monkeypatch):
    now = [1.7e9]
    monkeypatch.setattr(events.time, "time", lambda: now[0])
    first = record(tmp_path)
    write_steps(first, 1, 2)
    length = first.flushed_bytes()
    write_steps(first, 3)
    first.close("interrupted")
    for step in (2, 4):
        now[0] -= behind
        resumed = record(tmp_path, start_step=step, length=length)
        write_steps(resumed, step + 1, step + 2)
        length = resumed.flushed_bytes()
        resumed.close("completed")
        assert shown(tmp_path) == list(range(1, step + 3))
    names = [path.name for path in sorted((tmp_path / "tb").iterdir())]
    assert names[-1].endswith(".end")
    assert len(set(names)) == 5


def newest(path):
    return sorted((path / "tb").glob("events*"))[-1]


def cut_off(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def zeroes(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def empty(path):
    path.write_bytes(b"")


def missing(path):
    path.unlink()


@pytest.mark.parametrize("lose", [cut_off, zeroes, empty, missing])
def test_points_that_a_power_cut_has_lost_are_written_again_once(lose, tmp_path):
    first = record(tmp_path)
    write_steps(first, *range(1, 9))
    length = first.flushed_bytes()
    first.close("interrupted")
    lose(newest(tmp_path))
    assert shown(tmp_path) != list(range(1, 9)) if lose in (cut_off, zeroes) else True
    resumed = record(tmp_path, start_step=8, length=length)
    write_steps(resumed, 9)
    resumed.close("completed")
    assert shown(tmp_path) == list(range(1, 10))
    images, timings = shown(tmp_path, "Images", "grid"), shown(tmp_path, tag="speed")
    assert images == sorted(set(images))
    assert timings == sorted(set(timings))


def test_lost_points_between_others_are_written_again_and_images_and_timings_stay(tmp_path):
    length = 0
    for step in (0, 3, 6):
        written = record(tmp_path, start_step=step, length=length)
        write_steps(written, *range(step + 1, step + 4))
        length = written.flushed_bytes()
        written.close("interrupted")
    middle = sorted((tmp_path / "tb").glob("events*"))[2]
    middle.unlink()
    written = record(tmp_path, start_step=9, length=length)
    write_steps(written, 10)
    written.close("completed")
    assert shown(tmp_path) == list(range(1, 11))
    assert shown(tmp_path, "Images", "grid") == [1, 2, 3, 7, 8, 10]
    assert [step for step in shown(tmp_path, tag="speed") if step in (7, 8)] == [7, 8]


def test_a_run_of_a_version_that_named_files_after_a_clock_set_back_is_shown_whole(tmp_path):
    first = record(tmp_path)
    write_steps(first, 1, 2)
    length = first.flushed_bytes()
    first.close("interrupted")
    second = record(tmp_path, start_step=2, length=length)
    write_steps(second, 3, 4)
    length = second.flushed_bytes()
    second.close("interrupted")
    newest(tmp_path).rename(tmp_path / "tb" / "events.out.tfevents.0000000005.host.1")
    assert shown(tmp_path) == [1, 2]
    third = record(tmp_path, start_step=4, length=length)
    write_steps(third, 5)
    third.close("completed")
    assert shown(tmp_path) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["metrics.jsonl", "tb", "figures"])
def test_a_file_that_cannot_be_written_is_named(name, tmp_path):
    path = tmp_path / name
    path.mkdir() if name == "metrics.jsonl" else path.write_text("")

    def write():
        written = record(tmp_path)
        with closing(written):
            write_steps(written, 1)

    with pytest.raises(WriteError, match=f"^cannot write into {path}: "):
        write()


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["true", "false"])
def test_a_server_shows_every_run_once_with_its_end_and_each_step_once(loader, tmp_path, tensorboard, until):
    ends = {"good": "completed", "bad": "failed", "cut off": "interrupted", "fixed": "failed"}
    for seed, (name, end) in enumerate(ends.items()):
        written = record(tmp_path / name, seed=seed)
        written.log_metrics(1, {"train/loss": 1.0})
        length = written.flushed_bytes()  # a checkpoint, of the same length in each run
        written.log_metrics(2, {"train/loss": 2.0})
        written.close(end)
    record(tmp_path / "other", extra="forgotten").close("completed")
    time.sleep(1.1)  # files of one second are sorted by a counter as text: 10 before 9
    for name in ("good", "fixed"):
        resumed = record(tmp_path / name, start_step=1, length=length)
        resumed.log_metrics(2, {"train/loss": 3.0})
        resumed.close("completed")
    record(tmp_path / "other", rate=7).close("completed")
    query = {
        "allowedStatuses": ["STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING", "STATUS_UNKNOWN"],
        "colParams": [{"hparam": key} for key in ("seed", "model.leaky", "model.rate", "rate", "extra")],
        "startIndex": 0,
        "sliceSize": 100,
    }
    with tensorboard(tmp_path, f"--load_fast={loader}") as get:
        groups = until(
            lambda: get("data/plugin/hparams/session_groups", query).get("sessionGroups", []),
            lambda groups: sum(len(group["sessions"]) for group in groups) == 5,
        )
        other, seeds = sorted(groups, key=lambda group: len(group["sessions"]))
        assert {session["name"]: session["status"] for session in seeds["sessions"]} == {
            "good/tb": "STATUS_SUCCESS",
            "bad/tb": "STATUS_FAILURE",
            "cut off/tb": "STATUS_UNKNOWN",
            "fixed/tb": "STATUS_SUCCESS",
        }
        assert seeds["hparams"]["model.leaky"] is True
        assert seeds["hparams"]["model.rate"] == 0.5
        # A run that resumed with another config shows that config.
        assert other["hparams"]["rate"] == 7
        assert not other["hparams"].get("extra")
        runs = get("data/runs")
        assert sorted(runs) == ["bad/tb", "cut off/tb", "fixed/tb", "good/tb", "other/tb"]
        # Step 1 is the checkpoint's: TensorBoard drops it and later ones, so the record writes it again.
        until(
            lambda: get("data/plugin/scalars/scalars?tag=train/loss&run=good/tb"),
            lambda points: [(step, value) for _, step, value in points] == [(1, 1.0), (2, 3.0)],
        )
