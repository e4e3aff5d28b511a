"""The figures of wrong test images show what the run has got wrong."""

import io
import json
from pathlib import Path

import make_error_figures as script
import pytest
import torch
from PIL import Image
from tile_sheet import WIDTH

from capsexp.analysis.trained_run import TrainedRun
from capsexp.data.split import Groups
from capsexp.errors import UserError
from capsexp.schedule import Step


def width_of(content):
    with Image.open(io.BytesIO(content)) as image:
        return image.width


def wrong(index, predicted, *, label=0):
    return script.Wrong(torch.rand(2, 32, 32), label, predicted, index)


def test_the_weights_are_those_that_the_run_tested(capsexp, tiny_overrides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    capsexp("train", *tiny_overrides, "trainer.max_epochs=2", "trainer.test=last", "run=run")
    run = script.load(Path("run"))
    assert run.step.number == 10
    mistakes, images = script.mistakes_of(run)
    tested = json.loads(Path("run/test_errors.json").read_text())
    assert (len(mistakes), images) == (tested["errors"], tested["images"])
    assert script.main(["run", "-o", "wrong.png"]) == 0
    assert width_of(Path("wrong.png").read_bytes()) <= WIDTH


def test_of_many_wrong_images_an_even_sample_is_drawn():
    tiles = script.image_tiles([wrong(n, 1, label=n // 60) for n in range(240)], ["a", "b", "c", "d"])
    assert len(tiles) == script.MOST_IMAGES
    assert [sum(tile.lines == (f"{name} → b",) for tile in tiles) for name in "abcd"] == [25] * 4


def test_one_image_stands_for_each_toy_that_is_often_wrong():
    groups = Groups("toy", ("car 0", "car 1", "car 2"), torch.tensor([0] * 10 + [1] * 10 + [2] * 10))
    mistakes = [wrong(0, 1), wrong(10, 1), wrong(11, 2), wrong(12, 2), wrong(13, 2), wrong(14, 1)]
    (tile,) = script.group_tiles(mistakes, groups, ("car", "truck", "human"), 30)
    assert tile.lines == ("car 1: 50.0 %", "→ human", "in 60 % of these")
    assert (tile.pixels == script.as_bytes(mistakes[3].pixels)).all()


@pytest.fixture
def pairs(tiny_components, tmp_path):
    """A run on pairs of digits with initial weights: a few of its predictions are right by chance."""
    torch.manual_seed(0)
    source = ("dataset=multimnist", "dataset@dataset.source=digits", "dataset.shift=2", "dataset.pad=2")
    components = tiny_components(*source, "trainer.limit_eval_batches=4")
    return TrainedRun(components.new_model(), components, path=tmp_path, step=Step(0, 1))


def test_pairs_have_their_reconstructions_beside_them(pairs):
    tiles, wrong, images, _ = script.pair_tiles(pairs)
    errors = 1 - pairs.evaluate("test")["accuracy"]
    assert images * errors == pytest.approx(wrong)
    assert all(tile.pixels.shape == (12, 36, 3) for tile in tiles)
    assert (tiles[0].pixels[:, 12:, 2] == 0).all()  # reconstructions are red and green
    rejected = [tile.lines[0] for tile in tiles if tile.lines[0].endswith(" (rejected)")]
    assert len(rejected) == min(images - wrong, script.MOST_RIGHT_PAIRS) > 0
    for line in rejected:
        labels, decoded = line.removesuffix(" (rejected)").split(" → ")
        assert decoded.split(", ")[0] == labels.split(", ")[0]
        assert decoded.split(", ")[1] not in labels.split(", ")
    assert width_of(script.sheet(pairs)) <= WIDTH


def test_without_a_decoder_the_pairs_stand_alone(pairs):
    pairs.model.decoder = None
    tiles, wrong, _, _ = script.pair_tiles(pairs)
    assert len(tiles) == min(wrong, script.MOST_WRONG_PAIRS)
    assert tiles[0].pixels.shape == (12, 12, 3)


def test_a_run_without_mistakes_and_a_folder_without_a_run_are_refused(pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "pair_tiles", lambda run: ([], 0, 10, "pairs"))
    with pytest.raises(UserError, match="no test image is wrong"):
        script.sheet(pairs)
    assert script.main([str(tmp_path / "nowhere"), "-o", str(tmp_path / "a.png")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
