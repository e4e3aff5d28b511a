"""The fused implementation against the reference, which test_em_reference.py compares with the paper."""

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

from capsexp.ops.em_steps import EMOptions
from capsexp.ops.kernels import em as kernel
from capsexp.ops.kernels import problem
from capsexp.ops.kernels.em import fused_em_routing
from capsexp.routing.em import em_routing

PAPERS_LAMBDA = (5.0e-4, 9.75e-4, 1.426e-3, 1.85e-3)
STRONG = (0.3, 0.5, 0.4, 0.6)  # activations and their competition count
OPTIONS = {
    "variance_floor": 0.001,
    "cost_scale": 0.2,
    "normalisation": "paper",
    "mean_smoothing": 0.0,
    "detach": False,
}
SWITCHES = [
    {},
    {"normalisation": "types"},
    {"normalisation": "official_v1"},
    {"mean_smoothing": 0.3},
    {"detach": True},
    {"detach": True, "mean_smoothing": 0.3, "normalisation": "types"},
    {"initial": "official"},
    {"variance_floor": 0.3, "cost_scale": 2.0},
]


def lambdas(like, iterations, temperatures):
    return torch.tensor(temperatures[:iterations]).to(like)


def fused(layer, poses, weight, activations, beta_u, beta_a, *, iterations=3, temperatures=STRONG, **changes):
    options = {**OPTIONS, **changes}
    votes = lazy(layer, poses, weight)
    initial = options.pop("initial", "paper")
    switches = EMOptions(**options, initial_coupling=initial, activation="logistic")
    temperature = lambdas(poses, iterations, temperatures)
    betas = {"beta_u": beta_u, "beta_a": beta_a, "inverse_temperature": temperature}
    first = shares(votes, initial)
    return fused_em_routing(votes, activations, initial=first, **betas, options=switches)[:3]


def plain(layer, poses, weight, activations, beta_u, beta_a, *, iterations=3, temperatures=STRONG, **changes):
    options = {**OPTIONS, **changes}
    votes = lazy(layer, poses, weight)
    return em_routing(
        votes_of(votes),
        activations,
        fields=votes.fields,
        beta_u=beta_u,
        beta_a=beta_a,
        inverse_temperature=lambdas(poses, iterations, temperatures),
        initial_coupling=options.pop("initial", "paper"),
        activation="logistic",
        **options,
    )[:3]


def assert_same(layer, inputs, **options):
    assert_runs_agree(plain, fused, layer, inputs, **options)


@EVERY_LAYER
@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
def test_values_and_gradients_are_those_of_the_reference(layer, iterations):
    assert_same(layer, example(layer), iterations=iterations)


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
    iterations=st.integers(1, 4),
    switch=st.sampled_from(SWITCHES),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_layers_of_any_shape_are_routed_as_in_the_reference(
    rows, columns, in_types, kernel, stride, types, pose, dense, iterations, switch, seed
):
    window = (min(kernel[0], rows), min(kernel[1], columns))
    layer = Layer(rows, columns, in_types, window, stride, types, pose, dense)
    # A silent child that its parents see alone leaves their means at 0. Its R is then 1 up to some 1e-8, and
    # the gradient by its activation is R (1 - R) / SMALLEST_MASS. Rounding leaves 1 - R eight digits: next to
    # 60-digit arithmetic both implementations are off by up to 4e-10. Two of LAYERS have such a child.
    places = in_types * (rows * columns if dense else window[0] * window[1])
    silent = seed % 2 == 0 and places > 1
    assert_same(layer, example(layer, batch=2, seed=seed, silent=silent), iterations=iterations, **switch)


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[8]], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e3])
@pytest.mark.parametrize("active", [0.0, 1e-12, 1.0])
def test_extreme_poses_and_silent_children_are_routed_as_in_the_reference(layer, scale, active):
    poses, weight, activations, *betas = example(layer, scale=scale)
    inputs = [poses, weight, torch.full_like(activations, active), *betas]
    weak = {"temperatures": PAPERS_LAMBDA}
    for expected, got in zip(
        *(values_and_gradients(how, layer, inputs, **weak) for how in (plain, fused)), strict=True
    ):
        assert got.isfinite().all()
        # With equal votes and hardly any mass the gradients of the poses reach 1e10, and one unit in the last
        # place of the inputs moves them, in the reference, by 3e-8 of that.
        largest = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7 * largest)


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[1], LAYERS[3], LAYERS[7], LAYERS[8]], ids=str)
@pytest.mark.parametrize("changes", [{}, {"scale": 30.0}, {"normalisation": "official_v1"}], ids=str)
def test_float32_error_is_at_most_twice_that_of_the_reference(layer, changes):
    scale, options = changes.get("scale", 1.0), {k: v for k, v in changes.items() if k != "scale"}
    options["temperatures"] = PAPERS_LAMBDA
    errors = []
    for seed in range(0, 400, 5):
        inputs = example(layer, batch=1, seed=seed, scale=scale)
        single = [tensor.float() for tensor in inputs]
        double = [tensor.double() for tensor in single]
        exact, plain_torch, ours = (
            values_and_gradients(how, layer, tensors, **options)
            for how, tensors in [(plain, double), (plain, single), (fused, single)]
        )
        errors.append(
            [
                [((tensor - truth).norm() / truth.norm()).item() for tensor in both]
                for truth, *both in zip(exact, plain_torch, ours, strict=True)
            ]
        )
    # Both errors are rounding noise, whose ratio differs tenfold from draw to draw. Over 120 draws (Xeon,
    # AVX-512) log2 of the ratio has means of -0.4 to 0.2 and deviations of up to 1.4, so the mean of 80 draws
    # is 5.5 deviations or more below 1: false alarms below 1e-5 for all tensors and layers together.
    assert (mean_log_ratio(errors) <= 1).all(), mean_log_ratio(errors)


@pytest.mark.parametrize(
    "layer", [Layer(3, 2, 1, (2, 2), 1, 2, (2, 2)), Layer(2, 1, 1, types=2, dense=True)], ids=str
)
@pytest.mark.parametrize("normalisation", problem.NORMALISATIONS)
def test_gradients_pass_gradcheck(layer, normalisation):
    inputs = [tensor.requires_grad_() for tensor in example(layer, batch=1)]

    def run(*tensors):
        return fused(layer, *tensors, normalisation=normalisation, variance_floor=0.1)

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
def test_without_gradients_the_same_results_take_less_memory(layer, iterations):
    inputs = example(layer)
    with torch.no_grad():
        alone = fused(layer, *inputs, iterations=iterations)
    with_gradients = fused(layer, *(tensor.requires_grad_() for tensor in inputs), iterations=iterations)
    for tensor, other in zip(alone, with_gradients, strict=True):
        assert torch.equal(tensor, other)
    assert alone[2].untyped_storage().nbytes() * max(1, iterations - 1) <= max(
        with_gradients[2].untyped_storage().nbytes(), alone[2].untyped_storage().nbytes()
    )


def test_an_empty_batch_gives_empty_results():
    layer = LAYERS[0]
    results = values_and_gradients(fused, layer, example(layer, batch=0))
    assert [len(tensor) for tensor in results[:3]] == [0, 0, 0]
    assert not any(tensor.any() for tensor in results[3:])


def test_a_gradient_that_is_not_asked_for_may_be_missing():
    layer = LAYERS[0]
    for only in range(3):
        grads = []
        for how in (plain, fused):
            inputs = [tensor.requires_grad_() for tensor in example(layer)]
            grads.append(
                torch.autograd.grad(how(layer, *inputs)[only].square().sum(), inputs, materialize_grads=True)
            )
        for tensor, other in zip(*grads, strict=True):
            torch.testing.assert_close(other, tensor, rtol=1e-9, atol=1e-11)


def test_second_derivatives_are_refused():
    layer = LAYERS[0]
    inputs = [tensor.requires_grad_() for tensor in example(layer)]
    (gradient,) = torch.autograd.grad(fused(layer, *inputs)[0].square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="em_routing_backward"):
        torch.autograd.grad(gradient.sum(), inputs[:1])


def test_the_operators_keep_the_rules_of_their_framework():
    layer = LAYERS[0]
    # Transposed and back, so that strides are not those of what the operators return.
    odd = (tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in example(layer))
    poses, weight, *others = (tensor.requires_grad_() for tensor in odd)
    votes = lazy(layer, poses, weight)
    arguments = (
        *(poses, weight, *others, lambdas(poses, 3, STRONG), shares(votes, "paper"), votes.fields.children),
        *(votes.matrices, None, 0.001, 0.2, 0.0, "paper", False, True),
    )
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    checked = torch.library.opcheck(kernel.em_routing_op, arguments, test_utils=tests)
    assert set(checked.values()) == {"SUCCESS"}
    results = [tensor.detach() for tensor in kernel.em_routing_op(*arguments)]
    constant = [tensor.detach() if torch.is_tensor(tensor) else tensor for tensor in arguments]
    backward = (*results[:2], None, *constant[:10], *results[2:], *constant[10:15])
    checked = torch.library.opcheck(kernel.em_routing_backward_op, backward, test_utils=tests[:2])
    assert set(checked.values()) == {"SUCCESS"}


def test_strides_of_the_inputs_do_not_matter():
    layer = LAYERS[0]
    inputs = example(layer)
    odd = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in inputs]
    assert not odd[0].is_contiguous()
    for tensor, other in zip(
        *(values_and_gradients(fused, layer, tensors) for tensors in (inputs, odd)), strict=True
    ):
        assert torch.equal(tensor, other)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("mps", torch.float32, 4, 4), "there is no fused EM routing for mps"),
        (("cpu", torch.bfloat16, 4, 4), "there is no fused EM routing in torch.bfloat16"),
        (("cpu", torch.float32, 5, 5), "there is no fused EM routing for poses of 5x5"),
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
