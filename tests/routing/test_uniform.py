import functools

import pytest
import torch

from capsexp.capsules import Batch, Capsules
from capsexp.config.build import build
from capsexp.config.compose import compose, to_plain
from capsexp.layer.dense_caps import DenseCaps
from capsexp.layer.matrix_caps import ConvCaps, SharedClassCaps
from capsexp.ops.receptive_fields import Grid, receptive_fields
from capsexp.ops.squash import length, squash
from capsexp.routing.dynamic import dynamic_routing_reference
from capsexp.routing.uniform import UniformRouting, uniform_routing
from capsexp.schedule import Step


def test_uniform_is_dynamic_routing_with_one_iteration():
    votes, bias = torch.randn(2, 7, 4, 3).double(), torch.randn(4, 3).double()
    expected = dynamic_routing_reference(
        votes, iterations=1, prior=None, bias=bias, leaky=False, detach=False
    )
    for tensor, other in zip(expected[:3], uniform_routing(votes, bias=bias)[:3], strict=True):
        torch.testing.assert_close(other, tensor)


def test_bias_is_a_switch():
    assert not list(UniformRouting(7, 4, 3, bias=False).parameters())
    assert [tuple(tensor.shape) for tensor in UniformRouting(7, 4, 3, bias=True).parameters()] == [(4, 3)]


def test_bias_is_added_before_the_squash():
    routing = UniformRouting(7, 4, 3, bias=True)
    votes = torch.randn(2, 7, 4, 3)
    expected = uniform_routing(votes, bias=torch.full((4, 3), 0.1))
    torch.testing.assert_close(routing(votes, torch.ones(2, 7)).poses, expected.poses)


def test_bfloat16_votes_are_summed_in_float32():
    votes = torch.randn(2, 7, 4, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        routed = uniform_routing(votes, bias=None)
    torch.testing.assert_close(routed.poses, uniform_routing(votes.float(), bias=None).poses, rtol=0, atol=0)


# rows, columns, child types, kernel, stride
WINDOWS = [(4, 3, 2, (2, 2), 1), (5, 5, 1, (3, 3), 2), (1, 1, 1, (1, 1), 1), (7, 4, 1, (2, 2), 3)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_each_window_is_dense_uniform_routing(window):
    rows, columns, types, kernel, stride = window
    fields = receptive_fields(Grid(rows, columns), types, kernel, stride)
    votes, bias = torch.randn(2, *fields.children.shape, 4, 3).double(), torch.randn(4, 3).double()
    routed = uniform_routing(votes, bias=bias, fields=fields)
    assert routed.fields is fields
    assert routed.coupling.shape == votes.shape[:-1]
    assert (routed.coupling == 1 / 4).all()
    poses, activations = routed.poses.unflatten(1, (-1, 4)), routed.activations.unflatten(1, (-1, 4))
    for position in range(len(fields.children)):
        alone = uniform_routing(votes[:, position], bias=bias)
        torch.testing.assert_close(poses[:, position], alone.poses)
        torch.testing.assert_close(activations[:, position], alone.activations)


@pytest.mark.parametrize("bias", [False, True])
def test_dense_values_are_those_of_plain_sums_bit_for_bit(bias):
    votes, start = torch.randn(2, 7, 4, 3), torch.full((4, 3), 0.1)
    total = votes.sum(1) / 4
    poses = squash(total + start if bias else total)
    routed = UniformRouting(7, 4, 3, bias=bias)(votes, torch.ones(2, 7))
    assert torch.equal(routed.poses, poses)
    assert torch.equal(routed.activations, length(poses))


def layers():
    """Windows, class capsules with coordinates, capsules with shared matrices; with biases."""
    routing = functools.partial(UniformRouting, bias=True)
    options = {"routing": routing, "vote_bias": True, "init_noise": 1.0}
    yield ConvCaps(Grid(4, 5), 2, types=3, kernel=3, stride=2, **options)
    yield ConvCaps(Grid(4, 5), 2, types=3, kernel=2, shared_transformations=True, **options)
    yield SharedClassCaps(Grid(4, 5), 2, 3, image_size=(9, 9), **options)
    yield DenseCaps(40, 3, **options)
    yield DenseCaps(40, 3, shared_transformations=True, **options)


@pytest.mark.parametrize("layer", list(layers()), ids=["windows", "shared", "class", "dense", "dense shared"])
def test_sums_without_votes_are_those_of_the_votes(layer):
    layer = layer.double()
    layer.bias.data.normal_(generator=torch.Generator().manual_seed(0))
    poses, activations = torch.randn(2, 40, 16).double().requires_grad_(), torch.rand(2, 40).double()
    assert layer.fused_reason() is None
    fused, reference = layer(Capsules(poses, activations)), layer.routing(layer.votes(poses), activations)
    for tensor, other in zip(reference[:3], fused[:3], strict=True):
        torch.testing.assert_close(other, tensor)
    leaves = [poses, *layer.parameters()]
    gradients = [torch.autograd.grad(routed.poses.pow(3).sum(), leaves) for routed in (reference, fused)]
    for tensor, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, tensor)


def test_votes_that_do_not_fit_the_windows_are_refused():
    fields = receptive_fields(Grid(4, 3), 2, (2, 2), 1)
    with pytest.raises(ValueError, match=r"^votes must have \[P, K\] = \[6, 8\] from fields, got \[7\]$"):
        uniform_routing(torch.randn(2, 7, 4, 3), fields=fields)


def test_matrix_capsules_learn_without_routing():
    overrides = ["model=em_routing", "routing=uniform", "model.conv_channels=8", "model.primary_types=2"]
    node = to_plain(compose("train", [*overrides, "model.conv_types=[3,4]"], config_dir=None))
    torch.manual_seed(0)
    net, loss = (
        build(node["model"], at="model", image_shape=(1, 8, 8), classes=4),
        build(node["loss"], at="loss"),
    )
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 4
    net.calibrate(images)
    output = net(images)
    assert [routed.coupling.unique().tolist() for routed in list(output.layers.values())[1:]] == [
        pytest.approx([1 / 3]),
        [1 / 4],
        [1 / 4],
    ]
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=3e-3), []
    for _ in range(30):
        total = sum(loss(net(images), Batch(images, labels, images, labels), Step(0, 1)).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.8 * losses[0]
