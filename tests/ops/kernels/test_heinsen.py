"""The fused implementation against the reference, held to the paper by test_heinsen.py of the routings."""

import itertools

import pytest
import torch
from em_examples import mean_log_ratio
from fused_layers import (
    EVERY_LAYER,
    LAYERS,
    Layer,
    assert_runs_agree,
    lazy,
    random,
    shares,
    values_and_gradients,
    votes_of,
)
from fused_layers import example as layer_example
from hypothesis import given, settings
from hypothesis import strategies as st
from wave_numbers import wave

from capsexp.capsules import ReceptiveFields
from capsexp.ops.kernels import heinsen as kernel
from capsexp.ops.kernels import problem
from capsexp.ops.kernels.heinsen import fused_heinsen_routing
from capsexp.ops.votes import MatrixVotes
from capsexp.routing.heinsen import heinsen_routing

OPTIONS = {"iterations": 3, "variance_floor": 0.001, "mass_epsilon": 0.0}
SWITCHES = [{}, {"variance_floor": 0.3}, {"mass_epsilon": 0.05}]
WITH_BIAS = [Layer(bias=True), Layer(dense=True, types=5, bias=True), Layer(pose=(2, 2), bias=True)]


def example(layer, *, shared=False, seed=0, **options):
    """Poses, weight, activations, beta_use, beta_ign."""
    poses, weight, activations, *_ = layer_example(layer, seed=seed, **options)
    places = 1 if shared else len(lazy(layer, poses, weight).matrices)
    betas = (random(places, layer.types, seed=seed + number, scale=0.3) for number in (4, 5))
    return [poses, weight, activations, *betas]


def fused(layer, poses, weight, activations, beta_use, beta_ign, **changes):
    votes = lazy(layer, poses, weight)
    betas = {"beta_use": beta_use, "beta_ign": beta_ign}
    routed = fused_heinsen_routing(votes, activations, **betas, **{**OPTIONS, **changes})
    return routed.poses, routed.activations, routed.coupling, routed.scores


def plain(layer, poses, weight, activations, beta_use, beta_ign, **changes):
    votes = lazy(layer, poses, weight)
    betas = {"beta_use": beta_use, "beta_ign": beta_ign}
    routed = heinsen_routing(
        votes_of(votes), activations, fields=votes.fields, **betas, **{**OPTIONS, **changes}
    )
    return routed.poses, routed.activations, routed.coupling, routed.scores


def assert_same(layer, inputs, **options):
    assert_runs_agree(plain, fused, layer, inputs, rtol=1e-9, atol=1e-10, **options)


@pytest.mark.parametrize("layer", [*LAYERS, *WITH_BIAS], ids=str)
@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
@pytest.mark.parametrize("shared", [False, True], ids=["own betas", "shared betas"])
def test_values_and_gradients_are_those_of_the_reference(layer, iterations, shared):
    assert_same(layer, example(layer, shared=shared), iterations=iterations)


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[4], LAYERS[8]], ids=str)
@pytest.mark.parametrize("changes", SWITCHES, ids=str)
@pytest.mark.parametrize("iterations", [1, 3])
def test_every_switch_does_what_it_does_in_the_reference(layer, changes, iterations):
    assert_same(layer, example(layer), iterations=iterations, **changes)


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
    switch=st.sampled_from(SWITCHES),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_layers_of_any_shape_are_routed_as_in_the_reference(
    rows, columns, in_types, kernel, stride, types, pose, dense, bias, iterations, switch, seed
):
    window = (min(kernel[0], rows), min(kernel[1], columns))
    layer = Layer(rows, columns, in_types, window, stride, types, pose, dense, bias)
    # A silent child that its parents see alone: see the same test of EM routing.
    places = in_types * (rows * columns if dense else window[0] * window[1])
    inputs = example(layer, batch=2, seed=seed, silent=seed % 2 == 0 and places > 1, scale=0.5)
    assert_same(layer, inputs, iterations=iterations, **switch)


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[8]], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e3])
@pytest.mark.parametrize("active", [0.0, 1e-12, 1.0])
def test_extreme_poses_and_silent_children_are_routed_as_in_the_reference(layer, scale, active):
    poses, weight, activations, *betas = example(layer, scale=scale)
    inputs = [poses, weight, torch.full_like(activations, active), *betas]
    for expected, got in zip(
        *(values_and_gradients(how, layer, inputs) for how in (plain, fused)), strict=True
    ):
        assert got.isfinite().all()
        # Gradients of equal votes with hardly any mass are rounding noise of up to 1e9: see the test of EM.
        largest = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=2e-6 * largest)


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[1], LAYERS[3], LAYERS[7], LAYERS[8]], ids=str)
@pytest.mark.parametrize("changes", [{}, {"mass_epsilon": 1e-5}], ids=str)
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
@pytest.mark.parametrize("changes", [{"variance_floor": 0.1}, {"mass_epsilon": 0.1}], ids=str)
def test_gradients_pass_gradcheck(layer, changes):
    inputs = [tensor.requires_grad_() for tensor in example(layer, batch=1)]

    def run(*tensors):
        return fused(layer, *tensors, **changes)

    assert torch.autograd.gradcheck(run, inputs)


@EVERY_LAYER
def test_every_number_of_the_results_is_written(layer):
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        results = values_and_gradients(fused, layer, example(layer))
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
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_without_gradients_the_results_are_the_same(layer, iterations):
    inputs = example(layer)
    with torch.no_grad():
        alone = fused(layer, *inputs, iterations=iterations)
    with_gradients = fused(layer, *(tensor.requires_grad_() for tensor in inputs), iterations=iterations)
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


def numbers(*digits):
    return torch.tensor(digits, dtype=torch.float64)


@pytest.mark.parametrize("windows", [False, True])
def test_numbers_of_an_independent_implementation(windows):
    weight, bias = wave((6, 3, 2, 2), 2), wave((6, 3, 4), 3, 0.1)
    betas = [wave((6, 3), 4), wave((6, 3), 5)]
    fields = ReceptiveFields(torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5]]), 6, 6) if windows else None
    places = 4 if windows else 6
    votes = MatrixVotes(wave((1, 6, 4)), weight[:places], torch.arange(places), fields, None, bias[:places])
    routed = fused_heinsen_routing(
        votes,
        wave((1, 6), 1, 2).sigmoid(),
        beta_use=betas[0][:places],
        beta_ign=betas[1][:places],
        iterations=3,
        variance_floor=1e-5,
        mass_epsilon=1e-5,  # as the author's code
    )
    if windows:
        scores = numbers(
            -0.0744695953, -1.3672462091, -0.2340727286, 1.4074129495, -0.9495229705, 0.3133322549
        )
    else:
        scores = numbers(0.1019861818, -1.4161043077, -0.8251476015)
        coupling = numbers(0.6537309502, 0.3373704439, 0.0088986059)
        torch.testing.assert_close(routed.coupling[0, 0], coupling, rtol=0, atol=5e-11)
        pose = numbers(-0.0172779449, 0.4105572555, 0.0922124221, -0.3715964754)
        torch.testing.assert_close(routed.poses[0, 0], pose, rtol=0, atol=5e-11)
    torch.testing.assert_close(routed.scores[0], scores, rtol=0, atol=5e-11)


def test_the_operators_keep_the_rules_of_their_framework():
    layer = WITH_BIAS[0]
    # Transposed and back, so that strides are not those of what the operators return.
    odd = (tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in example(layer))
    poses, weight, activations, *betas = (tensor.requires_grad_() for tensor in odd)
    votes = lazy(layer, poses, weight)
    bias = votes.bias.detach().requires_grad_()
    arguments = (
        *(poses, weight, activations, shares(votes, "paper"), votes.fields.children, votes.matrices, None),
        *(bias, *betas, 3, 0.001, 0.0, "paper", True),
    )
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    checked = torch.library.opcheck(kernel.heinsen_routing_op, arguments, test_utils=tests)
    assert set(checked.values()) == {"SUCCESS"}
    results = [tensor.detach() for tensor in kernel.heinsen_routing_op(*arguments)]
    constant = [tensor.detach() if torch.is_tensor(tensor) else tensor for tensor in arguments]
    backward = (*results[:2], None, *constant[:10], *results[2:], *constant[10:-1])
    checked = torch.library.opcheck(kernel.heinsen_routing_backward_op, backward, test_utils=tests[:2])
    assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("cuda", torch.float32, 4, 4), "there is no fused Heinsen routing for cuda"),
        (("cpu", torch.bfloat16, 4, 4), "there is no fused Heinsen routing in torch.bfloat16"),
        (("cpu", torch.float32, 5, 5), "there is no fused Heinsen routing for poses of 5x5"),
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
