import torch

from capsexp.routing.dynamic import dynamic_routing_reference
from capsexp.routing.uniform import UniformRouting, uniform_routing


def test_uniform_is_dynamic_routing_with_one_iteration():
    votes, bias = torch.randn(2, 7, 4, 3).double(), torch.randn(4, 3).double()
    expected = dynamic_routing_reference(
        votes, iterations=1, prior=None, bias=bias, leaky=False, detach=False
    )
    for tensor, other in zip(expected, uniform_routing(votes, bias=bias), strict=True):
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
