import matplotlib.image
import pytest

from capsexp.analysis.speed import growth
from capsexp.config.build import build_components
from capsexp.errors import UserError


def test_along_each_axis_one_setting_grows_and_every_network_can_be_built(em_config):
    axes = growth.axes(em_config("dataset=smallnorb"))
    assert [len(points) for points in axes.values()] == [5, 5, 4, 4]
    models = {
        axis: [build_components(changed, plugins=[]).new_model() for _, changed in points]
        for axis, points in axes.items()
    }
    assert [model.conv_caps_1.routing.iterations for model in models["iterations"]] == [1, 2, 3, 4, 5]
    types = [model.class_caps.weight.shape[0] for model in models["capsule types, relative"]]
    assert types == [8, 16, 24, 32]
    sides = [value for value, _ in axes["image side, pixels"]]
    assert sides == [16, 32, 48, 64]
    rows = [model.conv_caps_1.grid.rows for model in models["image side, pixels"]]
    assert rows == sorted(set(rows))
    assert [changed["trainer"]["batch_size"] for _, changed in axes["batch"]] == [8, 16, 32, 64, 128]


def test_the_figure_and_the_table_show_the_measurements(em_config, monkeypatch, tmp_path, capsys):
    measurements = []

    def measured(kind, variants, *, plugins):
        measurements.append(variants)
        return {"seconds": 0.1 * len(measurements), "bytes": 2**20 * len(measurements)}

    monkeypatch.setattr(growth, "in_process", measured)
    monkeypatch.setattr(growth, "BATCHES", (2, 4))
    monkeypatch.setenv("COLUMNS", "160")
    growth.growth(em_config(), tmp_path / "cost.png", plugins=[])
    assert len(measurements) == 2 * (2 + 5 + 4)
    assert {name for variants in measurements for name in variants} == {"routing", "reference"}
    assert matplotlib.image.imread(tmp_path / "cost.png").std() > 0
    printed = capsys.readouterr().out
    assert "2.200" in printed
    assert "22" in printed


@pytest.mark.parametrize(
    ("overrides", "name", "message"),
    [
        (["routing.implementation=reference"], "cost.png", "one implementation only"),
        ([], "cost.xyz", r"must be an image file \(.*png.*\), got .*cost.xyz"),
        ([], "none/cost.png", "there is no folder .*none"),
    ],
)
def test_a_figure_that_cannot_be_drawn_is_refused_before_measuring(
    em_config, tmp_path, overrides, name, message
):
    with pytest.raises(UserError, match=message):
        growth.growth(em_config(*overrides), tmp_path / name, plugins=[])
