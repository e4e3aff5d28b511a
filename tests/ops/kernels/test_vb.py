"""The fused implementation against the reference, which tests/routing/test_vb.py compares with loops."""

import itertools

import pytest
import torch
from em_examples import mean_log_ratio
from fused_layers import (
    EVERY_LAYER,
    LAYERS,
    Layer,
    assert_runs_agree,
    example,
    lazy,
    shares,
    values_and_gradients,
    votes_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from wave_numbers import wave

from capsexp.ops.kernels import problem
from capsexp.ops.kernels import vb as kernel
from capsexp.ops.kernels.vb import fused_vb_routing
from capsexp.ops.vb_steps import VBOptions
from capsexp.ops.votes import MatrixVotes
from capsexp.routing.vb import vb_routing

OPTIONS = {
    "prior_counts": 1.0,
    "prior_strength": 1.0,
    "prior_degrees": None,
    "prior_scale": 1.0,
    "outlier": None,
    "normalisation": "paper",
    "initial_coupling": "paper",
}
SWITCHES = [
    {},
    {"normalisation": "types"},
    {"initial_coupling": "official"},
    {"outlier": 1e-7},
    {"outlier": 1e-7, "normalisation": "types"},
    {"prior_counts": 0.5, "prior_strength": 2.0, "prior_degrees": 17.5, "prior_scale": 0.3},
    {"prior_strength": 0.0},
]
WITH_BIAS = [Layer(bias=True), Layer(dense=True, types=5, bias=True), Layer(pose=(2, 2), bias=True)]


class Digamma(torch.autograd.Function):
    """With an exact derivative: that of PyTorch on a CPU is off by up to 1e-9."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.special.digamma(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.special.zeta(torch.full_like(x, 2), x)


@pytest.fixture(autouse=True)
def exact_digamma(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "digamma", lambda x: Digamma.apply(x))  # a method, unlike `apply`


def fused(layer, poses, weight, activations, beta_a, beta_u, *, iterations=3, **changes):
    options = VBOptions(**{**OPTIONS, **changes})
    votes = lazy(layer, poses, weight)
    routed = fused_vb_routing(
        votes,
        activations,
        initial=shares(votes, options.initial_coupling),
        iterations=iterations,
        beta_a=beta_a,
        beta_u=beta_u,
        options=options,
    )
    return routed.poses, routed.activations, routed.coupling, routed.scores


def plain(layer, poses, weight, activations, beta_a, beta_u, *, iterations=3, **changes):
    votes = lazy(layer, poses, weight)
    options = {**OPTIONS, **changes, "iterations": iterations, "beta_a": beta_a, "beta_u": beta_u}
    routed = vb_routing(votes_of(votes), activations, fields=votes.fields, **options)
    return routed.poses, routed.activations, routed.coupling, routed.scores


def assert_same(layer, inputs, **options):
    # Log densities of far votes are in the hundreds; their rounding is a relative error of R, of up to 6e-11.
    assert_runs_agree(plain, fused, layer, inputs, rtol=1e-9, atol=5e-10, **options)


@pytest.mark.parametrize("layer", [*LAYERS, *WITH_BIAS], ids=str)
@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
def test_values_and_gradients_are_those_of_the_reference(layer, iterations):
    assert_same(layer, example(layer), iterations=iterations)


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[4], LAYERS[8]], ids=str)
@pytest.mark.parametrize("changes", SWITCHES, ids=str)
@pytest.mark.parametrize("iterations", [1, 3])
def test_every_switch_does_what_it_does_in_the_reference(layer, changes, iterations):
    assert_same(layer, example(layer), iterations=iterations, **changes)


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[8]], ids=str)
@pytest.mark.parametrize("normalisation", ["paper", "types"])
def test_the_outlier_limits_some_children_and_not_others(layer, normalisation):
    inputs = example(layer, scale=0.5)
    total = fused(layer, *inputs, outlier=1e-15, normalisation=normalisation)[2].sum(-1)
    if normalisation == "paper" and not layer.dense:
        children = lazy(layer, *inputs[:2]).fields.children.flatten()
        total = total.new_zeros(inputs[0].shape[:2]).index_add(1, children, total.flatten(1))
    assert (total < 0.9).any()
    assert ((total - 1).abs() < 1e-12).any()
    assert (total < 1 + 1e-12).all()
    assert_same(layer, inputs, outlier=1e-15, normalisation=normalisation)


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    in_types=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    types=st.integers(1, 18),
    pose=st.sampled_from(problem.SHAPES),
    dense=st.booleans(),
    bias=st.booleans(),
    iterations=st.integers(1, 4),
    switch=st.sampled_from(SWITCHES[:-1]),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_layers_of_any_shape_are_routed_as_in_the_reference(
    rows, columns, in_types, kernel, stride, types, pose, dense, bias, iterations, switch, seed
):
    window = (min(kernel[0], rows), min(kernel[1], columns))
    layer = Layer(rows, columns, in_types, window, stride, types, pose, dense, bias)
    inputs = example(layer, batch=2, seed=seed, silent=seed % 2 == 0, scale=0.5)
    assert_same(layer, inputs, iterations=iterations, **switch)


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[8]], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 30.0])
@pytest.mark.parametrize("active", [0.0, 1e-12, 1.0])
@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_extreme_poses_and_silent_children_are_routed_as_in_the_reference(layer, scale, active, strength):
    poses, weight, activations, *betas = example(layer, scale=scale)
    inputs = [poses, weight, torch.full_like(activations, active), *betas]
    # Without strength and mass, -D / (2 kappa) is some 1e9.
    options = {"iterations": 1 if strength == 0 and active < 1 else 3}
    for expected, got in zip(
        *(
            values_and_gradients(how, layer, inputs, prior_strength=strength, **options)
            for how in (plain, fused)
        ),
        strict=True,
    ):
        assert got.isfinite().all()
        largest = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 * largest)


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[1], LAYERS[3], LAYERS[7], LAYERS[8]], ids=str)
@pytest.mark.parametrize("changes", [{}, {"normalisation": "types"}, {"outlier": 1e-11}], ids=str)
def test_float32_error_is_at_most_twice_that_of_the_reference(layer, changes):
    errors = []
    for seed in range(0, 200, 5):
        single = [tensor.float() for tensor in example(layer, batch=1, seed=seed, scale=0.5)]
        double = [tensor.double() for tensor in single]
        exact, plain_torch, ours = (
            values_and_gradients(how, layer, tensors, **changes)
            for how, tensors in [(plain, double), (plain, single), (fused, single)]
        )
        errors.append(
            [
                [((tensor - truth).norm() / truth.norm().clamp_min(1e-30)).item() for tensor in both]
                for truth, *both in zip(exact, plain_torch, ours, strict=True)
            ]
        )
    assert (mean_log_ratio(errors) <= 1).all(), mean_log_ratio(errors)


@pytest.mark.parametrize(
    "layer",
    [
        Layer(3, 2, 1, (2, 2), 1, 2, (2, 2)),
        Layer(2, 1, 1, types=2, dense=True),
        Layer(3, 2, 1, (2, 2), 1, 2, (3, 3), bias=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("changes", SWITCHES[:2] + SWITCHES[3:6], ids=str)
def test_gradients_pass_gradcheck(layer, changes):
    changes = {name: value for name, value in changes.items() if name != "prior_degrees"}
    inputs = [tensor.requires_grad_() for tensor in example(layer, batch=1)]

    def run(*tensors):
        return fused(layer, *tensors, **changes)

    assert torch.autograd.gradcheck(run, inputs)


@EVERY_LAYER
@pytest.mark.parametrize("outlier", [None, 1e-7])
def test_every_number_of_the_results_is_written(layer, outlier):
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        results = values_and_gradients(fused, layer, example(layer), outlier=outlier)
    finally:
        torch.use_deterministic_algorithms(False)
    for tensor in results:
        assert tensor.isfinite().all()


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[8]], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(layer):
    inputs, before = [tensor.float() for tensor in example(layer, batch=37)], torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(values_and_gradients(fused, layer, inputs))
    finally:
        torch.set_num_threads(before)
    for tensor, *others in zip(*results, strict=True):
        for other in others:
            assert torch.equal(tensor, other)


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[8]], ids=str)
@pytest.mark.parametrize("outlier", [None, 1e-7])
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_without_gradients_the_results_are_the_same(layer, outlier, iterations):
    inputs, options = example(layer), {"outlier": outlier, "iterations": iterations}
    with torch.no_grad():
        alone = fused(layer, *inputs, **options)
    with_gradients = fused(layer, *(tensor.requires_grad_() for tensor in inputs), **options)
    for tensor, other in zip(alone, with_gradients, strict=True):
        assert torch.equal(tensor, other)


def test_an_empty_batch_gives_empty_results():
    results = values_and_gradients(fused, LAYERS[0], example(LAYERS[0], batch=0))
    assert [len(tensor) for tensor in results[:4]] == [0, 0, 0, 0]
    assert not any(tensor.any() for tensor in results[4:])


def test_a_gradient_that_is_not_asked_for_may_be_missing():
    layer = WITH_BIAS[0]
    for only in range(4):
        grads = []
        for how in (plain, fused):
            inputs = [tensor.requires_grad_() for tensor in example(layer)]
            loss = how(layer, *inputs)[only].square().sum()
            grads.append(torch.autograd.grad(loss, inputs, materialize_grads=True))
        for tensor, other in zip(*grads, strict=True):
            torch.testing.assert_close(other, tensor, rtol=1e-7, atol=1e-9)


def test_numbers_of_an_independent_implementation():
    # Poses of one number per column; W_ij = 1 and a bias make any votes of 16 numbers, of which 4 are used.
    votes, activations = wave((6, 3, 4)), wave((6,), 1, 2).sigmoid()
    lazy_votes = MatrixVotes(
        poses=torch.zeros(1, 6, 4, dtype=torch.float64),
        weight=torch.zeros(6, 3, 2, 2, dtype=torch.float64),
        matrices=torch.arange(6),
        fields=None,
        offsets=None,
        bias=votes,
    )
    options = VBOptions(**OPTIONS)
    routed = fused_vb_routing(
        lazy_votes,
        activations[None],
        initial=shares(lazy_votes, "paper"),
        iterations=3,
        beta_a=0.0,
        beta_u=0.0,
        options=options,
    )
    scores = torch.tensor([-0.3850393211, -1.6793997913, -0.8959433714], dtype=torch.float64)
    torch.testing.assert_close(routed.scores[0], scores, rtol=0, atol=5e-11)
    coupling = torch.tensor([0.0076726037, 0.9922791821, 0.0000482142], dtype=torch.float64)
    torch.testing.assert_close(routed.coupling[0, 0], coupling, rtol=0, atol=5e-11)


def test_the_operators_keep_the_rules_of_their_framework():
    layer = WITH_BIAS[0]
    # Transposed and back, so that strides are not those of what the operators return.
    odd = (tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in example(layer))
    poses, weight, activations, *_ = (tensor.requires_grad_() for tensor in odd)
    votes = lazy(layer, poses, weight)
    bias = votes.bias.detach().requires_grad_()
    arguments = (
        *(poses, weight, activations, shares(votes, "paper"), votes.fields.children, votes.matrices, None),
        *(bias, 3, 1.0, 1.0, 17.0, 1.0, 1e-7, "paper", True),
    )
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    checked = torch.library.opcheck(kernel.vb_routing_op, arguments, test_utils=tests)
    assert set(checked.values()) == {"SUCCESS"}
    results = [tensor.detach() for tensor in kernel.vb_routing_op(*arguments)]
    constant = [tensor.detach() if torch.is_tensor(tensor) else tensor for tensor in arguments]
    backward = (*results[:2], None, *constant[:8], *results[2:], *constant[8:-1])
    checked = torch.library.opcheck(kernel.vb_routing_backward_op, backward, test_utils=tests[:2])
    assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("cuda", torch.float32, 4, 4), "there is no fused variational Bayes routing for cuda"),
        (("cpu", torch.bfloat16, 4, 4), "there is no fused variational Bayes routing in torch.bfloat16"),
        (("cpu", torch.float32, 5, 5), "there is no fused variational Bayes routing for poses of 5x5"),
    ],
)
def test_what_there_is_no_code_for_is_named(arguments, reason):
    assert kernel.fused_reason(*arguments) == reason
    assert kernel.fused_reason("cpu", torch.float32, 4, 4) is None


def test_every_shape_of_pose_has_code():
    for pose, dtype in itertools.product(problem.SHAPES, (torch.float32, torch.float64)):
        layer = Layer(pose=pose)
        inputs = [tensor.to(dtype) for tensor in example(layer)]
        for tensor, other in zip(plain(layer, *inputs), fused(layer, *inputs), strict=True):
            torch.testing.assert_close(other, tensor, rtol=1e-3, atol=1e-4)
