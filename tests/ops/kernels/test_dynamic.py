"""The fused layer against the reference, which tests/routing/test_dynamic.py compares with the paper."""

import functools

import pytest
import torch
from em_examples import mean_log_ratio
from hypothesis import given, settings
from hypothesis import strategies as st

from capsexp.capsules import Capsules
from capsexp.layer.class_caps import ClassCaps
from capsexp.ops.kernels.dynamic import dynamic_routing_backward_op, dynamic_routing_op
from capsexp.routing.dynamic import DynamicRouting

# children, their numbers, parents, numbers of a pose
SHAPES = [
    (7, 5, 3, 16),
    (1, 1, 1, 4),
    (6, 3, 10, 16),
    (5, 4, 9, 8),
    (4, 2, 5, 12),
    (3, 8, 17, 32),
    (2, 3, 1, 4),
]
SWITCHES = [
    {},
    {"leaky": True},
    {"detach": True},
    {"prior": "learned"},
    {"bias": True},
    {"prior": "learned", "bias": True, "leaky": True},
    {"prior": "learned", "detach": True},
]


def layer_of(
    shape,
    *,
    implementation="fused",
    iterations=3,
    votes_mib=None,
    shared=False,
    dtype=torch.float64,
    **changes,
):
    children, numbers, parents, dim = shape
    switches = {"prior": "zero", "bias": False, "leaky": False, "detach": False, **changes}
    routing = functools.partial(
        DynamicRouting, iterations=iterations, implementation=implementation, **switches
    )
    torch.manual_seed(0)
    layer = ClassCaps(
        *(children, numbers, parents, dim),
        shared_transformations=shared,
        routing=routing,
        votes_mib=votes_mib,
    )
    if layer.routing.prior is not None:
        torch.nn.init.normal_(layer.routing.prior)
    return layer.to(dtype)


def inputs_for(shape, batch=3, scale=1.0, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    poses = scale * torch.randn(batch, *shape[:2], dtype=torch.float64, generator=generator)
    poses[:, 0] = 0  # a silent child
    return poses.to(dtype)


def values_and_gradients(layer, poses):
    """Poses, activations and coupling, then the gradients of a random linear function of them."""
    poses = poses.clone().requires_grad_()
    results = layer(Capsules(poses, poses.norm(dim=2)))[:3]
    generator = torch.Generator().manual_seed(2)
    weights = (torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for tensor in results)
    loss = sum((tensor * weight.to(tensor)).sum() for tensor, weight in zip(results, weights, strict=True))
    gradients = torch.autograd.grad(loss, [poses, *layer.parameters()], materialize_grads=True)
    return [*(tensor.detach() for tensor in results), *gradients]


def assert_same(shape, **options):
    expected, got = (
        values_and_gradients(layer_of(shape, implementation=implementation, **options), inputs_for(shape))
        for implementation in ("reference", "fused")
    )
    for tensor, other in zip(expected, got, strict=True):
        torch.testing.assert_close(other, tensor, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_values_and_gradients_are_those_of_the_reference(shape, iterations):
    assert layer_of(shape).fused_reason() is None
    assert_same(shape, iterations=iterations)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_shared_transformations_have_the_values_and_gradients_of_the_reference(switches):
    assert_same(SHAPES[2], shared=True, votes_mib=0.01, **switches)


@pytest.mark.parametrize("changes", SWITCHES, ids=str)
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("votes_mib", [None, 1e-6])  # 1e-6: one image at a time
def test_every_switch_does_what_it_does_in_the_reference(changes, iterations, votes_mib):
    assert_same(SHAPES[0], iterations=iterations, votes_mib=votes_mib, **changes)


@given(
    children=st.integers(1, 9),
    numbers=st.integers(1, 9),
    parents=st.integers(1, 18),
    quarter=st.integers(1, 5),
    iterations=st.integers(1, 4),
    switch=st.sampled_from(SWITCHES),
)
@settings(max_examples=30, deadline=None)
def test_layers_of_any_shape_are_routed_as_in_the_reference(
    children, numbers, parents, quarter, iterations, switch
):
    assert_same((children, numbers, parents, 4 * quarter), iterations=iterations, **switch)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e3])
def test_extreme_poses_are_routed_as_in_the_reference(scale):
    shape = SHAPES[2]
    results = [
        values_and_gradients(layer_of(shape, implementation=implementation), inputs_for(shape, scale=scale))
        for implementation in ("reference", "fused")
    ]
    for tensor, other in zip(*results, strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(other, tensor, rtol=1e-8, atol=1e-10 * max(1.0, tensor.abs().max().item()))


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_float32_error_is_at_most_twice_that_of_the_reference(scale):
    shape = (40, 8, 10, 16)
    exact = layer_of(shape, implementation="reference", dtype=torch.float32).double()
    layers = [layer_of(shape, implementation=how, dtype=torch.float32) for how in ("reference", "fused")]
    errors = []
    for seed in range(9):
        poses = inputs_for(shape, batch=8, scale=scale, dtype=torch.float32, seed=seed)
        truth = values_and_gradients(exact, poses.double())
        plain_torch, fused = (values_and_gradients(layer, poses) for layer in layers)
        errors.append(
            [
                [((tensor - right).norm() / right.norm()).item() for tensor in both]
                for right, *both in zip(truth, plain_torch, fused, strict=True)
            ]
        )
    # Over 60 draws (Xeon, AVX-512) log2 of the ratio of both errors has means of up to 0.1, and at scale 3 a
    # deviation of 0.45, so the mean of 9 draws is 6.8 deviations or more below 1: false alarms below 1e-10.
    assert (mean_log_ratio(errors) <= 1).all(), mean_log_ratio(errors)


def test_gradients_pass_gradcheck():
    layer = layer_of((3, 2, 3, 4), prior="learned", bias=True)
    poses = inputs_for((3, 2, 3, 4), batch=2).requires_grad_()
    arguments = (poses, layer.weight, layer.routing.prior, layer.routing.bias)

    def run(*inputs):
        coupling, _, routed = dynamic_routing_op(*inputs, 3, False, False, 1)
        return routed[-1], coupling[-1]

    assert torch.autograd.gradcheck(run, arguments)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_number_of_the_results_is_written(shape):
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        results = values_and_gradients(layer_of(shape, prior="learned", bias=True), inputs_for(shape))
    finally:
        torch.use_deterministic_algorithms(False)
    for tensor in results:
        assert tensor.isfinite().all()


def test_results_do_not_depend_on_the_number_of_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            poses = inputs_for(SHAPES[2], batch=37, dtype=torch.float32)
            results.append(values_and_gradients(layer_of(SHAPES[2], dtype=torch.float32), poses))
    finally:
        torch.set_num_threads(before)
    for tensor, *others in zip(*results, strict=True):
        for other in others:
            assert torch.equal(tensor, other)


def test_an_empty_batch_gives_empty_results():
    results = values_and_gradients(
        layer_of(SHAPES[0], prior="learned", bias=True), inputs_for(SHAPES[0], batch=0)
    )
    assert [len(tensor) for tensor in results[:3]] == [0, 0, 0]
    assert not any(tensor.any() for tensor in results[4:])


def test_poses_that_there_is_no_code_for_take_the_reference_path():
    shape = (5, 3, 4, 6)
    assert layer_of(shape).fused_reason() == "there is no fused dynamic routing for poses of size 6"
    assert_same(shape)


def test_second_derivatives_are_refused():
    layer, poses = layer_of(SHAPES[0]), inputs_for(SHAPES[0]).requires_grad_()
    (gradient,) = torch.autograd.grad(
        layer(Capsules(poses, poses.norm(dim=2))).poses.sum(), poses, create_graph=True
    )
    with pytest.raises(RuntimeError, match="dynamic_routing_backward"):
        torch.autograd.grad(gradient.sum(), poses)


def test_the_operator_keeps_the_rules_of_its_framework():
    layer = layer_of(SHAPES[0], prior="learned", bias=True)
    inputs = inputs_for(SHAPES[0]).transpose(0, 2).contiguous().transpose(0, 2)  # other strides than results
    arguments = (inputs.requires_grad_(), layer.weight, layer.routing.prior, layer.routing.bias)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    checked = torch.library.opcheck(dynamic_routing_op, (*arguments, 3, False, False, 2), test_utils=tests)
    assert set(checked.values()) == {"SUCCESS"}
    coupling, total, poses = (
        tensor.detach() for tensor in dynamic_routing_op(*arguments, 3, False, False, 2)
    )
    saved = (inputs.detach(), layer.weight.detach(), coupling, total, poses)
    backward = (poses[-1].clone(), coupling[-1].clone(), *saved, True, False, 2)
    checked = torch.library.opcheck(dynamic_routing_backward_op, backward, test_utils=tests[:2])
    assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.compile
def test_torch_compile_takes_the_fused_layer_as_a_whole():
    layer, poses = layer_of(SHAPES[0], prior="learned", bias=True), inputs_for(SHAPES[0])
    expected = values_and_gradients(layer, poses)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    compiled.routing = layer.routing
    for tensor, other in zip(expected, values_and_gradients(compiled, poses), strict=True):
        torch.testing.assert_close(other, tensor, rtol=1e-9, atol=1e-11)
