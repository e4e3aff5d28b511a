import matplotlib.image
import pytest

from capsexp.analysis.speed import growth
from capsexp.config.build import build_components
from capsexp.errors import UserError


def test_along_each_axis_one_thing_grows_and_every_network_can_be_built(em_config):
    found = growth.axes(em_config("dataset=smallnorb"))
    assert [len(points) for points in found.values()] == [5, 5, 4, 4]
    models = {
        axis: [build_components(changed, plugins=[]).new_model() for _, changed in points]
        for axis, points in found.items()
    }
    assert [model.conv_caps_1.routing.iterations for model in models["iterations"]] == [1, 2, 3, 4, 5]
    types = [model.class_caps.weight.shape[0] for model in models["capsule types, relative"]]
    assert types == [8, 16, 24, 32]
    sides = [value for value, _ in found["side of a picture, pixels"]]
    assert sides == [16, 32, 48, 64]
    rows = [model.conv_caps_1.grid.rows for model in models["side of a picture, pixels"]]
    assert rows == sorted(set(rows))
    assert [changed["trainer"]["batch_size"] for _, changed in found["batch"]] == [8, 16, 32, 64, 128]


def test_the_picture_shows_what_was_measured(em_config, monkeypatch, tmp_path, capsys):
    asked = []

    def measured(what, variants, *, plugins):
        asked.append(variants)
        return {"seconds": 0.1 * len(asked), "bytes": 2**20 * len(asked)}

    monkeypatch.setattr(growth, "in_process", measured)
    monkeypatch.setattr(growth, "BATCHES", (2, 4))
    monkeypatch.setenv("COLUMNS", "160")
    growth.growth(em_config(), tmp_path / "cost.png", plugins=[])
    assert len(asked) == 2 * (2 + 5 + 4)
    assert {name for variants in asked for name in variants} == {"routing", "reference"}
    assert matplotlib.image.imread(tmp_path / "cost.png").std() > 0
    told = capsys.readouterr().out
    assert "2.200" in told
    assert "22" in told


@pytest.mark.parametrize(
    ("overrides", "name", "message"),
    [
        (["routing.implementation=reference"], "cost.png", "one implementation only"),
        ([], "cost.xyz", r"must be an image file \(.*png.*\), got .*cost.xyz"),
        ([], "none/cost.png", "there is no folder .*none"),
    ],
)
def test_what_cannot_be_drawn_is_told_before_anything_is_measured(
    em_config, tmp_path, overrides, name, message
):
    with pytest.raises(UserError, match=message):
        growth.growth(em_config(*overrides), tmp_path / name, plugins=[])
