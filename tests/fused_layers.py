"""Layers of matrix capsules and their inputs, for the tests of the fused routings."""

from typing import NamedTuple

import pytest
import torch

from capsexp.capsules import ReceptiveFields
from capsexp.ops.em_steps import initial_shares
from capsexp.ops.receptive_fields import Grid, gather_windows, receptive_fields
from capsexp.ops.votes import MatrixVotes, window_votes


class Layer(NamedTuple):
    rows: int = 5
    columns: int = 4
    in_types: int = 2
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    types: int = 3
    pose: tuple[int, int] = (4, 4)
    dense: bool = False  # every parent sees every child, with the matrices of its type, and coordinates
    bias: bool = False  # of the votes, a function of the matrices


LAYERS = [
    Layer(),
    Layer(rows=7, columns=6, stride=2, types=5),
    Layer(in_types=1, kernel=(1, 1), types=1),
    Layer(rows=3, columns=3, types=16),
    Layer(types=17),
    Layer(kernel=(2, 3), stride=3, types=9, pose=(2, 2)),
    Layer(types=2, pose=(3, 3)),
    Layer(rows=4, columns=4, types=8, pose=(1, 16)),
    Layer(dense=True, types=5),
    Layer(rows=1, columns=1, in_types=1, dense=True, types=1),
]
EVERY_LAYER = pytest.mark.parametrize("layer", LAYERS, ids=str)


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fields_of(layer) -> ReceptiveFields:
    return receptive_fields(Grid(layer.rows, layer.columns), layer.in_types, layer.kernel, layer.stride)


def example(layer, *, batch=3, seed=0, scale=1.0, silent=True):
    """Poses, weight, activations, beta_u, beta_a."""
    rows, side = layer.pose
    children = layer.rows * layer.columns * layer.in_types
    matrices = layer.in_types if layer.dense else fields_of(layer).children.shape[1]
    activations = random(batch, children, seed=seed + 1).sigmoid()
    if silent:
        activations[:, 0] = 0
    return [
        random(batch, children, rows * side, seed=seed + 2, scale=scale),
        torch.eye(side, dtype=torch.float64)
        + random(matrices, layer.types, side, side, seed=seed + 3, scale=0.3),
        activations,
        random(layer.types, seed=seed + 4),
        random(layer.types, seed=seed + 5),
    ]


def lazy(layer, poses, weight):
    bias = weight.square().flatten(2)[..., :1] * weight.new_ones(poses.shape[2]).cumsum(0).sin()
    return lazy_votes(layer, poses, weight)._replace(bias=bias if layer.bias else None)


def lazy_votes(layer, poses, weight):
    if not layer.dense:
        fields = fields_of(layer)
        return MatrixVotes(poses, weight, torch.arange(len(weight)), fields, None)
    positions = layer.rows * layer.columns
    offsets = random(positions * layer.in_types, poses.shape[2], seed=8).to(poses)
    return MatrixVotes(poses, weight, torch.arange(layer.in_types).repeat(positions), None, offsets)


def votes_of(votes):
    """The votes, [B, P, K, J, D]."""
    places = votes.poses.unsqueeze(1) if votes.fields is None else gather_windows(votes.poses, votes.fields)
    computed = window_votes(places, votes.weight[votes.matrices])
    if votes.bias is not None:
        computed = computed + votes.bias[votes.matrices]
    return computed if votes.offsets is None else computed + votes.offsets[:, None]


def shares(votes, initial):
    like = votes.poses.new_empty(
        1, 1 if votes.fields is None else len(votes.fields.children), len(votes.matrices)
    )
    return initial_shares(like, votes.weight.shape[1], votes.fields, initial)[0]


def values_and_gradients(run, layer, inputs, **options):
    """What run(layer, *inputs) returns, then the gradients of a random linear function of it."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    results = run(layer, *inputs, **options)
    loss = sum((tensor * random(*tensor.shape, seed=9).to(tensor)).sum() for tensor in results)
    return [
        *(tensor.detach() for tensor in results),
        *torch.autograd.grad(loss, inputs, materialize_grads=True),
    ]


def assert_runs_agree(expected, got, layer, inputs, *, rtol=1e-10, atol=1e-11, **options):
    """Compare two routings in value and gradient; `atol` is relative to a tensor's largest number, if > 1."""
    for tensor, other in zip(
        *(values_and_gradients(how, layer, inputs, **options) for how in (expected, got)), strict=True
    ):
        largest = max(1.0, tensor.abs().max().item())
        torch.testing.assert_close(other, tensor, rtol=rtol, atol=atol * largest)
