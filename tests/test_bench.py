import pytest

from capsexp import bench


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bench, "WARM_UP", 1)
    monkeypatch.setattr(bench, "REPEATS", 3)
    monkeypatch.setattr(bench, "_in_process", bench.measure)
    monkeypatch.setenv("COLUMNS", "160")


def test_every_figure_of_the_table_comes_from_a_measurement(quick, tiny_config, capsys):
    bench.bench(tiny_config("trainer.batch_size=16"), plugins=[])
    text = capsys.readouterr().out
    assert "CapsNet" in text
    assert "batch 16" in text
    for word in ("training images/s", "inference images/s", "data share", "no routing", "ratio"):
        assert word in text


def test_the_two_networks_take_turns(quick, tiny_parts):
    order = []
    actions = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    seconds = bench._in_turns(actions, tiny_parts())
    assert order == ["a", "b"] * 4
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_the_compared_network_has_the_same_parameters_and_no_votes(tiny_parts):
    model = tiny_parts().new_model()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert bench._routed(model)
    without = bench._without_routing(model)
    assert sum(parameter.numel() for parameter in without.parameters()) == count
    assert not bench._routed(without)


def test_ratios_are_of_neighbouring_steps():
    speed = {"training": {"routing": [2.0, 4.0, 8.0], "no routing": [1.0, 2.0, 4.0]}}
    speed["inference"] = speed["training"]
    memory = {"routing": {"bytes": 110}, "no routing": {"bytes": 100}}
    assert bench._ratios("tuned", speed, memory) == ["tuned", "ratio", "0.500", "0.500", "1.10", ""]


def test_a_network_without_routing_is_measured_alone(quick, tiny_config, capsys):
    from capsexp import config

    overrides = ["device=cpu", "model=cnn_sabour", "model.conv_channels=[2,2]", "model.hidden=[4,4]"]
    settings = config.plain(config.compose("train", [*overrides, "trainer.batch_size=8"], config_dir=None))
    bench.bench(settings, plugins=[])
    assert "ratio" not in capsys.readouterr().out
