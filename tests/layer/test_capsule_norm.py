"""Capsule norms: statistics, running means, laws of each kind."""

import pytest
import torch

from capsexp.capsules import Routed
from capsexp.layer.capsule_norm import CapsuleNorm

TYPES, POSITIONS, DIM = 3, 5, 4


def random(batch=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, POSITIONS * TYPES)
    poses = torch.randn(*shape, DIM, dtype=torch.float64, generator=generator) * 3 + 2
    return poses, torch.randn(*shape, dtype=torch.float64, generator=generator) - 1


def norm(kind, **options):
    return CapsuleNorm(TYPES, DIM, norm=kind, **options).double()


def by_type(capsules):
    return capsules.unflatten(1, (POSITIONS, TYPES))


@pytest.mark.parametrize(("per", "axes"), [("type", (0, 1, 3)), ("element", (0, 1))])
def test_batch_norm_gives_each_type_or_element_mean_0_and_variance_1(per, axes):
    poses, scores = (by_type(values) for values in norm("batch", per=per)(*random()))
    torch.testing.assert_close(poses.mean(axes), torch.zeros_like(poses.mean(axes)), atol=1e-12, rtol=0)
    torch.testing.assert_close(
        poses.var(axes, correction=0), torch.ones_like(poses.mean(axes)), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(scores.mean((0, 1)), torch.zeros(TYPES).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(
        scores.var((0, 1), correction=0), torch.ones(TYPES).double(), atol=1e-4, rtol=0
    )


def test_group_norm_treats_each_image_by_itself():
    poses, scores = random()
    layer = norm("group")
    together = layer(poses, scores)
    for image in range(len(poses)):
        alone = layer(poses[image : image + 1], scores[image : image + 1])
        for one, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_of_them[image])
    assert not dict(layer.named_buffers())


def test_group_norm_gives_the_scores_of_one_position_a_spread():
    """Class capsules have one position: statistics per type would make every score 0."""
    scores = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    after = norm("group")(torch.randn(1, TYPES, DIM).double(), scores)[1]
    torch.testing.assert_close(after.var(correction=0), torch.tensor(1.0).double(), atol=1e-4, rtol=0)


def test_evaluation_uses_running_means_that_training_moves_by_a_tenth():
    poses, scores = random()
    layer = norm("batch")
    layer(poses, scores)
    channel = by_type(poses)[:, :, 0]
    torch.testing.assert_close(layer.poses.running_mean[0], 0.1 * channel.mean())
    torch.testing.assert_close(layer.poses.running_var[0], 0.9 + 0.1 * channel.var())
    layer.eval()
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    together = layer(poses, scores)[0]
    torch.testing.assert_close(layer(poses[:1], scores[:1])[0][0], together[0])
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])


def test_activations_are_the_sigmoid_of_the_normalized_scores():
    poses, scores = random()
    coupling = torch.zeros(len(poses), 2, POSITIONS * TYPES)
    routed = norm("batch").routed(Routed(poses, scores.sigmoid(), coupling, None, scores))
    torch.testing.assert_close(routed.activations, routed.scores.sigmoid())
    without = norm("batch").routed(Routed(poses, scores.sigmoid(), coupling))
    assert without.scores is None
    assert torch.equal(without.activations, scores.sigmoid())


def test_a_single_value_per_channel_is_finite_and_leaves_the_running_means():
    layer = CapsuleNorm(TYPES, 1, norm="batch", affine=True)
    poses = torch.ones(1, TYPES, 1, requires_grad=True)
    after, scores = layer(poses, torch.ones(1, TYPES))
    assert torch.equal(after, torch.zeros_like(after))
    assert torch.equal(scores, torch.zeros_like(scores))
    assert torch.equal(layer.poses.running_mean, torch.zeros(TYPES))


def test_gain_and_bias_are_no_target_of_weight_decay():
    layer = norm("batch", affine=True, per="element")
    assert {parameter.ndim for parameter in layer.parameters()} == {1}
    assert layer.poses.weight.shape == (TYPES * DIM,)


def test_a_norm_that_normalizes_nothing_is_refused():
    with pytest.raises(ValueError, match="norm must be one of batch, group"):
        norm("none")
