import pytest
import torch
import torch.nn.functional as F
from wave_numbers import wave

from capsexp.layer.cluster_caps import ClusterCaps, cluster_routing

SHAPE = (3, 4, 6, 5)  # types, numbers in a pose, rows, columns


def random_votes(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def layer(in_shape=SHAPE, **sizes):
    torch.manual_seed(0)
    return ClusterCaps(in_shape, **{"types": 2, "votes": 3, "pose_dim": 5} | sizes).double()


# The function


def test_weights_and_poses_of_a_fixed_example():
    total, weights = cluster_routing(wave((5, 4, 3, 4)).unsqueeze(0), eps=0)
    expected = [0.1908899844, 0.1838008982, 0.2155485166, 0.1907623369, 0.2189982639]
    assert weights[0, :, 0, 0].tolist() == pytest.approx(expected, abs=5e-11)
    poses = F.layer_norm(total, (4,))  # its own eps of 1e-5
    expected = [0.1492181383, 1.4508866816, -0.2578136561, -1.3422911639]
    assert poses[0, 0].tolist() == pytest.approx(expected, abs=5e-11)


def test_weights_are_the_inverse_deviations_and_sum_to_one_over_the_children():
    votes = random_votes(2, 5, 4, 3, 2)
    total, weights = cluster_routing(votes, eps=1e-5)
    inverse = 1 / (votes.var(2, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(weights, inverse / inverse.sum(1, keepdim=True))
    torch.testing.assert_close(total, (weights * votes.mean(2)).sum(1))
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 3, 2, dtype=torch.float64))


def test_a_child_whose_votes_are_equal_gets_nearly_all_the_weight():
    votes = random_votes(1, 5, 4, 3, 2)
    votes[:, 2] = votes[:, 2, :1]
    _, weights = cluster_routing(votes, eps=1e-24)
    assert (weights[:, 2] > 1 - 1e-9).all()


def test_a_factor_on_all_votes_leaves_the_weights_without_eps():
    votes = random_votes(2, 5, 4, 3, 2)
    torch.testing.assert_close(cluster_routing(7 * votes, eps=0)[1], cluster_routing(votes, eps=0)[1])


def test_the_order_of_votes_does_not_matter_and_that_of_children_permutes_the_weights():
    votes = random_votes(2, 5, 4, 3, 2)
    total, weights = cluster_routing(votes)
    for got, expected in zip(cluster_routing(votes[:, :, [2, 0, 3, 1]]), (total, weights), strict=True):
        torch.testing.assert_close(got, expected)
    order = [3, 1, 4, 0, 2]
    permuted, permuted_weights = cluster_routing(votes[:, order])
    torch.testing.assert_close(permuted, total)
    torch.testing.assert_close(permuted_weights, weights[:, order])


def test_one_vote_each_makes_all_weights_equal():
    votes = random_votes(2, 5, 1, 3)
    torch.testing.assert_close(cluster_routing(votes)[0], votes.mean((1, 2)))


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_equal_votes_give_finite_values_and_gradients(fill):
    votes = torch.full((2, 3, 4, 5), fill, requires_grad=True)
    total, weights = cluster_routing(votes)
    (total.sum() + weights.square().sum()).backward()
    assert (weights == 1 / 3).all()
    assert votes.grad.isfinite().all()


def test_a_negative_eps_is_refused():
    with pytest.raises(ValueError, match="eps must be >= 0, got -1"):
        cluster_routing(torch.zeros(1, 2, 2, 2), eps=-1)


# The layer


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_votes_are_the_convolutions_of_each_child_by_itself(stride):
    caps, poses = layer(stride=stride), random_votes(2, *SHAPE)
    votes = caps.cast_votes(poses)
    for child in range(3):
        for vote in range(3):
            kernels = caps.weight[child, vote].flatten(0, 1)
            expected = F.conv2d(poses[:, child], kernels, caps.bias[child, vote], stride, padding=1)
            torch.testing.assert_close(votes[:, child, vote], expected)
    assert caps(poses).shape == (2, *caps.out_shape)


def test_poses_are_normalised_over_numbers_and_map():
    poses = layer()(random_votes(2, *SHAPE))
    assert poses.shape == (2, 2, 5, 6, 5)
    torch.testing.assert_close(poses.mean((2, 3, 4)), torch.zeros(2, 2, dtype=torch.float64))
    deviation = poses.var((2, 3, 4), correction=0)
    torch.testing.assert_close(deviation, torch.ones_like(deviation), rtol=1e-3, atol=0)


def test_permuting_the_children_with_their_kernels_changes_nothing():
    caps, poses, order = layer(), random_votes(2, *SHAPE), [2, 0, 1]
    expected = caps(poses)
    with torch.no_grad():
        caps.weight.copy_(caps.weight[order])
        caps.bias.copy_(caps.bias[order])
    torch.testing.assert_close(caps(poses[:, order]), expected)


def test_one_pose_is_that_of_all_child_types():
    caps, poses = layer(), random_votes(2, 1, *SHAPE[1:])
    torch.testing.assert_close(caps(poses), caps(poses.expand(-1, 3, -1, -1, -1)))


def test_parameters_are_the_kernels_of_each_child_and_one_gain_and_shift():
    (children, in_dim, rows, columns), (parents, votes, dim) = SHAPE, (2, 3, 5)
    count = sum(parameter.numel() for parameter in layer().parameters())
    outputs = parents * votes * dim
    assert count == children * (in_dim * 9 * outputs + outputs) + 2 * dim * rows * columns


def test_every_parameter_gets_a_gradient():
    caps = layer()
    caps(random_votes(2, *SHAPE)).square().mul(torch.arange(5.0).view(5, 1, 1)).sum().backward()
    assert all(parameter.grad.any() for parameter in caps.parameters())


def test_without_routing_is_the_mean_of_all_votes():
    caps = layer()
    with torch.no_grad():
        caps.gain.normal_()
        caps.shift.normal_()
    for poses in (random_votes(2, *SHAPE), random_votes(2, 1, *SHAPE[1:])):
        total = caps.cast_votes(poses).mean((1, 2)).unflatten(1, (2, 5))
        expected = F.layer_norm(total, caps.out_shape[1:], caps.gain, caps.shift)
        torch.testing.assert_close(caps.without_routing()(poses), expected)


def test_channels_last_gives_the_same_poses():
    caps, poses = layer(), random_votes(2, *SHAPE)
    expected = caps(poses)
    torch.testing.assert_close(caps.to(memory_format=torch.channels_last)(poses), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"votes": 0}, "votes must be >= 1, got 0"),
        ({"eps": 0.0}, "eps must be > 0, got 0"),
        ({"in_shape": (3, 4, 1, 5)}, "in_shape must have a map of at least 2x2, got 1x5"),
    ],
)
def test_wrong_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        layer(**wrong)


def test_poses_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"expected poses of shape \[3, 4, 6, 5\] .*, got \[2, 4, 6, 5\]"):
        layer()(torch.zeros(1, 2, 4, 6, 5, dtype=torch.float64))
