import math

import pytest
import torch
from wave_numbers import wave

from capsexp.capsules import ReceptiveFields
from capsexp.layer.matrix_caps import ConvCaps
from capsexp.ops.receptive_fields import Grid, receptive_fields
from capsexp.routing.self_routing import SelfRouting, self_routing

PAIR = ReceptiveFields(torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5]]), 6, 6)


def example():
    poses, active = wave((6, 4)), wave((6,), 1, 2).sigmoid()
    votes = torch.einsum("id,idjh->ijh", poses, wave((6, 4, 3, 4), 3))
    return votes[None], active[None], poses[None]


MAP = {"weight": wave((6, 4, 3), 1), "bias": wave((6, 3), 2)}


def random(*shape, fields=None, in_dim=5, seed=0):
    """Votes, activations and poses, a map for them."""
    generator = torch.Generator().manual_seed(seed)
    batch, places, parents = shape[0], shape[-3], shape[-2]
    in_caps = places if fields is None else fields.in_caps

    def normal(*sizes):
        return torch.randn(*sizes, dtype=torch.float64, generator=generator)

    inputs = (normal(*shape), normal(batch, in_caps).sigmoid(), normal(batch, in_caps, in_dim))
    return inputs, {"weight": normal(places, in_dim, parents), "bias": normal(places, parents)}


def test_the_example_has_the_values_computed_elsewhere():
    routed = self_routing(*example(), **MAP)
    assert routed.activations[0].tolist() == pytest.approx(
        [0.4288706072, 0.3574148811, 0.2137145116], abs=1e-10
    )
    expected = [-0.2133315208, 0.3255066459, 0.2436886742, -0.3707130425]
    assert routed.poses[0, 0].tolist() == pytest.approx(expected, abs=1e-10)


def loop(votes, active, poses, weight, bias, windows):
    """The paper's equations, number by number: votes [P, K, J, D] of one image."""
    parents, dim = votes.shape[2:]
    results = []
    for position, window in enumerate(windows):
        shares = []
        for place, child in enumerate(window):
            logits = [
                sum(poses[child, c] * weight[place, c, j] for c in range(poses.shape[1])) + bias[place, j]
                for j in range(parents)
            ]
            total = sum(math.exp(logit) for logit in logits)
            shares.append([math.exp(logit) / total for logit in logits])
        for j in range(parents):
            weights = [shares[place][j] * active[child] for place, child in enumerate(window)]
            mean = [
                sum(weights[place] * votes[position, place, j, d] for place in range(len(window)))
                / sum(weights)
                for d in range(dim)
            ]
            results.append([sum(weights) / sum(active[child] for child in window), *mean])
    return torch.tensor(results, dtype=torch.float64)


@pytest.mark.parametrize("fields", [None, PAIR, receptive_fields(Grid(4, 3), 2, (2, 2), 2)], ids=str)
def test_it_is_the_papers_loop(fields):
    shape = (1, 7, 3, 4) if fields is None else (1, *fields.children.shape, 3, 4)
    (votes, active, poses), parameters = random(*shape, fields=fields)
    routed = self_routing(votes, active, poses, **parameters, fields=fields)
    windows = [list(range(7))] if fields is None else fields.children.tolist()
    expected = loop(votes.view(-1, *votes.shape[-3:]), active[0], poses[0], *parameters.values(), windows)
    torch.testing.assert_close(routed.activations[0], expected[:, 0])
    torch.testing.assert_close(routed.poses[0], expected[:, 1:])
    assert routed.coupling.shape == votes.shape[:-1]
    assert routed.fields is fields


@pytest.mark.parametrize("fields", [None, PAIR], ids=["dense", "windows"])
def test_activations_of_a_position_sum_to_1(fields):
    shape = (2, 7, 3, 4) if fields is None else (2, 2, 4, 3, 4)
    inputs, parameters = random(*shape, fields=fields)
    totals = self_routing(*inputs, **parameters, fields=fields).activations.unflatten(1, (-1, 3)).sum(2)
    torch.testing.assert_close(totals, torch.ones_like(totals))


def test_a_factor_on_all_activations_changes_nothing():
    (votes, active, poses), parameters = random(2, 7, 3, 4)
    before, after = (self_routing(votes, factor * active, poses, **parameters) for factor in (1, 0.01))
    for tensor, other in zip(before[:3], after[:3], strict=True):
        torch.testing.assert_close(other, tensor)


def test_it_starts_as_the_mean_weighted_by_activations():
    (votes, active, poses), _ = random(2, 7, 3, 4)
    routed = SelfRouting(7, 3, 4, in_dim=5).double()(votes, active, poses)
    weights = active / active.sum(1, keepdim=True)
    torch.testing.assert_close(routed.poses, torch.einsum("bi,bijd->bjd", weights, votes))
    torch.testing.assert_close(routed.activations, torch.full_like(routed.activations, 1 / 3))


def test_a_child_without_activation_has_no_effect():
    (votes, active, poses), parameters = random(2, 7, 3, 4)
    active[:, 2] = 0
    changed_votes, changed_poses = votes.clone(), poses.clone()
    changed_votes[:, 2], changed_poses[:, 2] = 100.0, -100.0
    before = self_routing(votes, active, poses, **parameters)
    after = self_routing(changed_votes, active, changed_poses, **parameters)
    torch.testing.assert_close(after.poses, before.poses)
    torch.testing.assert_close(after.activations, before.activations)


def test_a_child_decides_without_the_others_and_their_votes():
    (votes, active, poses), parameters = random(2, 7, 3, 4)
    changed = poses.clone()
    changed[:, 2] += 1
    before = self_routing(votes, active, poses, **parameters).coupling
    after = self_routing(votes + 5, active, changed, **parameters).coupling
    others = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(after[:, others], before[:, others], rtol=0, atol=0)
    assert not torch.allclose(after[:, 2], before[:, 2])


def test_permuting_children_with_their_maps_is_invisible():
    (votes, active, poses), parameters = random(2, 7, 3, 4)
    order = torch.randperm(7)
    before = self_routing(votes, active, poses, **parameters)
    turned = {name: tensor[order] for name, tensor in parameters.items()}
    after = self_routing(votes[:, order], active[:, order], poses[:, order], **turned)
    torch.testing.assert_close(after.poses, before.poses)
    torch.testing.assert_close(after.activations, before.activations)


@pytest.mark.parametrize("fields", [None, PAIR], ids=["dense", "windows"])
def test_gradients_pass_gradcheck(fields):
    shape = (2, 4, 3, 2) if fields is None else (1, 2, 4, 3, 2)
    inputs, parameters = random(*shape, fields=fields, in_dim=3)
    leaves = [tensor.requires_grad_() for tensor in (*inputs, *parameters.values())]

    def route(votes, active, poses, weight, bias):
        return self_routing(votes, active, poses, weight=weight, bias=bias, fields=fields)[:3]

    assert torch.autograd.gradcheck(route, leaves)


@pytest.mark.parametrize("fill", [0.0, 1e-12])
def test_windows_without_an_active_child_are_finite(fill):
    (votes, active, poses), parameters = random(2, 2, 4, 3, 4, fields=PAIR)
    leaves = [votes.requires_grad_(), poses.requires_grad_(), active.fill_(fill).requires_grad_()]
    routed = self_routing(votes, active, poses, **parameters, fields=PAIR)
    routed.poses.sum().add(routed.activations.sum()).backward()
    assert routed.poses.isfinite().all()
    assert (routed.activations <= 1).all()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_routed_in_float32(dtype):
    inputs, parameters = random(2, 7, 3, 4)
    inputs = [tensor.to(dtype) for tensor in inputs]
    parameters = {name: tensor.float() for name, tensor in parameters.items()}
    with torch.autocast("cpu", torch.bfloat16):
        routed = self_routing(*inputs, **parameters)
    expected = self_routing(*(tensor.float() for tensor in inputs), **parameters)
    for tensor, other in zip(routed[:3], expected[:3], strict=True):
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, other, rtol=0, atol=0)


def test_parameters_are_one_map_per_place():
    assert [tuple(tensor.shape) for tensor in SelfRouting(7, 3, 4).parameters()] == [(7, 4, 3), (7, 3)]
    windows = SelfRouting(6, 3, 4, PAIR, in_dim=5)
    assert [tuple(tensor.shape) for tensor in windows.parameters()] == [(4, 5, 3), (4, 3)]
    assert not any(tensor.any() for tensor in windows.parameters())


def test_a_layer_in_windows_has_the_papers_parameters():
    layer = ConvCaps(Grid(8, 8), 3, types=5, pose_dim=6, pose="vector", routing=SelfRouting)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 9 * 3 * 5 * (6 * 6 + 6 + 1)


@pytest.mark.usefixtures("no_type_checks")
def test_wrong_shapes_are_one_line():
    (votes, active, poses), parameters = random(2, 7, 3, 4)
    with pytest.raises(ValueError, match=r"^poses must have shape .* = \[2, 7, C\], got \[2, 6, 5\]$"):
        self_routing(votes, active, poses[:, 1:], **parameters)
    with pytest.raises(ValueError, match=r"^weight must have shape .* = \[7, 4, 3\], got \[7, 5, 3\]$"):
        self_routing(votes, active, poses[..., 1:], **parameters)
    with pytest.raises(ValueError, match=r"^bias must have shape \[K, J\] = \[7, 3\], got \[3\]$"):
        self_routing(votes, active, poses, weight=parameters["weight"], bias=torch.zeros(3))
    with pytest.raises(ValueError, match=r"^activations must have shape \[B, I\]"):
        self_routing(votes, active[:, 1:], poses, **parameters)
    with pytest.raises(ValueError, match=r"\[P, K\] = \[2, 4\] from fields, got \[1, 7\]"):
        self_routing(votes, active, poses, **parameters, fields=PAIR)
