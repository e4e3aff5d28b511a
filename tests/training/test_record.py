import json
import time

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from capsexp.errors import UserError
from capsexp.training.record import Record

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
    written.metrics(3, {"train/loss": 0.1234567890123456789, "train/accuracy": 1 / 3}, epoch=1)
    written.close("completed")
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 3, "epoch": 1, "train/loss": 0.1234567890123456789, "train/accuracy": 1 / 3}


def test_what_stands_after_the_checkpoint_is_cut_off(tmp_path):
    first = record(tmp_path)
    first.metrics(1, {"loss": 1.0})
    length = first.length()
    first.metrics(2, {"loss": 2.0})
    first.close("completed")
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 3, "lo')  # killed in the middle of a line
    second = record(tmp_path, start_step=1, length=length)
    assert second.length() == length
    second.metrics(2, {"loss": 2.5})
    second.close("completed")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.5}]


def test_a_shorter_file_than_the_checkpoint_knows_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl is shorter than when its checkpoint was made"):
        record(tmp_path, start_step=1, length=10)


def test_the_table_of_settings_has_each_once_and_typed(tmp_path):
    routing = {"iterations": 3, "_partial_": True, "_target_": "EM", "part": {"_target_": "SplitName"}}
    record(tmp_path, routing=routing, model={"routing": routing, "padding": None}, data_root="/x").close(
        "completed"
    )
    content = EventAccumulator(str(tmp_path / "tb")).Reload().SummaryMetadata(metadata.SESSION_START_INFO_TAG)
    told = metadata.parse_session_start_info_plugin_data(content.plugin_data.content).hparams
    assert {key: value.WhichOneof("kind") for key, value in told.items()} == {
        "seed": "number_value",
        "routing.iterations": "number_value",
        "routing._target_": "string_value",
    }


def test_speed_goes_to_tensorboard_alone(tmp_path):
    written = record(tmp_path)
    written.speed(1, {"images_per_second": 100.0})
    written.close("completed")
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [event.value for event in events.Scalars("images_per_second")] == [100.0]


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_pictures_stand_in_rows(channels, tmp_path):
    written = record(tmp_path)
    pictures = torch.rand(4, channels, 5, 6)
    written.pictures(0, "reconstruction", [pictures, pictures])
    written.close("completed")
    (image,) = (
        EventAccumulator(str(tmp_path / "tb"), size_guidance={"images": 0}).Reload().Images("reconstruction")
    )
    assert (image.height, image.width) == (2 * 6 + 1, 4 * 7 + 1)
    with Image.open(tmp_path / "figures" / "reconstruction.png") as shown:
        assert shown.size == (4 * 7 + 1, 2 * 6 + 1)


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["true", "false"])
def test_a_server_shows_every_run_once_with_its_true_end_and_no_doubled_steps(
    loader, tmp_path, tensorboard, until
):
    ends = {"good": "completed", "bad": "failed", "cut off": "interrupted", "mended": "failed"}
    for seed, (name, end) in enumerate(ends.items()):
        written = record(tmp_path / name, seed=seed)
        written.metrics(1, {"train/loss": 1.0})
        length = written.length()  # a checkpoint, of the same length in each run
        written.metrics(2, {"train/loss": 2.0})
        written.close(end)
    record(tmp_path / "other", extra="forgotten").close("completed")
    time.sleep(1.1)  # files of one second are read in the order of a counter: as text, 10 before 9
    for name in ("good", "mended"):
        resumed = record(tmp_path / name, start_step=1, length=length)
        resumed.metrics(2, {"train/loss": 3.0})
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
            lambda found: sum(len(group["sessions"]) for group in found) == 5,
        )
        other, seeds = sorted(groups, key=lambda group: len(group["sessions"]))
        assert {session["name"]: session["status"] for session in seeds["sessions"]} == {
            "good/tb": "STATUS_SUCCESS",
            "bad/tb": "STATUS_FAILURE",
            "cut off/tb": "STATUS_UNKNOWN",
            "mended/tb": "STATUS_SUCCESS",
        }
        assert seeds["hparams"]["model.leaky"] is True
        assert seeds["hparams"]["model.rate"] == 0.5
        # Resumed under another config, it shows that.
        assert other["hparams"]["rate"] == 7
        assert not other["hparams"].get("extra")
        runs = get("data/runs")
        assert sorted(runs) == ["bad/tb", "cut off/tb", "good/tb", "mended/tb", "other/tb"]
        # Step 1 is the checkpoint's own: dropped with what follows it, and repeated from metrics.jsonl.
        until(
            lambda: get("data/plugin/scalars/scalars?tag=train/loss&run=good/tb"),
            lambda points: [(step, value) for _, step, value in points] == [(1, 1.0), (2, 3.0)],
        )
