"""What a routing may have beside its call, and what the layers and the training loop make of it."""

import pytest
import torch
from torch import nn

from capsexp.capsules import Capsules, Routed
from capsexp.config.build import build
from capsexp.config.compose import compose, to_plain
from capsexp.layer.class_caps import ClassCaps
from capsexp.routing import (
    AgreementRouting,
    BalancedRouting,
    FusedRouting,
    Scheduled,
    TracedRouting,
    advance,
)
from capsexp.schedule import Step

PROTOCOLS = (FusedRouting, BalancedRouting, Scheduled, TracedRouting, AgreementRouting)


def routing(name):
    return build(to_plain(compose("train", [f"routing={name}"], config_dir=None))["routing"], at="routing")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("em", (True, True, True, True, False)),
        ("dynamic", (True, False, False, True, True)),
        ("uniform", (True, False, False, True, False)),
        ("self_routing", (False, False, False, False, False)),
        ("inverted", (False, False, False, True, False)),
    ],
)
def test_a_routing_has_the_protocols_of_its_methods(name, expected):
    built = routing(name)(6, 4, 8)
    assert tuple(isinstance(built, protocol) for protocol in PROTOCOLS) == expected


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("em", "EMRouting(in_caps=8, out_caps=5, pose_dim=16, iterations=3)"),
        ("dynamic", "DynamicRouting(in_caps=8, out_caps=5, pose_dim=16, iterations=3)"),
        ("uniform", "UniformRouting(in_caps=8, out_caps=5, pose_dim=16)"),
        ("self_routing", "SelfRouting(in_caps=8, out_caps=5, pose_dim=16)"),
        ("inverted", "InvertedRouting(in_caps=8, out_caps=5, pose_dim=16, iterations=2)"),
    ],
)
def test_a_routing_shows_its_sizes(name, shown):
    assert repr(routing(name)(8, 5, 16)) == shown


class Mean(nn.Module):
    """The least that a routing needs."""

    def forward(self, votes, activations):
        poses = votes.mean(1)
        return Routed(poses, poses.norm(dim=2).sigmoid(), torch.full_like(votes[..., 0], 0.25))


def layer_of(make):
    torch.manual_seed(0)
    return ClassCaps(6, 3, 4, 8, shared_transformations=False, routing=make, votes_mib=None)


def test_the_call_alone_makes_a_routing():
    layer, capsules = layer_of(lambda *sizes: Mean()), Capsules(torch.randn(2, 6, 3), torch.rand(2, 6))
    layer.calibrate(capsules)
    assert layer.fused_reason() == "there is no fused Mean for ClassCaps"
    torch.testing.assert_close(layer(capsules).poses, layer.votes(capsules.poses).mean(1))
    assert advance(layer, Step(0, 1)) == {}


def test_a_fused_path_for_other_layers_is_not_taken():
    layer = layer_of(routing("em"))  # em.cpp makes the votes of matrix capsules
    assert layer.fused_reason() == "there is no fused EMRouting for ClassCaps"
