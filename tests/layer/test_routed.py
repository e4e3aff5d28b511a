import functools

import pytest
import torch
from torch import nn

from capsexp.capsules import Capsules
from capsexp.config.build import build
from capsexp.config.compose import compose, to_plain
from capsexp.layer.class_caps import ClassCaps
from capsexp.layer.matrix_caps import ConvCaps, SharedClassCaps
from capsexp.ops.receptive_fields import Grid
from capsexp.routing.uniform import UniformRouting


def em(*overrides):
    node = to_plain(compose("train", ["routing=em", *overrides], config_dir=None))["routing"]
    return build(node, at="routing")


def layer_and_capsules(routing, votes_mib=None, *, shared=False):
    torch.manual_seed(0)
    layer = ClassCaps(20, 4, 3, 8, shared_transformations=shared, routing=routing, votes_mib=votes_mib)
    return layer, Capsules(torch.randn(32, 20, 4), torch.rand(32, 20))


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize(("votes_mib", "shared"), [(None, False), (0.01, False), (None, True)])
def test_half_of_each_class_is_active_after_it(iterations, votes_mib, shared):
    routing = em(f"routing.iterations={iterations}")
    layer, capsules = layer_and_capsules(routing, votes_mib, shared=shared)
    layer.calibrate(capsules)
    active = (layer(capsules).activations > 0.5).float().mean(0)
    assert active.tolist() == pytest.approx([0.5] * 3, abs=0.07)


@pytest.mark.parametrize("routing", [em("routing.beta_a=2.0"), functools.partial(UniformRouting, bias=True)])
def test_a_routing_that_does_not_start_balanced_is_left_alone(routing):
    layer, capsules = layer_and_capsules(routing)
    before = [tensor.clone() for tensor in layer.parameters()]
    layer.calibrate(capsules)
    for tensor, other in zip(before, layer.parameters(), strict=True):
        torch.testing.assert_close(other, tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("count", "dim", "got"), [(19, 4, "19 with 4"), (20, 5, "20 with 5"), (21, 4, "21 with 4")]
)
def test_capsules_that_do_not_fit_the_layer_are_one_line(count, dim, got):
    layer, _ = layer_and_capsules(em())
    wrong = Capsules(torch.randn(2, count, dim), torch.rand(2, count))
    with pytest.raises(ValueError, match=f"^expected 20 capsules with poses of 4 numbers, got {got}$"):
        layer(wrong)


class Wrong(nn.Module):
    """A routing that returns one field wrong."""

    def __init__(self, change):
        super().__init__()
        self.routing, self.change = UniformRouting(20, 3, 8, bias=False), change

    def forward(self, votes, activations):
        return self.change(self.routing(votes, activations))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda routed: routed.poses, TypeError, "Wrong must return a Routed, got Tensor"),
        (
            lambda routed: routed._replace(poses=routed.poses.mT),
            ValueError,
            r"Wrong must return poses of shape \[32, 3, 8\] for these votes, got \[32, 8, 3\]",
        ),
        (
            lambda routed: routed._replace(activations=routed.activations[..., None]),
            ValueError,
            r"Wrong must return activations of shape \[32, 3\] for these votes, got \[32, 3, 1\]",
        ),
        (
            lambda routed: routed._replace(coupling=routed.coupling.mT),
            ValueError,
            r"Wrong must return coupling of shape \[32, 20, 3\] for these votes, got \[32, 3, 20\]",
        ),
    ],
)
def test_a_routing_that_returns_something_else_is_one_line(change, error, message):
    layer, capsules = layer_and_capsules(lambda *sizes: Wrong(change))
    with pytest.raises(error, match=f"^{message}$"):
        layer(capsules)


@pytest.mark.parametrize(
    "new_layer",
    [
        lambda routing: ClassCaps(20, 4, 3, 8, routing=routing),
        lambda routing: ConvCaps(Grid(5, 5), 2, types=3, routing=routing),
        lambda routing: SharedClassCaps(Grid(5, 5), 2, 3, image_size=(5, 5), routing=routing),
    ],
)
def test_a_routing_that_is_already_built_is_one_line(new_layer):
    with pytest.raises(TypeError, match=r"^routing must be a factory, such as .*, got UniformRouting$"):
        new_layer(UniformRouting(20, 3, 8, bias=False))


def test_a_layer_shows_its_sizes():
    shown = repr(layer_and_capsules(em(), shared=True)[0])
    assert shown.startswith(
        "ClassCaps(\n  in_caps=20, in_dim=4, out_caps=3, out_dim=8, shared_transformations=True"
    )
    assert "(routing): EMRouting(in_caps=20, out_caps=3, pose_dim=8, iterations=3)" in shown
