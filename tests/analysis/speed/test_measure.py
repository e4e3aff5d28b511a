import subprocess

import pytest

from capsexp.analysis.speed import measure
from capsexp.analysis.speed.measure import Variant
from capsexp.errors import UserError


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(measure, "WARM_UP", 1)
    monkeypatch.setattr(measure, "REPEATS", 3)


def task(what, **variants):
    return {"what": what, "variants": {name: tuple(one) for name, one in variants.items()}, "plugins": []}


def test_the_networks_take_turns(quick, tiny_parts):
    order = []
    actions = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    seconds = measure.in_turns(actions, tiny_parts())
    assert order == ["a", "b"] * 4
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_the_compared_network_has_the_same_parameters_and_no_votes(tiny_parts):
    model = tiny_parts().new_model()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert measure.is_routed(model)
    without = measure.without_routing(model)
    assert sum(parameter.numel() for parameter in without.parameters()) == count
    assert not measure.is_routed(without)


def test_speed_has_every_network_in_both_phases(quick, tiny_config):
    config = tiny_config("trainer.batch_size=8")
    told = measure.measure(task("speed", a=Variant(config), b=Variant(config, routed=False)))
    assert told["batch"] == 8
    for phase in ("training", "inference"):
        assert {name: len(times) for name, times in told[phase].items()} == {"a": 3, "b": 3}
        assert min(min(times) for times in told[phase].values()) > 0
    assert told["data"] > 0


def test_every_routed_layer_is_measured_alone(quick, tiny_config, em_config):
    config = tiny_config("trainer.batch_size=8")
    assert measure.measure(task("layers", a=Variant(config))).keys() == {"batch", "class_caps"}
    told = measure.measure(task("layers", a=Variant(em_config("trainer.batch_size=8"))))
    assert told.keys() == {"batch", "conv_caps_1", "conv_caps_2", "class_caps"}
    assert all(min(told[name]["a"]) > 0 for name in told if name != "batch")


def test_a_process_of_its_own_measures_the_peak(tiny_config):
    config = tiny_config("trainer.batch_size=8")
    told = measure.in_process("peak", {"a": Variant(config)}, plugins=[])
    assert told["bytes"] > 2**20
    assert told["seconds"] > 0


def test_a_measurement_that_fails_is_told(tiny_config, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 9, stdout=""))
    with pytest.raises(UserError, match="a measurement failed with code 9"):
        measure.in_process("peak", {"a": Variant(tiny_config())}, plugins=[])
