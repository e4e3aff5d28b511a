import functools

import pytest
import torch

from capsexp.capsules import Capsules
from capsexp.config.build import build
from capsexp.config.compose import compose, to_plain
from capsexp.layer.class_caps import ClassCaps
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
    before = [one.clone() for one in layer.parameters()]
    layer.calibrate(capsules)
    for one, other in zip(before, layer.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0)
