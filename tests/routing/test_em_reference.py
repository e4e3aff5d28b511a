"""EM routing against the loops of the paper."""

import functools
import itertools

import pytest
import torch
from em_examples import (
    DENSE,
    EVERY_LAYER,
    NORMALISATION,
    PAPERS_LAMBDA,
    STRONG,
    SWITCHES,
    WINDOWS,
    assert_all_close,
    example,
    fields_of,
    mean_log_ratio,
    procedure_1,
    route,
    seen_by,
    values_and_gradients,
)

from capsexp.routing import em


def assert_is_procedure_1(layer, inputs, **options):
    expected, got = (
        values_and_gradients(functools.partial(how, layer, **options), inputs) for how in (procedure_1, route)
    )
    for tensors, others in zip(expected, got, strict=True):
        assert_all_close(tensors, others, rtol=1e-10, atol=1e-12)


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
    for seed in range(0, 64, 4):
        inputs = example(layer, batch=4, dim=16, seed=seed)
        single = [tensor.float() for tensor in inputs]
        exact, plain_torch, ours = (
            itertools.chain(
                *values_and_gradients(functools.partial(how, layer, temperatures=PAPERS_LAMBDA), tensors)
            )
            for how, tensors in [(procedure_1, inputs), (procedure_1, single), (route, single)]
        )
        errors.append(
            [
                [((tensor - truth).norm() / truth.norm()).item() for tensor in both]
                for truth, *both in zip(exact, plain_torch, ours, strict=True)
            ]
        )
    # Over 40 draws (Xeon, AVX-512) log2 of the ratio of both errors has means of -0.4 to 0 and deviations of
    # up to 1.6, so the mean of 16 draws is 4.9 deviations or more below 1: false alarms below 1e-5.
    assert (mean_log_ratio(errors) <= 1).all(), mean_log_ratio(errors)


@pytest.mark.parametrize("layer", [(3, 2, 1, (2, 2), 1, 2), (4, 1, 1, (2, 1), 2, 1), (3, 2)], ids=str)
@NORMALISATION
def test_gradients_pass_gradcheck(layer, normalisation):
    inputs = [tensor.requires_grad_() for tensor in example(layer, batch=1, dim=2)]
    run = functools.partial(route, layer, normalisation=normalisation, variance_floor=0.1)
    assert torch.autograd.gradcheck(run, inputs)


def test_coupling_starts_at_one_over_the_number_of_parents():
    layer = (6, 6, 1, (3, 3), 1, 4)
    votes, *others = example(layer)
    coupling = route(layer, votes, *others, temperatures=STRONG[:1])[2]
    share = {i: coupling[0, p, k, 0] for p, window in enumerate(seen_by(layer)) for k, i in enumerate(window)}
    corner, edge, inner = share[0], share[2], share[14]
    assert [tensor.item() for tensor in (corner, edge, inner)] == pytest.approx([1 / 4, 1 / 12, 1 / 36])
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
    e_step = em.e_step
    monkeypatch.setattr(em, "e_step", lambda *arguments: steps.append(1) or e_step(*arguments))
    route(WINDOWS[0], *example(WINDOWS[0]), temperatures=STRONG[:iterations])
    assert len(steps) == iterations - 1


def test_mixing_proportions_share_one_activation_among_all_parents():
    for layer in (WINDOWS[0], DENSE[0]):
        active = route(layer, *example(layer), activation="mixing")[1]
        torch.testing.assert_close(active.sum(1), torch.ones(2, dtype=torch.float64))


def test_detached_coupling_leaves_the_gradient_of_the_last_m_step():
    votes, activations, beta_u, beta_a = (tensor.requires_grad_() for tensor in example((7, 3)))
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
    votes, activations, *betas = (tensor.float() for tensor in example(layer))
    low = votes.to(dtype), activations.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        routed = route(layer, *low, *betas)
    assert_all_close(route(layer, *(tensor.float() for tensor in low), *betas), routed, rtol=0, atol=0)


@pytest.mark.parametrize("layer", [WINDOWS[0], DENSE[0]], ids=str)
def test_the_function_alone_has_the_papers_values(layer):
    votes, activations, *_ = example(layer)
    zeros = torch.zeros(layer[-1], dtype=torch.float64)
    lambdas = [0.01 * (1 - 0.95 ** (t + 1)) for t in range(3)]
    expected = procedure_1(layer, votes, activations, zeros, zeros, temperatures=lambdas)
    dense = fields_of(layer) is None
    routed = em.em_routing(votes[:, 0] if dense else votes, activations, fields=fields_of(layer))
    assert_all_close(expected[:2], routed[:2], rtol=1e-10, atol=1e-12)
    assert routed.coupling.shape == (votes.shape[:1] + votes.shape[2:4] if dense else votes.shape[:4])


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("shapes", "changes", "message"),
    [
        (((2, 7, 3), (2, 7)), {}, r"votes must have shape \[B, I, J, D\] or .*, got \[2, 7, 3\]"),
        (((2, 7, 3, 4), (2, 6)), {}, r"activations must have shape \[B, I\] = \[2, 7\], got \[2, 6\]"),
        (((2, 7, 3, 4), (3, 7)), {}, r"activations must have shape \[B, I\] = \[2, 7\], got \[3, 7\]"),
        (((2, 5, 7, 3, 4), (2, 7)), {}, r"votes .* \[P, K\] = \[1, 7\] without fields, got \[5, 7\]"),
        (
            ((2, 8, 18, 3, 4), (2, 50)),
            {"fields": fields_of(WINDOWS[0])},
            r"votes must have \[P, K\] = \[9, 18\] from fields, got \[8, 18\]",
        ),
        (
            ((2, 9, 18, 3, 4), (2, 49)),
            {"fields": fields_of(WINDOWS[0])},
            r"activations must have shape \[B, I\] = \[2, 50\], got \[2, 49\]",
        ),
        (((2, 7, 3, 4), (2, 7)), {"inverse_temperature": ()}, "inverse_temperature must hold one number"),
        (
            ((2, 7, 3, 4), (2, 7)),
            {"normalisation": "all"},
            "normalisation must be one of paper, types, offic",
        ),
        (((2, 7, 3, 4), (2, 7)), {"initial_coupling": "zero"}, "initial_coupling must be one of paper, of"),
        (
            ((2, 7, 3, 4), (2, 7)),
            {"activation": "relu"},
            "activation must be one of logistic, mixing, got",
        ),
    ],
)
def test_wrong_arguments_are_one_line(shapes, changes, message):
    votes, activations = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message) as caught:
        em.em_routing(votes, activations, **changes)
    assert "\n" not in str(caught.value)
