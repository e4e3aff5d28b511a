import functools
import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from wave_numbers import wave

from capsexp.capsules import Capsules
from capsexp.layer.class_caps import ClassCaps
from capsexp.ops.squash import squash
from capsexp.ops.votes import make_votes
from capsexp.routing.dynamic import DynamicRouting
from capsexp.routing.self_routing import SelfRouting
from capsexp.routing.uniform import UniformRouting

MIB = 2**20


def dynamic(**changes):
    options = {"iterations": 3, "prior": "zero", "bias": False, "leaky": False, "detach": False}
    return functools.partial(DynamicRouting, **{**options, "implementation": "auto", **changes})


def class_caps(*sizes, shared=False, **options):
    return ClassCaps(*sizes, shared_transformations=shared, **options)


def capsules(*shape, dtype=torch.float32):
    poses = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return Capsules(poses, poses.norm(dim=2))


@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_a_hundred_classes_never_hold_the_votes_of_the_whole_batch(implementation, largest_tensor):
    torch.manual_seed(0)
    routing = dynamic(implementation=implementation)
    layer = class_caps(128, 1, 100, 16, routing=routing, votes_mib=1)  # 0.8 MiB of votes per image
    votes_of_the_batch = 32 * 128 * 100 * 16 * 4
    stored = []
    with largest_tensor as largest, saved_tensors_hooks(lambda t: stored.append(t.nbytes) or t, lambda t: t):
        layer(capsules(32, 128, 1)).activations.sum().backward()
    coupling = 32 * 128 * 100 * 4  # of the last pass; the fused path saves all three
    saved_bytes = 3 * coupling if implementation == "fused" else coupling
    assert MIB <= largest.size <= saved_bytes < votes_of_the_batch / 5
    assert sum(stored) - saved_bytes < votes_of_the_batch / 10


@pytest.mark.parametrize(
    "routing", [dynamic(prior="learned", bias=True), functools.partial(UniformRouting, bias=True)]
)
def test_chunks_give_the_same_result_and_gradients(routing):
    results = []
    for votes_mib in (1.0, 0.01):  # a chunk is one image
        torch.manual_seed(0)
        layer = class_caps(30, 4, 5, 8, routing=routing, votes_mib=votes_mib).double()
        inputs = capsules(3, 30, 4, dtype=torch.float64)
        inputs.poses.requires_grad_()
        routed = layer(inputs)
        loss = sum(field.square().sum() for field in routed[:3])
        results.append((*routed[:3], *torch.autograd.grad(loss, [inputs.poses, *layer.parameters()])))
    for whole, chunks in zip(*results, strict=True):
        torch.testing.assert_close(chunks, whole, rtol=1e-10, atol=1e-12)


def test_layer_routes_its_votes():
    layer = class_caps(6, 4, 5, 8, routing=dynamic(), votes_mib=None)
    inputs = capsules(3, 6, 4)
    expected = layer.routing(make_votes(inputs.poses, layer.weight), inputs.activations)
    for tensor, other in zip(layer(inputs), expected, strict=True):
        torch.testing.assert_close(tensor, other)


def test_capsules_of_length_zero_give_finite_gradients():
    layer = class_caps(6, 4, 5, 8, routing=dynamic(), votes_mib=None)
    inputs = Capsules(torch.zeros(2, 6, 4, requires_grad=True), torch.zeros(2, 6))
    routed = layer(inputs)
    routed.activations.sum().backward()
    assert not routed.poses.any()
    assert inputs.poses.grad.isfinite().all()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("votes_mib", [None, 0.001])
def test_autocast_makes_and_routes_votes_in_float32(votes_mib):
    layer = class_caps(6, 4, 5, 8, routing=dynamic(), votes_mib=votes_mib)
    inputs = capsules(3, 6, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        routed = layer(inputs)
        routed.activations.sum().backward()
    expected = layer(Capsules(inputs.poses.float(), inputs.activations.float()))
    torch.testing.assert_close(routed.poses, expected.poses, rtol=1e-6, atol=1e-7)
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("votes_mib", [0.0, -1.0])
def test_a_budget_without_room_is_refused(votes_mib):
    with pytest.raises(ValueError, match=f"votes_mib must be > 0 or null, got {votes_mib}"):
        class_caps(6, 4, 5, 8, routing=dynamic(), votes_mib=votes_mib)


@pytest.mark.parametrize(("transformation", "dim"), [("matrix", 6), ("elementwise", 3)])
@pytest.mark.parametrize("shared", [False, True])
def test_without_routing_is_the_uniform_control(shared, transformation, dim):
    torch.manual_seed(0)
    uniform = functools.partial(UniformRouting, bias=False)
    layer = class_caps(5, 3, 4, dim, shared=shared, transformation=transformation, routing=uniform)
    routed, unrouted = layer(capsules(2, 5, 3)), layer.without_routing()(capsules(2, 5, 3))
    for tensor, other in zip(routed, unrouted, strict=True):
        torch.testing.assert_close(other, tensor)


@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize("dim", [8, 6])  # votes made inside the operator, and outside
def test_shared_transformations_are_matrices_that_are_all_the_same(implementation, dim):
    routing = dynamic(implementation=implementation, prior="learned", bias=True)
    tied, untied = (
        class_caps(7, 4, 5, dim, shared=shared, routing=routing, votes_mib=None).double()
        for shared in (True, False)
    )
    assert (tied.weight.shape, untied.weight.shape) == ((1, 4, 5, dim), (7, 4, 5, dim))
    untied.weight.data.copy_(tied.weight.data.expand_as(untied.weight))
    inputs = capsules(3, 7, 4, dtype=torch.float64)
    results = [layer(inputs) for layer in (tied, untied)]
    for got, expected in zip(*(routed[:3] for routed in results), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    for routed in results:
        (routed.poses.sin().sum() + routed.coupling.square().sum()).backward()
    summed = untied.weight.grad.sum(0, keepdim=True)  # every child's share of one W_j
    torch.testing.assert_close(tied.weight.grad, summed, rtol=1e-11, atol=1e-12)


def test_a_shared_transformation_with_uniform_coupling_sees_the_sum_of_its_children_alone():
    layer = class_caps(6, 4, 5, 8, shared=True, routing=dynamic(iterations=1), votes_mib=None)
    inputs = capsules(3, 6, 4)
    total = torch.einsum("bk,kjd->bjd", inputs.poses.sum(1), layer.weight[0]) / 5
    torch.testing.assert_close(layer(inputs).poses, squash(total))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("sizes", "transformation"),
    [
        ((300, 8, 10, 16), "matrix"),
        ((50, 4, 3, 8), "matrix"),
        ((1152, 8, 50, 16), "matrix"),
        ((300, 8, 10, 8), "elementwise"),
    ],
)
def test_at_the_start_the_sums_are_as_long_as_independent_children(sizes, transformation, shared):
    torch.manual_seed(0)
    options = {"shared": shared, "transformation": transformation}
    layer = class_caps(*sizes, **options, routing=dynamic(iterations=1))
    inputs = capsules(64, *sizes[:2])
    lengths = layer(inputs).activations
    sums = (lengths / (1 - lengths)).sqrt()  # squash, undone
    rms = [tensor.square().mean().sqrt().item() for tensor in (sums, inputs.activations)]
    assert math.log2(rms[0] / rms[1]) == pytest.approx(0, abs=0.3)


def test_a_routing_that_reads_poses_gets_those_of_the_children_and_their_size():
    layer = class_caps(6, 4, 5, 8, routing=SelfRouting, votes_mib=1e-6)
    assert layer.routing.map.shape == (6, 4, 5)
    torch.nn.init.normal_(layer.routing.map)
    inputs = capsules(3, 6, 4)
    expected = layer.routing(layer.votes(inputs.poses), inputs.activations, inputs.poses)
    torch.testing.assert_close(layer(inputs).poses, expected.poses)
    torch.testing.assert_close(layer(inputs).activations, expected.activations)


def test_uniform_coupling_of_shared_matrices_has_the_lengths_computed_elsewhere():
    uniform = functools.partial(UniformRouting, bias=False)
    layer = class_caps(6, 4, 3, 4, shared=True, routing=uniform).double()
    layer.weight.data.copy_(wave((4, 3, 4), 1)[None])
    poses = wave((6, 4))[None]
    lengths = layer(Capsules(poses, poses.norm(dim=2))).activations[0]
    assert lengths.tolist() == pytest.approx([0.6602291345, 0.5684569644, 0.5641071589], abs=1e-10)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("votes_mib", [None, 1e-6])
def test_an_elementwise_transformation_is_a_diagonal_matrix(shared, votes_mib):
    options = {"shared": shared, "routing": dynamic(), "votes_mib": votes_mib}
    layer, matrices = (
        class_caps(6, 4, 5, 4, transformation=transformation, **options).double()
        for transformation in ("elementwise", "matrix")
    )
    assert layer.weight.shape == (1 if shared else 6, 5, 4)
    matrices.weight.data.copy_(torch.diag_embed(layer.weight).transpose(1, 2))
    inputs = capsules(3, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(layer.votes(inputs.poses), matrices.votes(inputs.poses))
    for tensor, other in zip(layer(inputs)[:3], matrices(inputs)[:3], strict=True):
        torch.testing.assert_close(tensor, other)
    assert "no fused routing of elementwise" in layer.fused_reason()


def test_an_elementwise_transformation_of_other_poses_is_one_line():
    with pytest.raises(ValueError, match=r"^transformation elementwise needs in_dim = out_dim, got 4 and 8$"):
        class_caps(6, 4, 5, 8, transformation="elementwise", routing=dynamic())
