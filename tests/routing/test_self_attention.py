import math

import pytest
import torch
from wave_numbers import wave

from capsexp.ops.squash import exponential_squash
from capsexp.routing.self_attention import SelfAttentionRouting, self_attention_routing


def random_votes(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_lengths_and_shares_of_a_fixed_example():
    votes = torch.einsum("ik,ikjd->ijd", wave((6, 4)), wave((6, 4, 3, 4), 1)).unsqueeze(0)
    bias = wave((6, 3), 4, 0.1)
    routed = self_attention_routing(votes, bias=bias)
    expected = [0.8551780606, 0.9957749966, 0.9227235860]
    assert routed.activations[0].tolist() == pytest.approx(expected, abs=5e-11)
    expected = [0.2531894047, 0.0033788675, 0.7163897177]
    assert (routed.coupling[0, 0] + bias[0]).tolist() == pytest.approx(expected, abs=5e-11)


def test_poses_are_squashed_sums_of_votes_by_their_agreement_with_all_votes():
    votes, bias = random_votes(2, 5, 3, 4), random_votes(5, 3)
    routed = self_attention_routing(votes, bias=bias)
    agreement = torch.einsum("bijd,bkjd->bij", votes, votes) / 2
    torch.testing.assert_close(routed.coupling, agreement.softmax(2))
    total = ((routed.coupling + bias).unsqueeze(3) * votes).sum(1)
    n = total.norm(dim=2, keepdim=True)
    torch.testing.assert_close(routed.poses, (1 - torch.exp(-n)) * total / n)
    torch.testing.assert_close(routed.activations, routed.poses.norm(dim=2))


def test_coupling_is_without_the_bias_and_sums_to_one():
    votes = random_votes(2, 5, 3, 4)
    plain, biased = (self_attention_routing(votes, bias=b) for b in (None, random_votes(5, 3)))
    torch.testing.assert_close(plain.coupling, biased.coupling, rtol=0, atol=0)
    torch.testing.assert_close(plain.coupling.sum(2), torch.ones(2, 5, dtype=torch.float64))
    assert not torch.equal(plain.poses, biased.poses)


def test_rotating_the_votes_for_a_parent_rotates_its_pose_and_leaves_the_coupling():
    votes, bias = random_votes(2, 5, 3, 4), random_votes(5, 3)
    rotation = torch.linalg.qr(random_votes(4, 4))[0]
    turned = votes.clone()
    turned[:, :, 1] = votes[:, :, 1] @ rotation
    before, after = (self_attention_routing(v, bias=bias) for v in (votes, turned))
    torch.testing.assert_close(after.coupling, before.coupling)
    torch.testing.assert_close(after.poses[:, 1], before.poses[:, 1] @ rotation)
    torch.testing.assert_close(after.poses[:, [0, 2]], before.poses[:, [0, 2]])


def test_permuting_the_children_with_the_bias_is_invisible():
    votes, bias, order = random_votes(2, 5, 3, 4), random_votes(5, 3), [4, 2, 0, 3, 1]
    before = self_attention_routing(votes, bias=bias)
    after = self_attention_routing(votes[:, order], bias=bias[order])
    torch.testing.assert_close(after.poses, before.poses)
    torch.testing.assert_close(after.coupling, before.coupling[:, order])


def test_lengths_are_below_one_and_short_sums_keep_their_length():
    activations = self_attention_routing(3 * random_votes(4, 6, 3, 4), bias=None).activations
    assert ((activations > 0) & (activations < 1)).all()
    tiny = 1e-12 * random_votes(5, 4)
    torch.testing.assert_close(exponential_squash(tiny), tiny, rtol=1e-11, atol=0)


def test_votes_of_zero_give_zero_poses_and_finite_gradients():
    votes = torch.zeros(2, 5, 3, 4, requires_grad=True)
    routed = self_attention_routing(votes, bias=torch.zeros(5, 3))
    (routed.poses.sum() + routed.activations.sum() + routed.coupling.sum()).backward()
    assert not routed.poses.any()
    torch.testing.assert_close(votes.grad, torch.full_like(votes, 1 / 3))  # poses as if there were no squash


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 1.0, 50.0])
def test_the_squash_has_its_values_and_finite_gradients_at_any_length(scale):
    direction = torch.tensor([0.6, -0.8])
    vector = (scale * direction).requires_grad_()
    squashed = exponential_squash(vector)
    squashed.sum().backward()
    torch.testing.assert_close(squashed, -math.expm1(-scale) * direction, rtol=1e-5, atol=0)
    assert vector.grad.isfinite().all()


def test_bfloat16_votes_are_routed_in_float32():
    votes = torch.randn(2, 5, 3, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        routed = self_attention_routing(votes, bias=None)
    torch.testing.assert_close(
        routed.poses, self_attention_routing(votes.float(), bias=None).poses, rtol=0, atol=0
    )


def test_the_bias_is_a_switch_and_starts_at_zero():
    assert not list(SelfAttentionRouting(7, 4, 3, bias=False).parameters())
    routing = SelfAttentionRouting(7, 4, 3, bias=True)
    assert [tuple(tensor.shape) for tensor in routing.parameters()] == [(7, 4)]
    assert not routing.bias.any()
