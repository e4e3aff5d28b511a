"""Which value wins, and what an override can set."""

import pytest

from capsexp.config.build import build_components
from capsexp.config.compose import compose, to_plain
from capsexp.errors import UserError
from capsexp.schedule import Linear, Step, Warmup


def composed(*overrides, **keywords):
    return to_plain(compose("train", list(overrides), config_dir=None, **keywords))


def test_the_command_line_wins_over_an_experiment_over_a_group():
    assert composed()["loss"]["reconstruction_weight"] == 0.0005
    assert composed("experiment=sabour2017_mnist_official")["loss"]["reconstruction_weight"] == 0.01
    both = composed("experiment=sabour2017_mnist_official", "loss.reconstruction_weight=0.5")
    assert both["loss"]["reconstruction_weight"] == 0.5


def test_a_model_brings_its_loss_and_its_routing():
    baseline = composed("model=cnn_sabour")
    assert baseline["loss"]["_target_"] == "capsexp.loss.cross_entropy.CrossEntropy"
    assert baseline.get("routing") is None
    assert build_components(baseline, plugins=[]).new_model is not None


def test_the_command_line_wins_over_what_a_model_brings():
    assert composed("model=cnn_sabour", "loss=margin")["loss"]["_target_"] == "capsexp.loss.margin.Margin"
    assert composed("loss=margin", "model=cnn_sabour")["loss"]["_target_"] == "capsexp.loss.margin.Margin"
    assert composed("model=cnn_sabour", "optimizer=sgd")["optimizer"]["_target_"] == "torch.optim.SGD"
    uniform = composed("model=dynamic_routing", "routing=uniform")
    assert uniform["model"]["routing"] == uniform["routing"]
    assert uniform["routing"]["_target_"] == "capsexp.routing.uniform.UniformRouting"


MINE = """
defaults:
  - dynamic_routing
  - _self_
  - override /optimizer@_global_.optimizer: sgd
class_dim: 4
"""
RECIPE = """
# @package _global_
defaults:
  - override /model: mine
  - override /loss: cross_entropy
model:
  class_dim: 6
"""


def test_an_experiment_wins_over_what_its_model_brings(own):
    folder = own("model/mine", MINE)
    mine = to_plain(compose("train", ["model=mine"], config_dir=folder))
    assert mine["optimizer"]["_target_"] == "torch.optim.SGD"
    assert mine["loss"]["_target_"] == "capsexp.loss.margin.Margin"
    assert mine["model"]["class_dim"] == 4
    own("experiment/recipe", RECIPE)
    recipe = to_plain(compose("train", ["experiment=recipe"], config_dir=folder))
    assert recipe["loss"]["_target_"] == "capsexp.loss.cross_entropy.CrossEntropy"
    assert recipe["optimizer"]["_target_"] == "torch.optim.SGD"
    assert recipe["model"]["class_dim"] == 6
    last = to_plain(
        compose("train", ["experiment=recipe", "optimizer=adam", "model.class_dim=8"], config_dir=folder)
    )
    assert last["optimizer"]["_target_"] == "torch.optim.Adam"
    assert last["model"]["class_dim"] == 8


def test_a_users_own_root_config_is_found_in_a_users_own_folder(own):
    folder = own("mine", "defaults: [train, _self_]\nseed: 7\n")
    assert to_plain(compose("mine", [], config_dir=folder))["seed"] == 7


def test_a_shipped_option_cannot_be_shadowed(own):
    folder = own("loss/margin", "_target_: mine.Margin\n")
    assert (
        to_plain(compose("train", [], config_dir=folder))["loss"]["_target_"] == "capsexp.loss.margin.Margin"
    )


def loss_of(*overrides, **keywords):
    keywords.setdefault("config_dir", None)
    return build_components(to_plain(compose("train", list(overrides), **keywords)), plugins=[]).loss


def rate(*overrides):
    return build_components(composed(*overrides), plugins=[]).learning_rate


def test_a_learning_rate_may_be_a_number():
    assert [rate("optimizer.lr=0.01")(Step(number, 10)) for number in (0, 5, 10)] == [0.01] * 3
    assert rate("optimizer.lr=1")(Step(3, 10)) == 1.0


def test_one_key_of_a_learning_rate_may_be_changed():
    assert rate("optimizer.lr.start=0.5")(Step(0, 10)) == 0.5
    assert rate("optimizer=sgd")(Step(0, 10)) == 0.05
    assert rate("optimizer=sgd")(Step(10, 10)) == 0.0


LINEAR = "{_target_: capsexp.schedule.Linear, start: 0.0, end: 0.01, steps: 0.5}"


def test_a_learning_rate_may_get_another_schedule():
    schedule = rate("~optimizer.lr", f"+optimizer.lr={LINEAR}")
    assert isinstance(schedule, Linear)
    assert [schedule(Step(number, 10)) for number in (0, 5)] == [0.0, 0.01]


def test_a_schedule_may_stand_for_a_weight_on_the_command_line():
    weight = loss_of(f"loss.reconstruction_weight={LINEAR}").reconstruction_weight
    assert isinstance(weight, Linear)
    assert weight(Step(50, 100)) == 0.01
    nested = f"{{_target_: capsexp.schedule.Warmup, steps: 10, then: {LINEAR}}}"
    assert isinstance(loss_of(f"loss.reconstruction_weight={nested}").reconstruction_weight.then, Linear)


def test_a_schedule_may_stand_for_a_weight_in_a_users_yaml(own):
    text = "defaults: [margin, _self_]\nreconstruction_weight:\n  _target_: capsexp.schedule.Warmup\n"
    folder = own("loss/ramped", f"{text}  steps: 0.5\n  then: 0.5\n")
    loss = loss_of("loss=ramped", config_dir=folder)
    assert isinstance(loss.reconstruction_weight, Warmup)
    assert loss.reconstruction_weight(Step(99, 100)) == 0.5
    assert loss.present == 0.9


def test_a_mistake_in_a_schedule_is_reported_by_its_key():
    with pytest.raises(UserError, match=r"^loss.reconstruction_weight: steps must be an integer >= 1"):
        loss_of(f"loss.reconstruction_weight={LINEAR.replace('0.5', '2.5')}")
    with pytest.raises(UserError, match=r"^loss.reconstruction_weight.begin: Linear takes no 'begin'"):
        loss_of(f"loss.reconstruction_weight={LINEAR.replace('start', 'begin')}")


def test_places_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("CAPSEXP_DATA", "/a/b")
    monkeypatch.setenv("CAPSEXP_OUTPUTS", "/c")
    mnist = composed("dataset=mnist")
    assert (mnist["dataset"]["root"], mnist["output_root"]) == ("/a/b", "/c")
    assert composed("dataset=mnist", "data_root=/x")["dataset"]["root"] == "/x"
