import pytest

from capsexp.analysis.speed import bench, floor, measure
from capsexp.analysis.speed.variants import Variant

SPEED = {
    "batch": 4,
    "data": 0.01,
    "training": {"routing": [2.0, 4.0, 8.0], "reference": [4.0, 12.0, 16.0], "no routing": [1.0, 2.0, 4.0]},
}
SPEED["inference"] = SPEED["training"]


@pytest.fixture
def quick(monkeypatch):
    def in_this_process(kind, variants, *, plugins):
        plain = {name: tuple(variant) for name, variant in variants.items()}
        results = measure.measure({"kind": kind, "variants": plain, "plugins": plugins})
        # The peak of earlier tests in this process may be higher: then this measurement is 0 bytes.
        return {**results, "bytes": results["bytes"] + 1} if kind == "peak" else results

    monkeypatch.setattr(measure, "WARM_UP", 1)
    monkeypatch.setattr(measure, "REPEATS", 3)
    monkeypatch.setattr(floor, "COPIED", 2**20)
    monkeypatch.setattr(bench, "in_process", in_this_process)
    monkeypatch.setenv("COLUMNS", "160")


def test_every_number_of_the_table_is_measured(quick, tiny_config, capsys):
    bench.bench(tiny_config("trainer.batch_size=16"), plugins=[])
    text = capsys.readouterr().out
    assert "CapsNet" in text
    assert "batch 16" in text
    for label in (
        *("training images/s", "inference images/s", "data share", "no routing", "ratio to no routing"),
        *("ratio to reference", "class_caps", "ms/image", "times that of reference", "memory floor"),
    ):
        assert label in text
    assert "class_caps.routing takes the fused path" in text
    assert "reference path" not in text


def test_a_layer_that_takes_the_plain_path_is_named_with_the_reason(quick, em_config, capsys):
    bench.bench(em_config("routing.activation=mixing", "trainer.batch_size=4"), plugins=[])
    text = capsys.readouterr().out
    for layer in ("conv_caps_1", "conv_caps_2", "class_caps"):
        assert (
            f"{layer}.routing takes the reference path: there is no fused EM routing with activation mixing"
            in text
        )


def test_a_network_is_compared_with_its_reference_compiled_or_not(tiny_config):
    config = tiny_config()
    assert list(bench.variants_of(config, routed=True, compiled=False)) == [
        "routing",
        "reference",
        "no routing",
    ]
    variants = bench.variants_of(config, routed=False, compiled=True)
    assert list(variants) == ["routing", "reference", "reference, compiled", "routing, compiled"]
    assert variants["routing"] == Variant(config)
    for name in ("reference", "reference, compiled"):
        for node in (variants[name].config["routing"], variants[name].config["model"]["routing"]):
            assert node["implementation"] == "reference"
    plain = tiny_config("routing.implementation=reference")
    assert list(bench.variants_of(plain, routed=False, compiled=False)) == ["routing"]


def test_ratios_are_of_neighboring_steps():
    peaks = {"routing": 110, "no routing": 100, "reference": 1100}
    assert bench.ratio_row("tuned", "no routing", SPEED, peaks) == [
        *("tuned", "ratio to no routing", "0.5", "0.5", "1.100", "")
    ]
    assert bench.ratio_row("tuned", "reference", SPEED, peaks)[2:5] == ["2", "2", "0.100"]


def test_layers_are_reported_in_milliseconds_per_image():
    measured = {"batch": 4, "class_caps": {"routing": [0.004, 0.008], "reference": [0.016, 0.032]}}
    assert bench.layer_rows("tuned", measured) == [
        ["tuned", "class_caps", "routing", "1.500", ""],
        ["tuned", "class_caps", "reference", "6.000", "4 times that of reference"],
    ]


def test_a_network_without_routing_is_measured_alone(quick, capsys):
    from capsexp.config.compose import compose, to_plain

    overrides = ["device=cpu", "model=cnn_sabour", "model.conv_channels=[2,2]", "model.hidden=[4,4]"]
    settings = to_plain(compose("train", [*overrides, "trainer.batch_size=8"], config_dir=None))
    bench.bench(settings, plugins=[])
    assert "ratio to" not in capsys.readouterr().out


def test_cluster_routing_is_compared_with_equal_weights(quick, capsys):
    from capsexp.config.compose import compose, to_plain

    overrides = ["device=cpu", "model=cluster_small", "trainer.batch_size=8"]
    bench.bench(to_plain(compose("train", overrides, config_dir=None)), plugins=[])
    text = capsys.readouterr().out
    assert "ratio to no routing" in text
    assert "ratio to reference" not in text
