"""How a config node becomes an object."""

from pathlib import Path

import pytest
import torch

from capsexp.config.build import build, build_components
from capsexp.config.compose import conf_dir
from capsexp.errors import UserError
from capsexp.schedule import Linear, Warmup


def test_nested_nodes_are_built_first_and_dicts_and_lists_kept():
    then = {"_target_": "capsexp.schedule.Linear", "start": 1.0, "end": 0.0, "steps": 10}
    node = {"a": [{"_target_": "capsexp.schedule.Warmup", "steps": 5, "then": then}, "b", None]}
    built = build(node, at="x")
    assert isinstance(built["a"][0], Warmup)
    assert isinstance(built["a"][0].then, Linear)
    assert built["a"][1:] == ["b", None]


def test_partial_leaves_the_call_to_whoever_completes_it():
    make = build({"_target_": "capsexp.schedule.Linear", "_partial_": True, "start": 1.0}, at="x")
    assert make(end=0.0, steps=4).end == 0.0
    with pytest.raises(UserError, match="x: steps must be an integer >= 1"):
        make(end=0.0, steps=0)
    with pytest.raises(UserError, match="x: Linear: missing a required argument: 'end'"):
        make(steps=4)
    whole = build(
        {"_target_": "capsexp.schedule.Linear", "_partial_": False, "start": 1.0, "end": 0.0, "steps": 1},
        at="x",
    )
    assert isinstance(whole, Linear)


def test_run_time_arguments_join_those_of_the_config():
    linear = build({"_target_": "torch.nn.Linear", "in_features": 3}, at="x", out_features=2)
    assert linear.out_features == 2


def test_the_components_are_those_of_the_config(edited):
    components = build_components(
        edited("seed=7", "optimizer._target_=torch.optim.AdamW", "optimizer.eps=1.0e-4"), plugins=[]
    )
    assert components.seed == 7
    assert components.dataset.image_shape == (1, 8, 8)
    optimizer = components.new_optimizer([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["eps"] == 1e-4
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_checking_leaves_the_random_state_and_builds_nothing_but_on_meta(edited):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    components = build_components(edited(), plugins=[])
    assert torch.equal(torch.get_rng_state(), before)
    assert {parameter.device.type for parameter in components.new_model().parameters()} == {"cpu"}
    assert Path(conf_dir()).is_dir()
