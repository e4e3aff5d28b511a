"""Laws and numbers of variational Bayes routing."""

import math

import pytest
import torch
from em_examples import EVERY_LAYER, LAYERS, assert_all_close, example, fields_of
from wave_numbers import wave

from capsexp.capsules import ReceptiveFields
from capsexp.routing.vb import VBRouting, vb_routing

AS_GIVEN = {"rtol": 0, "atol": 5e-11}  # the examples have ten digits
MODULE = {
    "iterations": 3,
    "betas": False,
    "prior_counts": 1.0,
    "prior_strength": 1.0,
    "prior_degrees": None,
    "prior_scale": 1.0,
    "outlier": None,
    "normalisation": "paper",
    "initial_coupling": "paper",
    "implementation": "auto",
}
SWITCHES = [
    {},
    {"normalisation": "types"},
    {"initial_coupling": "official"},
    {"outlier": 1e-3},
    {"outlier": 1e-3, "normalisation": "types"},
    {"prior_counts": 0.5, "prior_strength": 2.0, "prior_degrees": 7.5, "prior_scale": 0.3},
]


def numbers(*digits):
    return torch.tensor(digits, dtype=torch.float64)


def given(layer, *, dim=3, seed=0):
    """Votes as the routing takes them, activations, fields."""
    votes, activations, *_ = example(layer, dim=dim, seed=seed)
    fields = fields_of(layer)
    return (votes.squeeze(1) if fields is None else votes), activations, fields


def algorithm(votes, activations, fields, iterations=3, **switches):
    """Scores, poses, coupling of one image, by loops over pairs of capsules."""
    switches = {**MODULE, **switches}
    windows = [list(range(len(votes)))] if fields is None else fields.children.tolist()
    votes = votes.unsqueeze(0) if fields is None else votes
    types, dim = votes.shape[2:]
    counts, strength = switches["prior_counts"], switches["prior_strength"]
    degrees = dim + 1 if switches["prior_degrees"] is None else switches["prior_degrees"]
    pairs = [(i, p, k, j) for p, w in enumerate(windows) for k, i in enumerate(w) for j in range(types)]
    by_types = switches["normalisation"] == "types" or fields is None
    rivals = {  # the pairs that compete for a child
        pair: [o for o in pairs if o[0] == pair[0] and (not by_types or o[1:3] == pair[1:3])]
        for pair in pairs
    }
    parents = {pair: sum(other[0] == pair[0] for other in pairs) for pair in pairs}
    coupling = {
        pair: 1 / (types if switches["initial_coupling"] == "official" else parents[pair]) for pair in pairs
    }
    for iteration in range(iterations):
        weight = {pair: coupling[pair] * activations[pair[0]] for pair in pairs}
        mass = [
            [sum(weight[o] for o in pairs if o[1] == p and o[3] == j) for j in range(types)]
            for p in range(len(windows))
        ]
        means, scores, logs = {}, {}, {}
        for p in range(len(windows)):
            alphas = torch.stack([counts + mass[p][j] for j in range(types)])
            for j in range(types):
                mine = [o for o in pairs if o[1] == p and o[3] == j]
                kappa, nu = strength + mass[p][j], degrees + mass[p][j]
                mean = sum(weight[o] * votes[p, o[2], j] for o in mine) / kappa
                psi = 1 / switches["prior_scale"] + strength * mean**2
                psi = psi + sum(weight[o] * (votes[p, o[2], j] - mean) ** 2 for o in mine)
                log_pi = torch.digamma(alphas[j]) - torch.digamma(alphas.sum())
                log_det = (
                    sum(torch.digamma((nu - h) / 2) for h in range(dim)) + dim * math.log(2) - psi.log().sum()
                )
                entropy = 0.5 * dim * math.log(2 * math.pi * math.e) - 0.5 * log_det
                means[p, j], scores[p, j] = mean, -log_pi.exp() * entropy
                for o in mine:
                    distance = dim / kappa + nu * ((votes[p, o[2], j] - mean) ** 2 / psi).sum()
                    logs[o] = log_pi + 0.5 * log_det - 0.5 * dim * math.log(2 * math.pi) - 0.5 * distance
        if iteration + 1 < iterations:
            floor = 0 if switches["outlier"] is None else switches["outlier"]
            coupling = {
                pair: logs[pair].exp() / max(sum(logs[o].exp() for o in rivals[pair]), floor)
                for pair in pairs
            }
    order = [(p, j) for p in range(len(windows)) for j in range(types)]
    shape = votes.shape[:3]
    return (
        torch.stack([scores[parent] for parent in order]),
        torch.stack([means[parent] for parent in order]),
        torch.stack([torch.as_tensor(coupling[pair], dtype=torch.float64) for pair in pairs]).view(shape),
    )


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@EVERY_LAYER
def test_it_is_the_algorithm_pair_by_pair(layer, switches):
    votes, activations, fields = given(layer)
    routed = vb_routing(votes, activations, fields=fields, **switches)
    for image in range(len(votes)):
        expected = algorithm(votes[image], activations[image], fields, **switches)
        coupling = routed.coupling[image].view(expected[2].shape)
        assert_all_close([routed.scores[image], routed.poses[image], coupling], expected)


def test_numbers_of_an_independent_implementation():
    votes, activations = wave((6, 3, 4)), wave((6,), 1, 2).sigmoid()
    routed = vb_routing(votes[None], activations[None])
    scores = numbers(-0.3850393211, -1.6793997913, -0.8959433714)
    torch.testing.assert_close(routed.scores[0], scores, **AS_GIVEN)
    pose = numbers(-0.0031322819, 0.0195497242, -0.0098098303, -0.0029389782)
    torch.testing.assert_close(routed.poses[0, 0], pose, **AS_GIVEN)
    coupling = numbers(0.0076726037, 0.9922791821, 0.0000482142)
    torch.testing.assert_close(routed.coupling[0, 0], coupling, **AS_GIVEN)


def test_numbers_of_an_independent_implementation_with_windows():
    fields = ReceptiveFields(torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5]]), 6, 6)
    votes, activations = wave((6, 3, 4))[fields.children], wave((6,), 1, 2).sigmoid()
    routed = vb_routing(votes[None], activations[None], fields=fields)
    scores = numbers(-0.5005143742, -1.9279126375, -0.5121554316, -0.5629905853, -0.9301619075, -1.4240438073)
    torch.testing.assert_close(routed.scores[0], scores, **AS_GIVEN)
    first = numbers(0.0142048446, 0.0021354002, 0.0547655010)
    torch.testing.assert_close(routed.coupling[0, 0, 2], first, **AS_GIVEN)
    second = numbers(0.0039769638, 0.0071199058, 0.9177973846)
    torch.testing.assert_close(routed.coupling[0, 1, 0], second, **AS_GIVEN)


def test_a_parent_without_active_children_is_at_the_prior():
    routed = vb_routing(torch.randn(1, 5, 3, 16, dtype=torch.float64), torch.zeros(1, 5, dtype=torch.float64))
    torch.testing.assert_close(routed.scores, torch.full((1, 3), -1.6208196463, dtype=torch.float64))
    assert not routed.poses.any()


def test_the_pose_is_the_weighted_mean_for_a_large_mass_and_0_for_a_small_mass():
    votes = torch.randn(1, 4, 1, 16, dtype=torch.float64)
    heavy = vb_routing(votes.repeat(1, 5000, 1, 1), torch.ones(1, 20_000, dtype=torch.float64), iterations=1)
    torch.testing.assert_close(heavy.poses[0, 0], votes[0].mean(0).squeeze(0), rtol=0, atol=1e-3)
    light = vb_routing(votes, torch.full((1, 4), 1e-6, dtype=torch.float64), iterations=1)
    assert light.poses.abs().max() < 1e-5


@EVERY_LAYER
@pytest.mark.parametrize("outlier", [None, 1e-2])
def test_the_coupling_of_a_child_sums_to_1_or_with_an_outlier_to_less(layer, outlier):
    votes, activations, fields = given(layer)
    coupling = vb_routing(votes, activations, fields=fields, outlier=outlier).coupling
    if fields is None:
        total = coupling.sum(2)
    else:
        total = torch.zeros(len(votes), fields.in_caps, dtype=torch.float64)
        total.index_add_(1, fields.children.flatten(), coupling.sum(3).flatten(1))
        total = total[:, fields.children.unique()]
    if outlier is None:
        torch.testing.assert_close(total, torch.ones_like(total))
    else:
        assert (total <= 1 + 1e-12).all()


def test_votes_far_from_every_parent_lose_their_share_to_the_outlier():
    votes = torch.randn(1, 6, 3, 16, dtype=torch.float64)
    votes[:, 0] += 100
    coupling = vb_routing(votes, torch.ones(1, 6).double(), outlier=1e-11).coupling.sum(2)
    assert coupling[0, 0] < 1e-6


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_translating_votes_translates_poses_only_without_a_prior_of_the_mean(strength):
    votes, activations, _ = given((7, 3))
    shift = torch.randn(3, dtype=torch.float64)
    before, after = (
        vb_routing(votes + by, activations, prior_strength=strength)
        for by in (torch.zeros_like(shift), shift)
    )
    moved = torch.allclose(after.poses, before.poses + shift, atol=1e-9)
    assert moved == (strength == 0)


@pytest.mark.parametrize("layer", LAYERS[:3], ids=str)
def test_children_without_activation_have_no_effect(layer):
    votes, activations, fields = given(layer)
    activations = activations.clone()
    activations[:, 0] = 0
    other = votes.clone()
    if fields is None:
        other[:, 0] = 9
    else:
        other[:, fields.children == 0] = 9
    before, after = (vb_routing(v, activations, fields=fields) for v in (votes, other))
    assert_all_close([after.scores, after.poses], [before.scores, before.poses])


def test_the_gradient_is_that_of_finite_differences():
    votes, activations, _ = given((5, 3), dim=4)
    beta = torch.randn(3, dtype=torch.float64)
    inputs = [tensor[:1].clone().requires_grad_() for tensor in (votes, activations)]

    def outputs(votes, activations, beta):
        routed = vb_routing(votes, activations, beta_a=beta, beta_u=0.5 * beta)
        return routed.scores, routed.poses, routed.coupling

    assert torch.autograd.gradcheck(outputs, (*inputs, beta.requires_grad_()))


def test_float32_is_close_to_float64_with_many_children():
    votes, activations = torch.randn(1, 400, 5, 16), torch.rand(1, 400)
    single, double = vb_routing(votes, activations), vb_routing(votes.double(), activations.double())
    # Sums over 400 children of numbers around 1 round by about 400 * 6e-8.
    torch.testing.assert_close(single.poses.double(), double.poses, rtol=0, atol=1e-4)
    torch.testing.assert_close(single.scores.double(), double.scores, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior_degrees": 2.0}, "prior_degrees must be > pose_dim - 1"),
        ({"prior_counts": 0.0}, "prior_counts must be > 0"),
        ({"prior_scale": -1.0}, "prior_scale must be > 0"),
        ({"prior_strength": -1.0}, "prior_strength must be >= 0"),
        ({"outlier": 1.0}, "outlier must be"),
        ({"iterations": 0}, "iterations must be >= 1"),
    ],
    ids=str,
)
def test_a_number_out_of_its_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        VBRouting(4, 2, 4, **{**MODULE, **changes})


def test_the_trace_ends_with_the_result():
    votes, activations, fields = given(LAYERS[0])
    routing = VBRouting(fields.in_caps, votes.shape[3], 3, fields, **MODULE).double()
    states, routed = routing.trace(votes, activations), routing(votes, activations)
    assert len(states) == 3
    assert_all_close([states[-1].scores, states[-1].coupling], [routed.scores, routed.coupling])
    assert len(routing.trace(votes, activations, iterations=5)) == 5


def test_betas_shift_the_scores():
    votes, activations, _ = given((7, 3))
    routing = VBRouting(7, 3, 3, **{**MODULE, "betas": True}).double()
    before = routing(votes, activations).scores
    routing.beta_a.data += 2
    routing.beta_u.data += 0.5
    torch.testing.assert_close(routing(votes, activations).scores, before + 1.5)
