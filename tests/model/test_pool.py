"""The control of every capsule network: the trunk, a mean, one linear map."""

import pytest
import torch

from capsexp.config.build import build
from capsexp.config.compose import compose, to_plain

SMALL = ["model=pool", "model.channels=[8,8]", "model.strides=[1,2]"]


def network(*overrides, image_shape=(1, 8, 8), classes=5):
    torch.manual_seed(0)
    settings = to_plain(compose("train", list(overrides), config_dir=None))
    return build(settings["model"], at="model", image_shape=image_shape, classes=classes)


def test_the_published_trunk_has_187656_parameters_and_the_map_325():
    net = network("model=pool", image_shape=(2, 96, 96))
    counts = [sum(parameter.numel() for parameter in part.parameters()) for part in (net.trunk, net.linear)]
    assert counts == [187_656, 325]


def test_logits_are_a_linear_map_of_the_mean_over_positions():
    net, images = network(*SMALL).eval(), torch.randn(3, 1, 8, 8)
    features = net.trunk(images)
    output = net(images)
    torch.testing.assert_close(output.scores, net.linear(features.flatten(2).mean(2)))
    torch.testing.assert_close(output.probabilities, output.scores.softmax(1))
    assert output.layers == {}
    assert [tensor.ndim for tensor in output.weights] == [4, 4, 2]


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("coordinates", ["true", "false"])
def test_gradients_reach_every_parameter(norm, coordinates):
    net = network(*SMALL, f"model.trunk_norm={norm}", f"model.coordinates={coordinates}")
    net(torch.randn(4, 1, 8, 8)).scores.square().sum().backward()
    assert all(parameter.grad.any() for parameter in net.parameters())
