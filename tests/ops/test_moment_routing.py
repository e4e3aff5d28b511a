"""Heinsen routing by moments of the poses against the same routing of votes."""

import pytest
import torch
from em_examples import mean_log_ratio, random, values_and_gradients

import capsexp
from capsexp.capsules import Capsules
from capsexp.layer.dense_caps import DenseCaps
from capsexp.layer.matrix_caps import SharedClassCaps
from capsexp.ops import moment_routing
from capsexp.ops.kernels.heinsen import fused_heinsen_routing
from capsexp.ops.receptive_fields import Grid
from capsexp.ops.votes import MatrixVotes, window_votes
from capsexp.routing.heinsen import HeinsenRouting, heinsen_routing

DEFAULTS = {"iterations": 3, "variance_floor": 1e-5, "mass_epsilon": 0.0}
# images, children, parents, rows and columns of a pose, columns of a vote
SHAPES = [
    (3, 17, 5, 4, 4, 4),
    (2, 9, 3, 2, 2, 2),
    (2, 6, 4, 1, 5, 5),
    (2, 7, 3, 3, 2, 4),
    (1, 1, 1, 4, 4, 4),
    (2, 5, 1, 4, 4, 4),
]


def inputs(shape, seed=0):
    """Poses, activations, matrices, biases, beta_use, beta_ign."""
    batch, children, parents, rows, width, out = shape
    return [
        random(batch, children, rows * width, seed=seed),
        random(batch, children, seed=seed + 1).sigmoid(),
        random(parents, width, out, seed=seed + 2),
        random(parents, rows * out, seed=seed + 3),
        random(parents, seed=seed + 4),
        random(parents, seed=seed + 5),
    ]


def assert_close(expected, got, tolerance=1e-9):
    """Compare tensors relative to the largest number in each."""
    expected, got = ([tensor.detach() for tensor in tensors] for tensors in (expected, got))
    for tensor, other in zip(expected, got, strict=True):
        assert tensor.shape == other.shape
        assert (other - tensor).abs().max() <= tolerance * max(1.0, float(tensor.abs().max()))


def results(routed):
    return [routed.poses, routed.scores, routed.coupling, routed.activations]


def by_votes(poses, activations, weight, bias, beta_use, beta_ign, offsets=None, **changes):
    rows = poses.unflatten(2, (-1, weight.shape[1]))
    votes = torch.einsum("bicm,jmh->bijch", rows, weight).flatten(3) + bias
    if offsets is not None:
        votes = votes + offsets.unsqueeze(1)
    betas = {"beta_use": beta_use[None], "beta_ign": beta_ign[None]}
    return results(heinsen_routing(votes, activations, **betas, **{**DEFAULTS, **changes}))


def by_moments(poses, activations, weight, bias, beta_use, beta_ign, offsets=None, **changes):
    keywords = {"bias": bias, "offsets": offsets, "beta_use": beta_use, "beta_ign": beta_ign}
    return results(
        moment_routing.moment_routing(poses, activations, weight, **keywords, **{**DEFAULTS, **changes})
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"iterations": 1},
        {"iterations": 2},
        {"iterations": 5, "variance_floor": 0.01},
        {"variance_floor": 0.3},
        {"mass_epsilon": 0.1},
    ],
    ids=str,
)
def test_values_and_all_gradients_are_those_of_votes(shape, changes):
    expected, got = (
        values_and_gradients(lambda *given, run=run: run(*given, **changes), inputs(shape))
        for run in (by_votes, by_moments)
    )
    for both in zip(expected, got, strict=True):
        assert_close(*both)


def test_offsets_of_the_children_act_as_on_votes():
    given, offsets = inputs(SHAPES[0]), random(17, 16, seed=9)
    expected, got = (
        values_and_gradients(lambda *args, run=run: run(*args, offsets=offsets), given)
        for run in (by_votes, by_moments)
    )
    for both in zip(expected, got, strict=True):
        assert_close(*both)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_of_one_result_alone_are_those_of_votes(which):
    expected, got = (
        values_and_gradients(lambda *given, run=run: [run(*given)[which]], inputs(SHAPES[0]))[1]
        for run in (by_votes, by_moments)
    )
    assert_close(expected, got)


def test_results_do_not_depend_on_the_images_at_a_time(monkeypatch):
    whole = values_and_gradients(by_moments, inputs((5, 17, 5, 4, 4, 4)))
    monkeypatch.setattr(moment_routing, "CACHED", 2 * 17 * 5 * 8)
    for both in zip(whole, values_and_gradients(by_moments, inputs((5, 17, 5, 4, 4, 4))), strict=True):
        assert_close(*both, tolerance=1e-12)


def test_silent_children_have_no_effect_however_far():
    poses, activations, *others = inputs(SHAPES[0])
    activations[:, ::2] = 0
    far = poses.clone()
    far[:, ::2] += 1e6
    before, after = by_moments(poses, activations, *others), by_moments(far, activations, *others)
    for index in (0, 1, 3):
        torch.testing.assert_close(after[index], before[index], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fill", [0.0, 1e-12, 1.0])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e4])
def test_values_and_gradients_are_finite(dtype, fill, scale):
    poses, activations, *others = inputs(SHAPES[0])
    given = [scale * poses, torch.full_like(activations, fill), *others]
    for tensors in values_and_gradients(by_moments, [tensor.to(dtype) for tensor in given]):
        assert all(tensor.isfinite().all() for tensor in tensors)


@pytest.mark.parametrize(
    ("shape", "scale", "far"), [(SHAPES[0], 1, 0), (SHAPES[0], 1, 3), ((2, 50, 8, 4, 4, 4), 0.1, 0)]
)
def test_in_float32_the_errors_are_no_larger_than_those_of_votes(shape, scale, far):
    errors = []
    for seed in range(12):
        poses, *others = inputs(shape, seed=10 * seed)
        given = [tensor.float() for tensor in (scale * poses + far, *others)]
        exact = flat(by_votes, [tensor.double() for tensor in given])
        pair = [flat(run, given) for run in (by_votes, by_moments)]
        errors.append(
            [
                [float((got.double() - true).norm() / true.norm()) for got in both]
                for *both, true in zip(*pair, exact, strict=True)
            ]
        )
    # The gradient of the biases is near 0, a sum that cancels: votes add it up less exactly.
    assert (mean_log_ratio(errors) < 1).all()


def flat(run, given):
    values, gradients = values_and_gradients(run, given)
    return [*values, *gradients]


def layer(**routing):
    torch.manual_seed(0)
    options = {"iterations": 3, "beta_start": 0.5, "variance_floor": 1e-5, "mass_epsilon": 0.0}

    def make(*sizes, shared=False):
        return HeinsenRouting(*sizes, None, shared, **{**options, "implementation": "auto", **routing})

    return DenseCaps(
        50, 6, routing=make, shared_transformations=True, initialisation="orthogonal", vote_bias=True
    ).double()


def saved_bytes(run):
    """Bytes of the tensors that a forward pass keeps for the backward pass, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    assert kept is not None
    return sum(storages.values())


@pytest.mark.parametrize("compiler", [False, True])
def test_a_layer_with_shared_matrices_makes_no_votes(monkeypatch, compiler):
    if not compiler:
        monkeypatch.setattr("capsexp.routing.heinsen.fused_reason", lambda *_: "no compiler")
    fused, reference = layer(), layer(implementation="reference")
    capsules = Capsules(random(4, 50, 16), random(4, 50, seed=1).sigmoid())
    with torch.no_grad():
        fused.bias += random(*fused.bias.shape, seed=2)
        reference.load_state_dict(fused.state_dict())
    expected = reference(capsules)
    assert (fused.fused_reason(), reference.fused_reason()) == (None, "routing.implementation=reference")
    monkeypatch.setattr(DenseCaps, "votes", None)
    got = fused(capsules)
    assert_close(results(expected), results(got))


@pytest.mark.parametrize("compiler", [False, True])
def test_class_capsules_with_shared_matrices_and_coordinates_make_no_votes(monkeypatch, compiler):
    if not compiler:
        monkeypatch.setattr("capsexp.routing.heinsen.fused_reason", lambda *_: "no compiler")

    def make(implementation):
        torch.manual_seed(0)
        routing = capsexp.make("routing/heinsen", beta_start=0.5, implementation=implementation)
        options = {"image_size": (8, 8), "shared_transformations": True, "vote_bias": True}
        return SharedClassCaps(Grid(3, 3, (2.0, 2.0), 2), 4, 5, routing=routing, **options).double()

    fused, reference = make("fused"), make("reference")
    capsules = Capsules(random(2, 36, 16), random(2, 36, seed=1).sigmoid())
    expected = reference(capsules)
    monkeypatch.setattr(SharedClassCaps, "votes", None)
    assert fused.coordinates is not None
    assert_close(results(expected), results(fused(capsules)))


def test_what_is_kept_for_the_gradient_is_a_tenth_of_what_votes_keep():
    poses, activations, *others = (tensor.float() for tensor in inputs((4, 576, 64, 4, 4, 4)))
    given = [tensor.requires_grad_() for tensor in (poses, activations, *others)]

    def reference():
        weight, bias = given[2], given[3]
        votes = window_votes(poses.unsqueeze(1), weight.expand(576, -1, -1, -1)).squeeze(1) + bias
        betas = {"beta_use": given[4][None], "beta_ign": given[5][None]}
        return heinsen_routing(votes, activations, **betas, **DEFAULTS)

    def operator():
        matrices = torch.zeros(576, dtype=torch.long)
        votes = MatrixVotes(poses, given[2][None], matrices, None, None, given[3][None])
        betas = {"beta_use": given[4][None], "beta_ign": given[5][None]}
        return fused_heinsen_routing(votes, activations, **betas, **DEFAULTS)

    assert saved_bytes(lambda: by_moments(*given)) < saved_bytes(reference) / 10
    assert saved_bytes(operator) < saved_bytes(reference) / 10
