"""What every routing algorithm promises. A new conf/routing/*.yaml is under test by existing."""

import copy
from pathlib import Path

import pytest
import torch
import yaml

from capsexp.config.build import build as build_node
from capsexp.routing import reads_poses

ROUTINGS = sorted((Path(__file__).parents[1] / "conf" / "routing").glob("*.yaml"))
SHAPES = [(3, 7, 4, 16), (2, 1, 3, 16), (2, 5, 1, 16), (1, 1, 1, 16)]

pytestmark = pytest.mark.parametrize("path", ROUTINGS, ids=lambda path: path.stem)


def build(path, in_caps, out_caps, pose_dim, dtype=torch.float64):
    node = yaml.safe_load(path.read_text())
    assert node["_partial_"] is True
    torch.manual_seed(0)
    return build_node(node, at="routing")(in_caps, out_caps, pose_dim).to(dtype)


def random(path, *shape, seed=0):
    """Votes and activations, and for a routing that reads them the poses of the children."""
    generator = torch.Generator().manual_seed(seed)
    votes = torch.randn(*shape, dtype=torch.float64, generator=generator)
    activations = torch.rand(*shape[:2], dtype=torch.float64, generator=generator)
    return votes, activations, *poses(path, *shape, generator=generator)


def poses(path, batch, children, parents, dim, *, generator=None):
    routing = build(path, children, parents, dim)
    random = torch.randn(batch, children, dim, dtype=torch.float64, generator=generator)
    return (random,) if reads_poses(routing) else ()


def tensors(routed):
    """Poses, activations and coupling, and the scores if there are any."""
    return [*routed[:3], *([] if routed.scores is None else [routed.scores])]


def permuted(routing, order):
    """The routing with the parameters of its children in another order."""
    other = copy.deepcopy(routing)
    for parameter in other.parameters():
        if len(parameter) == len(order):
            parameter.data = parameter.data[order]
    return other


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_have_the_promised_shapes_and_ranges(path, shape):
    batch, children, parents, dim = shape
    routed = build(path, *shape[1:])(*random(path, *shape))
    assert routed.poses.shape == (batch, parents, dim)
    assert routed.activations.shape == (batch, parents)
    assert routed.coupling.shape == (batch, children, parents)
    assert ((routed.activations >= 0) & (routed.activations <= 1)).all()
    if routed.scores is not None:
        assert routed.scores.shape == (batch, parents)
        torch.testing.assert_close(routed.scores.sigmoid(), routed.activations)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_coupling_sums_to_one_over_parents(path, shape):
    coupling = build(path, *shape[1:])(*random(path, *shape)).coupling
    total = coupling.sum(2)
    assert (coupling >= 0).all()
    if yaml.safe_load(path.read_text()).get("leaky"):
        assert (total <= 1).all()
    else:
        torch.testing.assert_close(total, torch.ones_like(total))


def test_permuting_the_children_is_invisible(path):
    inputs = random(path, 3, 7, 4, 16)
    routing, order = build(path, 7, 4, 16), torch.randperm(7)
    before, after = routing(*inputs), permuted(routing, order)(*(tensor[:, order] for tensor in inputs))
    torch.testing.assert_close(after.poses, before.poses)
    torch.testing.assert_close(after.activations, before.activations)
    torch.testing.assert_close(after.coupling, before.coupling[:, order])


def test_an_image_alone_is_routed_as_in_a_batch(path):
    inputs = random(path, 5, 7, 4, 16)
    routing = build(path, 7, 4, 16)
    batch = routing(*inputs)
    for image in range(5):
        alone = routing(*(tensor[image : image + 1] for tensor in inputs))
        for tensor, other in zip(tensors(alone), tensors(batch), strict=True):
            torch.testing.assert_close(tensor[0], other[image])


@pytest.mark.parametrize("fill", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_votes_without_contrast_give_finite_values_and_gradients(path, shape, fill):
    votes = torch.full(shape, fill, dtype=torch.float64, requires_grad=True)
    activations = torch.full(shape[:2], fill, dtype=torch.float64, requires_grad=True)
    routing = build(path, *shape[1:])
    given = [tensor.fill_(fill).requires_grad_() for tensor in poses(path, *shape)]
    routed = routing(votes, activations, *given)
    sum(field.sum() for field in tensors(routed)).backward()
    leaves = [votes, activations, *given, *routing.parameters()]
    gradients = [tensor.grad for tensor in leaves]
    for tensor in (*tensors(routed), *(tensor for tensor in gradients if tensor is not None)):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_keep_the_dtype_of_the_votes(path, dtype):
    inputs = random(path, 3, 7, 4, 16)
    routed = build(path, 7, 4, 16, dtype)(*(tensor.to(dtype) for tensor in inputs))
    assert {field.dtype for field in tensors(routed)} == {dtype}


def test_gradients_reach_the_votes_and_every_parameter(path):
    votes, *others = random(path, 3, 7, 4, 16)
    routing = build(path, 7, 4, 16)
    routed = routing(votes.requires_grad_(), *others)
    (routed.activations.square().sum() + routed.poses.square().sum()).backward()
    for tensor in (votes, *routing.parameters()):
        assert tensor.grad.any()
