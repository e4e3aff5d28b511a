import copy
import functools
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from capsexp.config.build import build
from capsexp.config.compose import compose, to_plain
from capsexp.ops.receptive_fields import Grid, receptive_fields, scatter_sum
from capsexp.routing import em
from capsexp.routing.em import EMRouting, em_routing
from capsexp.schedule import Linear, Saturating, Step

PAPER = {
    "variance_floor": 0.0005,
    "cost_scale": 1.0,
    "normalisation": "paper",
    "initial_coupling": "paper",
    "activation": "logistic",
    "mean_smoothing": 0.0,
    "detach": False,
}
MODULE = {
    **{name: value for name, value in PAPER.items() if name != "cost_scale"},
    "iterations": 3,
    "inverse_temperature": Saturating(limit=0.01, decay=0.95),
    "inverse_temperature_ramp": 1.0,
    "class_factor": 0.25,
    "beta_u": 0.0,
    "beta_a": "balanced",
    "beta_a_gain": 250,
    "cost_norm": None,
    "implementation": "auto",
}
PAPERS_LAMBDA = (5.0e-4, 9.75e-4, 1.426e-3)
STRONG = (0.3, 0.5, 0.4)  # activations and their competition count

# rows, columns, child types, kernel, stride, parent types
WINDOWS = [
    (5, 5, 2, (3, 3), 1, 2),
    (6, 6, 1, (3, 3), 2, 2),
    (5, 7, 2, (3, 2), 2, 2),
    (4, 3, 1, (2, 3), 1, 3),
    (7, 4, 1, (2, 2), 3, 2),
    (4, 5, 2, (1, 1), 2, 2),
    (3, 3, 2, (3, 3), 1, 1),
    (1, 1, 1, (1, 1), 1, 2),
]
DENSE = [(7, 3), (1, 3), (5, 1), (1, 1)]  # children, parents
LAYERS = [*WINDOWS, *DENSE]
SWITCHES = [
    {"normalisation": "types"},
    {"normalisation": "official_v1"},
    {"initial_coupling": "official"},
    {"activation": "mixing"},
    {"mean_smoothing": 0.1},
    {"cost_scale": 2.5},
    {"variance_floor": 0.3},
    {"detach": True},
    {"detach": True, "mean_smoothing": 0.3, "normalisation": "types"},
]
EVERY_LAYER = pytest.mark.parametrize("layer", LAYERS, ids=str)
EVERY_WINDOW = pytest.mark.parametrize("layer", WINDOWS, ids=str)
NORMALISATION = pytest.mark.parametrize("normalisation", em.NORMALISATIONS)


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fields_of(layer):
    if len(layer) == 2:
        return None
    rows, columns, types, kernel, stride, _ = layer
    return receptive_fields(Grid(rows, columns), types, kernel, stride)


def seen_by(layer):
    """Children of each position, place by place."""
    if len(layer) == 2:
        return [list(range(layer[0]))]
    rows, columns, types, kernel, stride, _ = layer
    return [
        [
            ((row + r) * columns + column + c) * types + kind
            for r in range(kernel[0])
            for c in range(kernel[1])
            for kind in range(types)
        ]
        for row in range(0, rows - kernel[0] + 1, stride)
        for column in range(0, columns - kernel[1] + 1, stride)
    ]


def example(layer, *, batch=2, dim=3, seed=0):
    """Votes, activations, beta_u, beta_a."""
    windows, types = seen_by(layer), layer[-1]
    children = layer[0] if len(layer) == 2 else layer[0] * layer[1] * layer[2]
    votes = random(batch, len(windows), len(windows[0]), types, dim, seed=seed)
    activations = random(batch, children, seed=seed + 1).sigmoid()
    return votes, activations, random(types, seed=seed + 2), random(types, seed=seed + 3)


def route(layer, votes, activations, beta_u, beta_a, temperatures=STRONG, **changes):
    """Poses, activations, coupling [B, P, K, J], cost."""
    routed, cost = em_routing(
        votes,
        activations,
        fields=fields_of(layer),
        beta_u=beta_u,
        beta_a=beta_a,
        inverse_temperature=torch.tensor(temperatures, dtype=torch.float64).to(beta_a.dtype),
        **{**PAPER, **changes},
    )
    return routed.poses, routed.activations, routed.coupling.view(votes.shape[:4]), cost


def procedure_1(layer, votes, activations, beta_u, beta_a, temperatures=STRONG, **changes):
    """What `route` returns, by the loops of the paper."""
    switches = {**PAPER, **changes}
    windows, types = seen_by(layer), range(votes.shape[3])
    parents = [(p, j) for p in range(len(windows)) for j in types]
    seen = {i: [p for p, window in enumerate(windows) if i in window] for i in range(activations.shape[1])}
    official = switches["initial_coupling"] == "official"
    coupling = {
        (i, p, j): votes.new_tensor(1 / (len(types) * (1 if official else len(seen[i])))).expand(len(votes))
        for p, j in parents
        for i in windows[p]
    }
    mean = {parent: torch.zeros_like(votes[:, 0, 0, 0]) for parent in parents}
    for iteration, temperature in enumerate(temperatures):
        active, log_density, costs, masses = {}, {}, {}, {}
        for p, j in parents:
            r = torch.stack([coupling[i, p, j] * activations[:, i] for i in windows[p]], 1).unsqueeze(2)
            v = votes[:, p, :, j]
            before, smoothing = mean[p, j], switches["mean_smoothing"]
            if switches["detach"]:
                before = before.detach()
            mu = (1 - smoothing) * (r * v).sum(1) / r.sum(1) + smoothing * before
            variance = (r * (v - mu.unsqueeze(1)) ** 2).sum(1) / r.sum(1) + switches["variance_floor"]
            sigma, mass = variance.sqrt(), r.sum((1, 2))
            cost = switches["cost_scale"] * sum((beta_u[j] + s.log()) * mass for s in sigma.unbind(1))
            density = Normal(mu.unsqueeze(1), sigma.unsqueeze(1), validate_args=False)
            for k, i in enumerate(windows[p]):
                log_density[i, p, j] = density.log_prob(v).sum(2)[:, k]
            mean[p, j], costs[p, j], masses[p, j] = mu, cost, mass
            active[p, j] = 1 / (1 + (-temperature * (beta_a[j] - cost)).exp())
        if switches["activation"] == "mixing":
            active = {parent: masses[parent] / sum(masses.values()) for parent in parents}
        if iteration + 1 == len(temperatures):
            break
        rivals = {
            "paper": lambda one, other: True,
            "types": lambda one, other: one[0] == other[0],
            "official_v1": lambda one, other: len(windows) == 1 or one[1] == other[1],
        }[switches["normalisation"]]
        for i in seen:
            logs = {(p, j): active[p, j].log() + log_density[i, p, j] for p in seen[i] for j in types}
            for one in logs:
                total = torch.stack([logs[other] for other in logs if rivals(one, other)]).logsumexp(0)
                share = (logs[one] - total).exp()
                coupling[(i, *one)] = share.detach() if switches["detach"] else share
    shares = [[[coupling[i, p, j] for j in types] for i in window] for p, window in enumerate(windows)]
    return (
        torch.stack([mean[parent] for parent in parents], 1),
        torch.stack([active[parent] for parent in parents], 1),
        torch.stack([torch.stack([torch.stack(k, 1) for k in p], 1) for p in shares], 1),
        torch.stack([costs[parent] for parent in parents], 1).view(len(votes), len(windows), -1),
    )


def values_and_gradients(run, inputs):
    """Results, then gradients of a random linear function of them."""
    inputs = [one.detach().requires_grad_() for one in inputs]
    results = run(*inputs)
    loss = sum((one * random(*one.shape, seed=9).to(one)).sum() for one in results)
    return [one.detach() for one in results], torch.autograd.grad(loss, inputs, materialize_grads=True)


def assert_all_close(expected, got, **tolerances):
    for one, other in zip(expected, got, strict=True):
        torch.testing.assert_close(other, one, **tolerances)


def assert_is_procedure_1(layer, inputs, **options):
    expected, got = (
        values_and_gradients(functools.partial(how, layer, **options), inputs) for how in (procedure_1, route)
    )
    for one, other in zip(expected, got, strict=True):
        assert_all_close(one, other, rtol=1e-10, atol=1e-12)


@EVERY_LAYER
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_routing_is_procedure_1_of_the_paper(layer, iterations):
    assert_is_procedure_1(layer, example(layer), temperatures=STRONG[:iterations])


@pytest.mark.parametrize("layer", [WINDOWS[0], WINDOWS[2], DENSE[0]], ids=str)
@pytest.mark.parametrize("changes", SWITCHES, ids=str)
def test_every_switch_does_what_the_loops_do(layer, changes):
    assert_is_procedure_1(layer, example(layer, batch=1), **changes)


@pytest.mark.parametrize("layer", [WINDOWS[2], WINDOWS[3], DENSE[0]], ids=str)
def test_float32_error_is_at_most_twice_that_of_the_loops(layer):
    errors = []
    for seed in range(0, 20, 4):  # the median of some draws: one picture near a tie outweighs all the others
        inputs = example(layer, batch=4, dim=16, seed=seed)
        single = [one.float() for one in inputs]
        exact, plain_torch, ours = (
            itertools.chain(
                *values_and_gradients(functools.partial(how, layer, temperatures=PAPERS_LAMBDA), one)
            )
            for how, one in [(procedure_1, inputs), (procedure_1, single), (route, single)]
        )
        errors.append(
            [
                [((one - truth).norm() / truth.norm()).item() for one in both]
                for truth, *both in zip(exact, plain_torch, ours, strict=True)
            ]
        )
    allowed, got = torch.tensor(errors).median(0).values.unbind(1)
    assert (got <= 2 * allowed + 1e-7).all()


@pytest.mark.parametrize("layer", [(3, 2, 1, (2, 2), 1, 2), (4, 1, 1, (2, 1), 2, 1), (3, 2)], ids=str)
@NORMALISATION
def test_gradients_pass_gradcheck(layer, normalisation):
    inputs = [one.requires_grad_() for one in example(layer, batch=1, dim=2)]
    run = functools.partial(route, layer, normalisation=normalisation, variance_floor=0.1)
    assert torch.autograd.gradcheck(run, inputs)


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    types=st.integers(1, 3),
    iterations=st.integers(1, 3),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
)
@settings(max_examples=25, deadline=None)
def test_coupling_of_a_child_sums_to_one_over_all_its_parents(
    rows, columns, kernel, stride, types, iterations, scale
):
    layer = (rows, columns, 2, (min(kernel[0], rows), min(kernel[1], columns)), stride, types)
    votes, *others = example(layer)
    coupling = route(layer, scale * votes, *others, temperatures=STRONG[:iterations])[2]
    fields = fields_of(layer)
    total = scatter_sum(coupling.sum(3), fields)
    connected = torch.tensor([any(i in window for window in seen_by(layer)) for i in range(fields.in_caps)])
    torch.testing.assert_close(total, connected.to(total).expand_as(total))


@EVERY_WINDOW
def test_types_that_compete_at_each_position_apart_give_a_child_one_for_each_position(layer):
    coupling = route(layer, *example(layer), normalisation="types")[2]
    torch.testing.assert_close(coupling.sum(3), torch.ones_like(coupling[..., 0]))


@EVERY_WINDOW
def test_positions_that_compete_for_each_type_apart_give_a_child_one_for_each_type(layer):
    coupling = route(layer, *example(layer), normalisation="official_v1")[2]
    total = scatter_sum(coupling, fields_of(layer))
    torch.testing.assert_close(total[total > 0], torch.ones_like(total[total > 0]))


@NORMALISATION
def test_dense_parents_compete_for_every_child_whatever_the_normalisation(normalisation):
    coupling = route((7, 3), *example((7, 3)), normalisation=normalisation)[2]
    torch.testing.assert_close(coupling.sum(3), torch.ones_like(coupling[..., 0]))


def test_positions_compete_for_a_child():
    layer = (5, 5, 1, (3, 3), 1, 2)
    votes, *others = example(layer)
    before = route(layer, votes, *others, temperatures=STRONG[:2])[2]
    votes[:, 0] += 100 * random(*votes[:, 0].shape, seed=5)  # the first position's Gaussians become vague
    after = route(layer, votes, *others, temperatures=STRONG[:2])[2]
    middle = [(p, window.index(12)) for p, window in enumerate(seen_by(layer))]
    assert len(middle) == 9
    shares = torch.stack([before[:, p, k].sum(1) for p, k in middle], 1)
    assert (shares > 0).all()
    assert (shares < 1).all()
    for p, k in middle[1:]:
        assert (after[:, p, k].sum(1) > before[:, p, k].sum(1)).all()


def test_coupling_starts_at_one_over_the_number_of_parents():
    layer = (6, 6, 1, (3, 3), 1, 4)
    votes, *others = example(layer)
    coupling = route(layer, votes, *others, temperatures=STRONG[:1])[2]
    share = {i: coupling[0, p, k, 0] for p, window in enumerate(seen_by(layer)) for k, i in enumerate(window)}
    corner, edge, inner = share[0], share[2], share[14]
    assert [one.item() for one in (corner, edge, inner)] == pytest.approx([1 / 4, 1 / 12, 1 / 36])
    official = route(layer, votes, *others, temperatures=STRONG[:1], initial_coupling="official")[2]
    torch.testing.assert_close(official, torch.full_like(official, 1 / 4))


@pytest.mark.parametrize("layer", [WINDOWS[0], DENSE[0]], ids=str)
def test_the_coupling_is_the_one_that_made_the_poses(layer):
    votes, activations, *betas = example(layer)
    poses, _, coupling, _ = route(layer, votes, activations, *betas)
    places = (
        activations.unsqueeze(1) if fields_of(layer) is None else activations[:, fields_of(layer).children]
    )
    weights = (coupling * places.unsqueeze(3)).unsqueeze(4)
    torch.testing.assert_close((weights * votes).sum(2) / weights.sum(2), poses.view_as(votes[:, :, 0]))


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_no_e_step_follows_the_last_m_step(iterations, monkeypatch):
    steps = []
    e_step = em._e_step
    monkeypatch.setattr(em, "_e_step", lambda *given_: steps.append(1) or e_step(*given_))
    route(WINDOWS[0], *example(WINDOWS[0]), temperatures=STRONG[:iterations])
    assert len(steps) == iterations - 1


@pytest.mark.parametrize("layer", [WINDOWS[0], WINDOWS[2], DENSE[0]], ids=str)
@pytest.mark.parametrize("iterations", [1, 3])
@NORMALISATION
def test_output_depends_on_the_activations_of_the_children(layer, iterations, normalisation):
    votes, activations, *betas = example(layer)
    run = functools.partial(
        route, layer, votes, temperatures=STRONG[:iterations], normalisation=normalisation
    )
    activations.requires_grad_()
    before = run(activations, *betas)
    after = run(random(*activations.shape, seed=7).sigmoid(), *betas)
    for one, other in zip(before[:2], after[:2], strict=True):
        assert (other - one).norm() > 0.01 * one.norm()
        (gradient,) = torch.autograd.grad(one.square().sum(), activations, retain_graph=True)
        assert gradient.norm() > 0.01


@given(seed=st.integers(0, 1000), index=st.integers(0, len(LAYERS) - 1), iterations=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_translating_the_votes_translates_the_poses_and_leaves_the_rest(seed, index, iterations):
    layer = LAYERS[index]
    votes, *others = example(layer, seed=seed)
    by = random(layer[-1], votes.shape[4], seed=seed + 4)
    run = functools.partial(route, layer, temperatures=STRONG[:iterations])
    before, after = run(votes, *others), run(votes + by, *others)
    moved = before[0].unflatten(1, (-1, layer[-1])) + by
    assert_all_close([moved.flatten(1, 2), *before[1:]], after)


@EVERY_LAYER
@NORMALISATION
def test_silent_children_have_no_effect(layer, normalisation):
    votes, activations, *betas = example(layer)
    activations[:, ::2] = 0
    fields = fields_of(layer)
    silent = torch.arange(votes.shape[2]) if fields is None else fields.children
    silent = (silent % 2 == 0).view(1, -1, votes.shape[2], 1, 1)
    run = functools.partial(route, layer, normalisation=normalisation)
    before = run(votes, activations, *betas)
    after = run(votes + 10 * silent * random(*votes.shape, seed=8), activations, *betas)
    for index in (0, 1, 3):
        torch.testing.assert_close(after[index], before[index], rtol=0, atol=0)


def test_removing_silent_children_changes_nothing():
    votes, activations, *betas = example((7, 3))
    activations[:, 4:] = 0
    whole = route((7, 3), votes, activations, *betas)
    part = route((4, 3), votes[:, :, :4], activations[:, :4], *betas)
    assert_all_close([part[0], part[1], part[3]], [whole[0], whole[1], whole[3]])


@pytest.mark.parametrize("layer", [WINDOWS[3], DENSE[0]], ids=str)
@NORMALISATION
def test_permuting_the_types_permutes_the_parents(layer, normalisation):
    votes, activations, *betas = example(layer)
    order = torch.tensor([2, 0, 1])
    run = functools.partial(route, layer, normalisation=normalisation)
    before = run(votes, activations, *betas)
    after = run(votes[:, :, :, order], activations, *(one[order] for one in betas))
    expected = [one.unflatten(1, (-1, 3))[:, :, order].flatten(1, 2) for one in before[:2]]
    assert_all_close([*expected, before[2][..., order], before[3][..., order]], after)


@pytest.mark.parametrize("normalisation", ["paper", "types"])
def test_children_without_parents_are_harmless(normalisation):
    layer = (6, 6, 1, (3, 3), 2, 2)  # the last row and column have none
    votes, activations, *betas = example(layer)
    activations.requires_grad_()
    results = route(layer, votes, activations, *betas, normalisation=normalisation)
    gradient = torch.autograd.grad(sum(one.sum() for one in results), activations)[0].view(2, 6, 6)
    assert gradient[:, :5, :5].all()
    assert not gradient[:, 5].any()
    assert not gradient[:, :, 5].any()


@EVERY_LAYER
@NORMALISATION
def test_a_picture_alone_is_routed_as_in_a_batch_however_far_its_votes(layer, normalisation):
    votes, *others = example(layer)
    votes[1] *= 1e4
    run = functools.partial(route, layer, normalisation=normalisation)
    batch = run(votes, *others)
    for picture in (0, 1):
        alone = run(votes[picture, None], others[0][picture, None], *others[1:])
        assert_all_close([one[picture, None] for one in batch], alone)


def test_mixing_proportions_share_one_activation_among_all_parents():
    for layer in (WINDOWS[0], DENSE[0]):
        active = route(layer, *example(layer), activation="mixing")[1]
        torch.testing.assert_close(active.sum(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layer", [WINDOWS[1], DENSE[0], (1, 3), (1, 1, 1, (1, 1), 1, 2)], ids=str)
@pytest.mark.parametrize("temperatures", [PAPERS_LAMBDA, STRONG], ids=["paper", "strong"])
def test_values_and_gradients_are_finite_whatever_comes(layer, temperatures, dtype):
    votes, activations, *betas = example(layer, batch=2, dim=16)
    alike = votes[:, :1, :1, :1].expand_as(votes)
    sizes = [votes * scale for scale in (0, 1e-3, 100, 1e4)]
    presences = [torch.full_like(activations, one) for one in (0, 1e-12, 1)]
    mixed = activations.clone()
    mixed[:, ::3], mixed[:, 1::3] = 0, 1e-12
    cases = itertools.product([*sizes, alike], [*presences, mixed])
    options = itertools.product(em.NORMALISATIONS if fields_of(layer) else ["paper"], em.ACTIVATIONS)
    for (given_votes, given_activations), (normalisation, activation) in itertools.product(cases, options):
        inputs = [one.to(dtype) for one in (given_votes, given_activations, *betas)]
        run = functools.partial(
            route, layer, temperatures=temperatures, normalisation=normalisation, activation=activation
        )
        for tensors in values_and_gradients(run, inputs):
            assert all(tensor.isfinite().all() for tensor in tensors)


def test_detached_coupling_leaves_the_gradient_of_the_last_m_step():
    votes, activations, beta_u, beta_a = (one.requires_grad_() for one in example((7, 3)))
    inputs = votes, activations, beta_u, beta_a
    poses, active, coupling, _ = route((7, 3), *inputs, detach=True)
    assert not coupling.requires_grad
    r = coupling[:, 0] * activations.unsqueeze(2)
    mean = torch.einsum("bij,bijd->bjd", r, votes[:, 0]) / r.sum(1).unsqueeze(2)
    squares = (votes[:, 0] - mean.unsqueeze(1)).square()
    variance = torch.einsum("bij,bijd->bjd", r, squares) / r.sum(1).unsqueeze(2) + 0.0005
    cost = ((beta_u.unsqueeze(1) + variance.sqrt().log()) * r.sum(1).unsqueeze(2)).sum(2)
    fixed = mean.square().sum() + (STRONG[-1] * (beta_a - cost)).sigmoid().square().sum()
    assert_all_close(
        torch.autograd.grad(fixed, inputs),
        torch.autograd.grad(poses.square().sum() + active.square().sum(), inputs),
    )


@pytest.mark.parametrize("layer", [WINDOWS[0], DENSE[0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_autocast_routes_in_float32(layer, dtype):
    votes, activations, *betas = (one.float() for one in example(layer))
    low = votes.to(dtype), activations.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        routed = route(layer, *low, *betas)
    assert_all_close(route(layer, *(one.float() for one in low), *betas), routed, rtol=0, atol=0)


def module(layer, dim=3, **changes):
    children = fields_of(layer).in_caps if fields_of(layer) else layer[0]
    return EMRouting(children, layer[-1], dim, fields_of(layer), **{**MODULE, **changes}).double()


def votes_for(layer, **options):
    """Votes and activations as a module takes them."""
    votes, activations, *_ = example(layer, **options)
    return (votes.squeeze(1) if fields_of(layer) is None else votes), activations


def test_lambda_is_that_of_the_authors():
    node = to_plain(compose("train", ["routing=em", "routing.iterations=5"], config_dir=None))["routing"]
    make = build(node, at="routing")
    expected = [5.0e-4, 9.75e-4, 1.426e-3, 1.855e-3, 2.262e-3]
    conv, classes = make(25, 2, 16, fields_of((5, 5, 1, (3, 3), 1, 2))), make(25, 2, 16)
    assert conv.inverse_temperatures.tolist() == pytest.approx(expected, rel=1e-3)
    assert classes.inverse_temperatures.tolist() == pytest.approx([one / 4 for one in expected], rel=1e-3)


@pytest.mark.parametrize("layer", [WINDOWS[0], DENSE[0]], ids=str)
def test_module_routes_with_the_parameters_it_owns(layer):
    routing, (votes, activations) = module(layer, beta_u=0.5, beta_a=20), votes_for(layer)
    factor = 1.0 if fields_of(layer) else 0.25
    expected = route(
        layer,
        votes.view(2, -1, *votes.shape[-3:]),
        activations,
        torch.full((layer[-1],), 0.5, dtype=torch.float64),
        torch.full((layer[-1],), 20.0, dtype=torch.float64),
        temperatures=[factor * 0.01 * (1 - 0.95 ** (i + 1)) for i in range(3)],
    )
    routed = routing(votes, activations)
    # lambda is kept in float32 until .double()
    assert_all_close(expected[:2], routed[:2], rtol=1e-6, atol=1e-9)
    assert_all_close(expected[3:], [routing.cost(votes, activations)], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("layer", "gain"), [(WINDOWS[0], 250), (DENSE[0], 1000)], ids=str)
def test_beta_a_starts_at_its_number_whatever_the_gain(layer, gain):
    routing = module(layer, beta_a=-1250, beta_u=0.709)
    assert (routing.gain, routing.beta_a.shape) == (gain, (layer[-1],))
    torch.testing.assert_close(routing.gain * routing.beta_a, torch.full_like(routing.beta_a, -1250))
    torch.testing.assert_close(routing.beta_u, torch.full_like(routing.beta_u, 0.709), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("layer", "children_per_parent"),
    [((14, 14, 8, (3, 3), 2, 16), 2.3472), ((6, 6, 16, (3, 3), 1, 16), 2.25), ((256, 5), 51.2)],
    ids=str,
)
def test_cost_norm_divides_by_the_children_per_parent(layer, children_per_parent):
    scale = module(layer, cost_norm=100).options["cost_scale"]
    assert 100 / scale == pytest.approx(children_per_parent, rel=1e-4)
    assert module(layer).options["cost_scale"] == 1


@pytest.mark.parametrize("layer", [(9, 9, 3, (3, 3), 2, 4), (40, 5)], ids=str)
@pytest.mark.parametrize("cost_norm", [None, 100])
@pytest.mark.parametrize("iterations", [1, 3])
def test_balance_leaves_half_of_the_capsules_of_each_type_active(layer, cost_norm, iterations):
    routing = module(layer, dim=16, cost_norm=cost_norm, iterations=iterations)
    votes, activations = votes_for(layer, batch=16, dim=16)
    for _ in range(3):
        routing.balance(routing.cost(votes, activations))
    active = routing(votes, activations).activations.view(-1, layer[-1]) > 0.5
    assert active.double().mean(0).tolist() == pytest.approx([0.5] * layer[-1], abs=0.05)


def test_balance_leaves_a_number_alone():
    routing = module((7, 3), beta_a=3.0)
    routing.balance(random(4, 1, 3))
    torch.testing.assert_close(routing.gain * routing.beta_a, torch.full_like(routing.beta_a, 3.0))


@pytest.mark.parametrize("layer", [WINDOWS[0], DENSE[0]], ids=str)
def test_advance_moves_lambda_along_its_ramp_and_tells_the_last(layer):
    ramp = Linear(start=0.5, end=2.0, steps=1.0)
    routing, (votes, activations) = module(layer, inverse_temperature_ramp=ramp), votes_for(layer)
    last = (1.0 if fields_of(layer) else 0.25) * 0.01 * (1 - 0.95**3)
    for number, factor in [(0, 0.5), (50, 1.25), (100, 2.0)]:
        told = routing.advance(Step(number, 100))
        assert told == {"inverse_temperature": pytest.approx(factor * last)}
        logit = routing(votes, activations).activations.logit()
        cost = routing.cost(votes, activations).flatten(1)
        torch.testing.assert_close(-factor * last * cost, logit, rtol=1e-6, atol=1e-9)


def test_the_ramp_travels_with_the_weights():
    ramp = Linear(start=0.0, end=2.0, steps=1.0)
    routing, other = (module((7, 3), inverse_temperature_ramp=ramp) for _ in range(2))
    assert other.ramp == 0
    routing.advance(Step(75, 100))
    other.load_state_dict(routing.state_dict())
    assert other.ramp == 1.5


def test_weights_fit_any_number_of_iterations():
    one, three = module((7, 3), iterations=1), module((7, 3), iterations=3, beta_a=2.0)
    one.load_state_dict(three.state_dict())
    torch.testing.assert_close(one.beta_a, three.beta_a)
    assert len(one.inverse_temperatures) == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_routes_alike(duplicate):
    routing, inputs = module(WINDOWS[2]), votes_for(WINDOWS[2])
    assert_all_close(routing(*inputs)[:3], duplicate(routing)(*inputs)[:3])


SETTINGS = {  # but for `implementation`, which must change nothing
    "iterations": 2,
    "inverse_temperature": Saturating(limit=0.02, decay=0.95),
    "inverse_temperature_ramp": 2.0,
    "class_factor": 0.5,
    "beta_u": 0.5,
    "beta_a": 2.0,
    "beta_a_gain": 500,
    "cost_norm": 100,
    "variance_floor": 0.01,
    "normalisation": "types",
    "initial_coupling": "official",
    "activation": "mixing",
    "mean_smoothing": 0.1,
    "detach": True,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_acts(name):
    layer, results = DENSE[0] if name == "class_factor" else WINDOWS[0], []
    for changes in ({}, {name: SETTINGS[name]}):
        routing = module(layer, **{"beta_a": 1.0, **changes})
        votes, activations = votes_for(layer)
        routed = routing(votes.requires_grad_(), activations)
        loss = routed.poses.square().sum() + routed.activations.square().sum()
        gradients = torch.autograd.grad(loss, [votes, *routing.parameters()], materialize_grads=True)
        results.append(torch.cat([one.flatten() for one in (*routed[:3], *gradients)]))
    assert not torch.allclose(*results, rtol=1e-6, atol=0)


def test_no_setting_of_the_config_is_left_out():
    node = to_plain(compose("train", ["routing=em"], config_dir=None))["routing"]
    assert set(node) - {"_target_", "_partial_"} == set(MODULE) == {*SETTINGS, "implementation"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"iterations": 0}, "iterations must be >= 1, got 0"),
        ({"normalisation": "all"}, "normalisation must be one of paper, types, official_v1, got all"),
        ({"initial_coupling": "zero"}, "initial_coupling must be one of paper, official, got zero"),
        ({"activation": "softmax"}, "activation must be one of logistic, mixing, got softmax"),
        ({"class_factor": 0}, "class_factor must be > 0, got 0"),
        ({"beta_a_gain": -1.0}, "beta_a_gain must be > 0, got -1.0"),
        ({"cost_norm": 0}, "cost_norm must be > 0, got 0"),
        ({"cost_norm": float("inf")}, "cost_norm must be > 0, got inf"),
        ({"variance_floor": -0.1}, "variance_floor must be >= 0, got -0.1"),
        ({"variance_floor": float("nan")}, "variance_floor must be >= 0, got nan"),
        ({"mean_smoothing": 1}, r"mean_smoothing must be in \[0, 1\), got 1"),
        ({"mean_smoothing": -0.1}, r"mean_smoothing must be in \[0, 1\), got -0.1"),
        ({"beta_a": "median"}, "beta_a must be a number or balanced, got median"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        EMRouting(6, 4, 3, **{**MODULE, **wrong})


@pytest.mark.compile
def test_compiled_module_gives_the_same_values_and_gradients():
    layer = WINDOWS[2]
    routing = module(layer, beta_a=1.0, iterations=2)
    inputs, compiled = [one.requires_grad_() for one in votes_for(layer)], torch.compile(routing)

    def results(forward):
        routed = forward(*inputs)[:3]
        loss = sum(one.square().sum() for one in routed)
        return *routed, *torch.autograd.grad(loss, [*inputs, *routing.parameters()])

    for step in (Step(0, 1), Step(1, 1)):
        routing.advance(step)
        assert_all_close(results(routing), results(compiled))


def test_a_plain_number_is_the_same_temperature_in_every_iteration():
    routing = EMRouting(5, 3, 4, **{**MODULE, "inverse_temperature": 0.01, "class_factor": 1.0})
    torch.testing.assert_close(routing.inverse_temperatures, torch.full((3,), 0.01))
