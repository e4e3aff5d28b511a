"""Laws and numbers of Heinsen routing."""

import itertools

import pytest
import torch
from em_examples import DENSE, EVERY_LAYER, LAYERS, WINDOWS, assert_all_close, example, fields_of, seen_by
from wave_numbers import wave

from capsexp.capsules import ReceptiveFields
from capsexp.routing.heinsen import HeinsenRouting, heinsen_routing

MODULE = {
    "iterations": 3,
    "beta_start": 0.0,
    "variance_floor": 1e-5,
    "mass_epsilon": 0.0,
    "implementation": "auto",
}
OFFICIAL = {"mass_epsilon": 1e-5}
SHARED = pytest.mark.parametrize("shared", [False, True], ids=["own betas", "shared betas"])
AS_GIVEN = {"rtol": 0, "atol": 5e-11}  # the examples have ten digits


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def given(layer, *, dim=3, shared=False, seed=0):
    """Votes as the routing takes them, activations, keywords."""
    votes, activations, *_ = example(layer, dim=dim, seed=seed)
    shape = (1 if shared else votes.shape[2], layer[-1])
    betas = {"beta_use": random(*shape, seed=seed + 2), "beta_ign": random(*shape, seed=seed + 3)}
    fields = fields_of(layer)
    votes = votes.squeeze(1) if fields is None else votes
    return votes, activations, {**betas, "fields": fields}


def module(layer, dim=3, **changes):
    children = fields_of(layer).in_caps if fields_of(layer) else layer[0]
    return HeinsenRouting(children, layer[-1], dim, fields_of(layer), **{**MODULE, **changes}).double()


def algorithm_1(votes, activations, beta_use, beta_ign, fields=None, iterations=3, floor=1e-5):
    """Scores, poses, coupling of one image, by the loops of the paper."""
    windows = [list(range(votes.shape[0]))] if fields is None else fields.children.tolist()
    votes = votes.unsqueeze(0) if fields is None else votes
    types = range(votes.shape[2])
    pairs = [(i, p, k, j) for p, window in enumerate(windows) for k, i in enumerate(window) for j in types]
    count = {i: sum(i in window for window in windows) * len(types) for i in range(len(activations))}
    coupling = {pair: 1 / count[pair[0]] for pair in pairs}
    for iteration in range(iterations):
        scores, means, logs = {}, {}, {}
        for p, j in itertools.product(range(len(windows)), types):
            mine = [pair for pair in pairs if pair[1] == p and pair[3] == j]
            use = [coupling[pair] * activations[pair[0]] for pair in mine]
            places = [pair[2] for pair in mine]
            beta = [
                (table[0, j] if len(table) == 1 else table[k, j])
                for table in (beta_use, beta_ign)
                for k in places
            ]
            ignore = [activations[pair[0]] - u for pair, u in zip(mine, use, strict=True)]
            scores[p, j] = sum(b * u for b, u in zip(beta[: len(mine)], use, strict=True)) - sum(
                b * u for b, u in zip(beta[len(mine) :], ignore, strict=True)
            )
            mean = sum(u * votes[p, k, j] for u, k in zip(use, places, strict=True)) / sum(use)
            squares = [(votes[p, k, j] - mean) ** 2 for k in places]
            variance = sum(u * s for u, s in zip(use, squares, strict=True)) / sum(use) + floor
            means[p, j] = mean
            for pair, square in zip(mine, squares, strict=True):
                density = torch.exp(-0.5 * (square / variance).sum()) / variance.sqrt().prod()
                logs[pair] = torch.sigmoid(scores[p, j]) * density
        if iteration + 1 < iterations:
            total = {i: sum(value for pair, value in logs.items() if pair[0] == i) for i in count}
            coupling = {pair: logs[pair] / total[pair[0]] for pair in pairs}
    return scores, means, coupling


@pytest.mark.parametrize("layer", [(4, 3), (1, 2), (3, 3, 2, (2, 2), 1, 2), (4, 3, 1, (2, 3), 1, 3)], ids=str)
@pytest.mark.parametrize("iterations", [1, 2, 3])
@SHARED
def test_routing_is_algorithm_1_in_loops(layer, iterations, shared):
    votes, activations, keywords = given(layer, shared=shared)
    routed = heinsen_routing(votes, activations, iterations=iterations, **keywords)
    coupling = routed.coupling.reshape(2, len(seen_by(layer)), -1, layer[-1])
    for image in range(2):
        scores, means, shares = algorithm_1(
            votes[image], activations[image], iterations=iterations, **keywords
        )
        torch.testing.assert_close(routed.scores[image], torch.stack([*scores.values()]))
        torch.testing.assert_close(routed.poses[image], torch.stack([*means.values()]))
        for (_, p, k, j), share in shares.items():
            assert coupling[image, p, k, j].item() == pytest.approx(float(share))


def published_example(places=None):
    poses, matrices = wave((6, 2, 2)), wave((6, 3, 2, 2), 2)
    offsets, betas = wave((6, 3, 2, 2), 3, 0.1), (wave((6, 3), 4), wave((6, 3), 5))
    activations = wave((6,), 1, 2).sigmoid().unsqueeze(0)
    if places is None:
        votes = torch.einsum("icd,ijdh->ijch", poses, matrices) + offsets
        return (
            votes.flatten(2).unsqueeze(0),
            activations,
            dict(zip(("beta_use", "beta_ign"), betas, strict=True)),
        )
    children = torch.tensor(places)
    votes = torch.einsum("pkcd,kjdh->pkjch", poses[children], matrices[:4]) + offsets[:4]
    fields = ReceptiveFields(children, 6, 6)
    keywords = {"beta_use": betas[0][:4], "beta_ign": betas[1][:4], "fields": fields}
    return votes.flatten(3).unsqueeze(0), activations, keywords


def test_the_dense_example_has_the_numbers_of_the_authors_code():
    votes, activations, keywords = published_example()
    routed = heinsen_routing(votes, activations, **keywords, **OFFICIAL)
    expected = torch.tensor([0.1019861818, -1.4161043077, -0.8251476015], dtype=torch.float64)
    torch.testing.assert_close(routed.scores[0], expected, **AS_GIVEN)
    pose = [-0.0172779449, 0.4105572555, 0.0922124221, -0.3715964754]
    torch.testing.assert_close(routed.poses[0, 0], torch.tensor(pose, dtype=torch.float64), **AS_GIVEN)
    share = torch.tensor([0.6537309502, 0.3373704439, 0.0088986059], dtype=torch.float64)
    torch.testing.assert_close(routed.coupling[0, 0], share, **AS_GIVEN)


def test_the_example_with_windows_has_the_numbers_of_an_independent_implementation():
    votes, activations, keywords = published_example([[0, 1, 2, 3], [2, 3, 4, 5]])
    routed = heinsen_routing(votes, activations, **keywords, **OFFICIAL)
    scores = [-0.0744695953, -1.3672462091, -0.2340727286, 1.4074129495, -0.9495229705, 0.3133322549]
    torch.testing.assert_close(routed.scores[0], torch.tensor(scores, dtype=torch.float64), **AS_GIVEN)
    first, second = routed.coupling[0, 0, 2], routed.coupling[0, 1, 0]  # child 2
    assert first[0].item() == pytest.approx(3.4e-13, rel=0.02)
    share = [0.0001668567, 0.0000101352, 0.0001661632, 0.0064185859, 0.9932382590]
    got = torch.cat([first[1:], second])
    torch.testing.assert_close(got, torch.tensor(share, dtype=torch.float64), **AS_GIVEN)
    assert (first.sum() + second.sum()).item() == pytest.approx(1)


def test_the_clamped_divisor_is_close_to_the_authors():
    for places in (None, [[0, 1, 2, 3], [2, 3, 4, 5]]):
        votes, activations, keywords = published_example(places)
        ours = heinsen_routing(votes, activations, **keywords)
        official = heinsen_routing(votes, activations, **keywords, **OFFICIAL)
        torch.testing.assert_close(ours.scores, official.scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.poses, official.poses, rtol=0, atol=2e-4)


@EVERY_LAYER
@SHARED
def test_translating_a_parents_votes_translates_its_pose_alone(layer, shared):
    votes, activations, keywords = given(layer, shared=shared)
    by = random(layer[-1], 3, seed=9)
    before, after = (heinsen_routing(v, activations, **keywords) for v in (votes, votes + by))
    moved = (before.poses.unflatten(1, (-1, layer[-1])) + by).flatten(1, 2)
    assert_all_close([moved, before.scores, before.coupling], [after.poses, after.scores, after.coupling])


def test_the_authors_divisor_moves_with_the_votes_only_about():
    votes, activations, keywords = given((7, 3))
    before, after = (heinsen_routing(v, activations, **keywords, **OFFICIAL) for v in (votes, votes + 1))
    torch.testing.assert_close(after.scores, before.scores, rtol=0, atol=1e-3)
    assert not torch.equal(after.scores, before.scores)


@pytest.mark.parametrize("layer", [WINDOWS[0], DENSE[0]], ids=str)
def test_at_the_published_start_all_scores_are_0_and_only_the_betas_learn(layer):
    routing, (votes, activations, _) = module(layer), given(layer)
    votes.requires_grad_()
    activations.requires_grad_()
    routed = routing(votes, activations)
    assert not routed.scores.any()
    weight = random(*routed.scores.shape, seed=5)
    gradients = torch.autograd.grad(
        (weight * routed.scores).sum(), [votes, activations, *routing.parameters()]
    )
    assert [bool(gradient.any()) for gradient in gradients] == [False, False, True, True]


@pytest.mark.parametrize("layer", [WINDOWS[0], DENSE[0]], ids=str)
def test_the_start_that_learns_gives_gradients_to_everything(layer):
    torch.manual_seed(0)
    routing, (votes, activations, _) = module(layer, beta_start=0.5), given(layer)
    inputs = [votes.requires_grad_(), activations.requires_grad_(), *routing.parameters()]
    routed = routing(votes, activations)
    for gradient in torch.autograd.grad(routed.scores.square().sum(), inputs):
        assert gradient.any()


def test_beta_start_is_a_standard_deviation():
    torch.manual_seed(0)
    routing = module((300, 20), beta_start=0.5)
    for beta in (routing.beta_use, routing.beta_ign):
        assert beta.std().item() == pytest.approx(0.5, rel=0.05)
        assert abs(beta.mean().item()) < 0.02
    assert not torch.equal(routing.beta_use, routing.beta_ign)


@pytest.mark.parametrize("layer", [(3, 3, 2, (2, 2), 1, 2), *DENSE], ids=str)
def test_each_child_counts_once_where_using_and_ignoring_it_pay_the_same(layer):
    votes, activations, keywords = given(layer)
    ones = torch.ones_like(keywords["beta_use"])
    scores = heinsen_routing(votes, activations, **{**keywords, "beta_use": ones, "beta_ign": -ones}).scores
    fields = keywords["fields"]
    seen = activations if fields is None else activations[:, fields.children]
    expected = seen.sum(-1, keepdim=True).expand(*seen.shape[:-1], layer[-1])
    torch.testing.assert_close(scores, expected.reshape(scores.shape))


@EVERY_LAYER
@SHARED
def test_silent_children_have_no_effect(layer, shared):
    votes, activations, keywords = given(layer, shared=shared)
    activations[:, ::2] = 0
    fields = keywords["fields"]
    places = torch.arange(votes.shape[-3]) if fields is None else fields.children
    silent = (places % 2 == 0).view(1, *places.shape, 1, 1)
    after = heinsen_routing(votes + 10 * silent * random(*votes.shape, seed=8), activations, **keywords)
    before = heinsen_routing(votes, activations, **keywords)
    for name in ("scores", "poses", "activations"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name), rtol=0, atol=0)


def test_permuting_children_with_their_parameters_changes_nothing():
    votes, activations, keywords = given((7, 3))
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    before = heinsen_routing(votes, activations, **keywords)
    permuted = {name: None if beta is None else beta[order] for name, beta in keywords.items()}
    after = heinsen_routing(votes[:, order], activations[:, order], **permuted)
    torch.testing.assert_close(after.scores, before.scores)
    torch.testing.assert_close(after.poses, before.poses)
    torch.testing.assert_close(after.coupling, before.coupling[:, order])


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_one_iteration_reads_the_votes_for_the_poses_alone(layer):
    votes, activations, keywords = given(layer)
    first, other = (
        heinsen_routing(v, activations, iterations=1, **keywords)
        for v in (votes, random(*votes.shape, seed=7))
    )
    torch.testing.assert_close(first.scores, other.scores, rtol=0, atol=0)
    torch.testing.assert_close(first.coupling, other.coupling, rtol=0, atol=0)
    assert not torch.equal(first.poses, other.poses)


@EVERY_LAYER
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fill", [0.0, 1e-12, 1.0])
def test_values_and_gradients_are_finite(layer, dtype, fill):
    for scale in (0.0, 1e-3, 1.0, 1e4):
        votes, activations, keywords = given(layer)
        inputs = [
            (scale * votes).to(dtype),
            torch.full_like(activations, fill).to(dtype),
            keywords.pop("beta_use").to(dtype),
            keywords.pop("beta_ign").to(dtype),
        ]
        inputs = [tensor.requires_grad_() for tensor in inputs]
        betas = dict(zip(("beta_use", "beta_ign"), inputs[2:], strict=True))
        routed = heinsen_routing(*inputs[:2], **betas, **keywords)
        loss = routed.scores.square().sum() + routed.poses.sum() + routed.coupling.square().sum()
        for tensor in (*routed[:3], routed.scores, *torch.autograd.grad(loss, inputs)):
            assert tensor.isfinite().all()


@pytest.mark.parametrize("layer", [WINDOWS[2], DENSE[0]], ids=str)
def test_activations_are_the_sigmoid_of_the_scores(layer):
    routing, (votes, activations, _) = module(layer, beta_start=0.5), given(layer)
    routed = routing(votes, activations)
    torch.testing.assert_close(routed.activations, routed.scores.sigmoid())


@pytest.mark.parametrize("layer", [WINDOWS[2], DENSE[0]], ids=str)
@SHARED
def test_the_module_routes_with_the_betas_it_owns(layer, shared):
    routing, (votes, activations, keywords) = module(layer, shared=shared, beta_start=0.5), given(layer)
    places = votes.shape[-3]
    assert routing.beta_use.shape == routing.beta_ign.shape == ((1 if shared else places), layer[-1])
    keywords |= {"beta_use": routing.beta_use, "beta_ign": routing.beta_ign}
    expected = heinsen_routing(votes, activations, **keywords)
    got = routing(votes, activations)
    assert_all_close([*expected[:3], expected.scores], [*got[:3], got.scores], rtol=0, atol=0)


@pytest.mark.parametrize("layer", [WINDOWS[2], DENSE[0]], ids=str)
def test_the_trace_ends_with_the_result_and_goes_on_if_asked(layer):
    routing, (votes, activations, _) = module(layer, beta_start=0.5), given(layer)
    states, more = routing.trace(votes, activations), routing.trace(votes, activations, iterations=5)
    assert (len(states), len(more)) == (3, 5)
    assert_all_close(states[-1][:3], routing(votes, activations)[:3], rtol=0, atol=0)
    for state, other in zip(states, more, strict=False):
        assert_all_close(state[:3], other[:3], rtol=0, atol=0)
    assert not any(field.requires_grad for field in states[-1][:3])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"iterations": 0}, "iterations must be >= 1, got 0"),
        ({"beta_start": -0.5}, "beta_start must be >= 0, got -0.5"),
        ({"variance_floor": -1.0}, "variance_floor must be >= 0, got -1.0"),
        ({"mass_epsilon": float("nan")}, "mass_epsilon must be >= 0, got nan"),
        ({"implementation": "fast"}, "implementation must be one of auto, reference, fused, got fast"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        HeinsenRouting(6, 4, 3, **{**MODULE, **wrong})


@pytest.mark.usefixtures("no_type_checks")
def test_wrong_shapes_are_refused():
    votes, activations, keywords = given((7, 3))
    with pytest.raises(ValueError, match=r"activations must have shape \[B, I\] = \[2, 7\], got \[2, 6\]"):
        heinsen_routing(votes, activations[:, 1:], **keywords)
    wrong = {**keywords, "beta_ign": keywords["beta_ign"][:5]}
    with pytest.raises(ValueError, match=r"beta_ign must have shape \[7, 3\] or \[1, 3\], got \[5, 3\]"):
        heinsen_routing(votes, activations, **wrong)


def test_half_precision_votes_are_routed_in_float32():
    votes, activations, keywords = given((7, 3))
    keywords |= {name: keywords[name].float() for name in ("beta_use", "beta_ign")}
    routed = heinsen_routing(votes.half(), activations.half(), **keywords)
    assert {routed.poses.dtype, routed.scores.dtype} == {torch.float32}
