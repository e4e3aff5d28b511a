import io
import json
import subprocess
import sys

import pytest

from capsexp.analysis.speed import floor, measure, variants
from capsexp.analysis.speed.variants import Variant
from capsexp.errors import UserError


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(measure, "WARM_UP", 1)
    monkeypatch.setattr(measure, "REPEATS", 3)
    monkeypatch.setattr(floor, "COPIED", 2**20)


def task(kind, **variants):
    plain = {name: tuple(variant) for name, variant in variants.items()}
    return {"kind": kind, "variants": plain, "plugins": []}


def test_the_networks_take_turns(quick, tiny_components):
    order = []
    actions = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    seconds = measure.in_turns(actions, tiny_components())
    assert order == ["a", "b"] * 4
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_the_compared_network_has_the_same_parameters_and_no_votes(tiny_components):
    model = tiny_components().new_model()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert variants.is_routed(model)
    without = variants.without_routing(model)
    assert sum(parameter.numel() for parameter in without.parameters()) == count
    assert not variants.is_routed(without)


def test_speed_has_every_network_in_both_phases(quick, tiny_config):
    config = tiny_config("trainer.batch_size=8")
    measured = measure.measure(task("speed", a=Variant(config), b=Variant(config, routed=False)))
    assert measured["batch"] == 8
    for phase in ("training", "inference"):
        assert {name: len(times) for name, times in measured[phase].items()} == {"a": 3, "b": 3}
        assert min(min(times) for times in measured[phase].values()) > 0
    assert measured["data"] > 0
    assert measured["floor"] == measured["bytes"] / measured["bandwidth"]


def test_training_alone_ends_after_its_time(quick, tiny_config):
    variants = {name: Variant(tiny_config("trainer.batch_size=8")) for name in ("a", "b")}
    measured = measure.measure({**task("training", **variants), "limit": 0.0001})
    assert {name: len(times) for name, times in measured["training"].items()} == {"a": 1, "b": 1}
    assert "inference" not in measured


def test_every_routed_layer_is_measured_alone(quick, tiny_config, em_config):
    config = tiny_config("trainer.batch_size=8")
    assert measure.measure(task("layers", a=Variant(config))).keys() == {"batch", "class_caps"}
    measured = measure.measure(task("layers", a=Variant(em_config("trainer.batch_size=8"))))
    assert measured.keys() == {"batch", "conv_caps_1", "conv_caps_2", "class_caps"}
    assert all(min(measured[name]["a"]) > 0 for name in measured if name != "batch")


def test_the_peak_is_measured_in_a_new_process(tiny_config):
    config = tiny_config("trainer.batch_size=8")
    measured = measure.in_process("peak", {"a": Variant(config)}, plugins=[])
    assert measured["bytes"] > 2**20
    assert measured["seconds"] > 0


def test_a_failed_measurement_is_an_error(tiny_config, monkeypatch):
    for printed, message in (
        ("", "a measurement failed with code 9$"),
        ('{"failed": "RuntimeError: no"}\n', "a measurement failed with code 9: RuntimeError: no$"),
    ):
        done = subprocess.CompletedProcess([], 9, stdout=printed)
        monkeypatch.setattr(subprocess, "run", lambda *a, done=done, **k: done)
        with pytest.raises(UserError, match=message):
            measure.in_process("peak", {"a": Variant(tiny_config())}, plugins=[])


def test_the_process_that_measures_says_what_went_wrong(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(task("none"))))
    with pytest.raises(StopIteration):
        measure.answer()
    assert json.loads(capsys.readouterr().out) == {"failed": "StopIteration: StopIteration"}


def test_a_measurement_that_takes_too_long_is_killed(tiny_config):
    with pytest.raises(TimeoutError, match="a measurement took longer than 0 s"):
        measure.in_process("peak", {"a": Variant(tiny_config())}, plugins=[], timeout=0.01)
