import itertools

import pytest
import torch
from torch import nn

from capsexp.capsules import Routed
from capsexp.ops.votes import MIB, chunked, images_per_chunk, make_votes, window_votes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MATRIX_OR_VECTOR = pytest.mark.parametrize("side", [3, 9], ids=["matrix", "vector"])


def test_votes_are_each_pose_times_its_matrix():
    poses, weight = torch.randn(3, 5, 2).double(), torch.randn(5, 2, 4, 6).double()
    votes = make_votes(poses, weight)
    for b, i, j in [(0, 0, 0), (2, 4, 3), (1, 2, 1)]:
        torch.testing.assert_close(votes[b, i, j], weight[i, :, j].T @ poses[b, i])
    torch.testing.assert_close(votes, torch.einsum("bik,ikjd->bijd", poses, weight))


def test_votes_lie_in_memory_as_routing_reads_them():
    assert make_votes(torch.randn(3, 5, 2), torch.randn(5, 2, 4, 6)).transpose(1, 2).is_contiguous()


def test_votes_pass_gradcheck():
    poses, weight = torch.randn(2, 3, 2).double(), torch.randn(3, 2, 2, 4).double()
    assert torch.autograd.gradcheck(make_votes, (poses.requires_grad_(), weight.requires_grad_()))


@MATRIX_OR_VECTOR
def test_votes_of_a_window_are_each_pose_times_the_matrix_of_its_place(side):
    poses, weight = torch.randn(2, 3, 4, 9).double(), torch.randn(4, 5, side, side).double()
    votes = window_votes(poses, weight)
    assert votes.shape == (2, 3, 4, 5, 9)
    for b, p, k, j in itertools.product(range(2), range(3), range(4), range(5)):
        expected = poses[b, p, k].view(-1, side) @ weight[k, j]
        torch.testing.assert_close(votes[b, p, k, j].view(-1, side), expected)


@MATRIX_OR_VECTOR
def test_votes_of_a_window_lie_in_memory_as_routing_reads_them(side):
    votes = window_votes(torch.randn(2, 3, 4, 9), torch.randn(4, 5, side, side))
    assert votes.transpose(2, 3).is_contiguous()


@pytest.mark.parametrize("side", [2, 4], ids=["matrix", "vector"])
def test_votes_of_a_window_pass_gradcheck(side):
    poses, weight = torch.randn(2, 2, 3, 4).double(), torch.randn(3, 2, side, side).double()
    assert torch.autograd.gradcheck(window_votes, (poses.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize(
    ("budget", "device", "images"),
    [(None, CPU, 12), (None, CUDA, 1024), (3 * MIB, CPU, 3), (3 * MIB - 1, CUDA, 2), (1, CPU, 1)],
)
def test_chunks_fit_the_budget_and_hold_at_least_one_image(budget, device, images):
    assert images_per_chunk(MIB, budget=budget, device=device) == images


def test_a_batch_that_fits_is_routed_in_one_call():
    sizes = []
    chunked(spy(sizes), torch.randn(4, 3, 2), torch.randn(4, 3), images=4)
    assert sizes == [4]


def test_a_larger_batch_is_routed_in_chunks_once_forward_and_once_backward():
    sizes = []
    poses = torch.randn(7, 3, 2, requires_grad=True)
    routed = chunked(spy(sizes), poses, torch.randn(7, 3), images=3)
    assert sizes == [3, 3, 1]
    assert [len(field) for field in routed[:3]] == [7, 7, 7]
    routed.poses.sum().backward()
    assert sorted(sizes) == [1, 1, 3, 3, 3, 3]


def test_chunks_give_the_same_values_and_gradients():
    layer = nn.Linear(2, 4).double()

    def route(poses, activations):
        j = layer(poses).tanh()
        return Routed(j, j.sum(2) * activations, j @ j.mT)

    poses, activations = torch.randn(7, 3, 2).double(), torch.randn(7, 3).double()
    results = []
    for images in (7, 2):
        poses.requires_grad_()
        routed = chunked(route, poses, activations, images=images)
        loss = sum((field**2).sum() for field in routed[:3])
        results.append((*routed[:3], *torch.autograd.grad(loss, [poses, *layer.parameters()])))
    for whole, chunks in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunks, rtol=1e-12, atol=1e-12)


def spy(sizes):
    def route(poses, activations):
        sizes.append(len(poses))
        return Routed(poses.tanh(), poses.tanh().sum(2), poses.tanh())

    return route
