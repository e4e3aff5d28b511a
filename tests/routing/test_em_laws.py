"""Laws of EM routing, which hold for any votes."""

import functools
import itertools
from typing import get_args

import pytest
import torch
from em_examples import (
    DENSE,
    EVERY_LAYER,
    EVERY_WINDOW,
    LAYERS,
    NORMALISATION,
    PAPERS_LAMBDA,
    STRONG,
    WINDOWS,
    assert_all_close,
    example,
    fields_of,
    random,
    route,
    seen_by,
    values_and_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from capsexp.ops.receptive_fields import scatter_sum
from capsexp.routing import em


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
    for tensor, other in zip(before[:2], after[:2], strict=True):
        assert (other - tensor).norm() > 0.01 * tensor.norm()
        (gradient,) = torch.autograd.grad(tensor.square().sum(), activations, retain_graph=True)
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
    some = route((4, 3), votes[:, :, :4], activations[:, :4], *betas)
    assert_all_close([some[0], some[1], some[3]], [whole[0], whole[1], whole[3]])


@pytest.mark.parametrize("layer", [WINDOWS[3], DENSE[0]], ids=str)
@NORMALISATION
def test_permuting_the_types_permutes_the_parents(layer, normalisation):
    votes, activations, *betas = example(layer)
    order = torch.tensor([2, 0, 1])
    run = functools.partial(route, layer, normalisation=normalisation)
    before = run(votes, activations, *betas)
    after = run(votes[:, :, :, order], activations, *(tensor[order] for tensor in betas))
    expected = [tensor.unflatten(1, (-1, 3))[:, :, order].flatten(1, 2) for tensor in before[:2]]
    assert_all_close([*expected, before[2][..., order], before[3][..., order]], after)


@pytest.mark.parametrize("normalisation", ["paper", "types"])
def test_children_without_parents_are_harmless(normalisation):
    layer = (6, 6, 1, (3, 3), 2, 2)  # the last row and column have none
    votes, activations, *betas = example(layer)
    activations.requires_grad_()
    results = route(layer, votes, activations, *betas, normalisation=normalisation)
    gradient = torch.autograd.grad(sum(tensor.sum() for tensor in results), activations)[0].view(2, 6, 6)
    assert gradient[:, :5, :5].all()
    assert not gradient[:, 5].any()
    assert not gradient[:, :, 5].any()


@EVERY_LAYER
@NORMALISATION
def test_an_image_alone_is_routed_as_in_a_batch_however_far_its_votes(layer, normalisation):
    votes, *others = example(layer)
    votes[1] *= 1e4
    run = functools.partial(route, layer, normalisation=normalisation)
    batch = run(votes, *others)
    for image in (0, 1):
        alone = run(votes[image, None], others[0][image, None], *others[1:])
        assert_all_close([tensor[image, None] for tensor in batch], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layer", [WINDOWS[1], DENSE[0], (1, 3), (1, 1, 1, (1, 1), 1, 2)], ids=str)
@pytest.mark.parametrize("temperatures", [PAPERS_LAMBDA, STRONG], ids=["paper", "strong"])
def test_values_and_gradients_are_finite_whatever_comes(layer, temperatures, dtype):
    votes, activations, *betas = example(layer, batch=2, dim=16)
    alike = votes[:, :1, :1, :1].expand_as(votes)
    sizes = [votes * scale for scale in (0, 1e-3, 100, 1e4)]
    presences = [torch.full_like(activations, activation) for activation in (0, 1e-12, 1)]
    mixed = activations.clone()
    mixed[:, ::3], mixed[:, 1::3] = 0, 1e-12
    cases = itertools.product([*sizes, alike], [*presences, mixed])
    options = itertools.product(
        get_args(em.Normalisation) if fields_of(layer) else ["paper"], get_args(em.Activation)
    )
    for (given_votes, given_activations), (normalisation, activation) in itertools.product(cases, options):
        inputs = [tensor.to(dtype) for tensor in (given_votes, given_activations, *betas)]
        run = functools.partial(
            route, layer, temperatures=temperatures, normalisation=normalisation, activation=activation
        )
        for tensors in values_and_gradients(run, inputs):
            assert all(tensor.isfinite().all() for tensor in tensors)
