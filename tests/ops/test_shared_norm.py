"""Batch normalization over several processes, in a group of one; tests/training/test_parallel.py has two."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from capsexp.ops.shared_norm import batch_norm, shared_statistics

OPTIONS = {"momentum": 0.1, "eps": 1e-5}


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = 3 * torch.randn(5, 3, 7, dtype=torch.float64, generator=generator) + 2
    affine = [torch.randn(3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]
    return values.requires_grad_(), torch.zeros(3).double(), torch.ones(3).double(), *affine


def results(shared):
    values, mean, variance, *affine = inputs()
    with shared_statistics(shared):
        normal = batch_norm(values, mean, variance, *affine, training=True, **OPTIONS)
        (normal.sin() * torch.arange(7)).sum().backward()
    return [normal, mean, variance, values.grad, *(parameter.grad for parameter in affine)]


def test_values_running_means_and_gradients_are_those_of_torch(one_process):
    for ours, theirs in zip(results(shared=True), results(shared=False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_evaluation_shares_nothing():
    values, *rest = inputs()
    with shared_statistics(True):
        shared = batch_norm(values, *rest, training=False, **OPTIONS)
    assert torch.equal(shared, F.batch_norm(values, *rest, False, *OPTIONS.values()))


def test_without_several_processes_it_is_the_function_of_torch_bit_for_bit():
    values, *rest = inputs()
    ours = batch_norm(values, *[tensor.clone() for tensor in rest], training=True, **OPTIONS)
    assert torch.equal(ours, F.batch_norm(values, *rest, True, *OPTIONS.values()))


def test_the_variance_does_not_cancel(one_process):
    """Of values around 10^4 with a variance of 1, sums of squares in float32 keep one digit."""
    values = torch.randn(64, 2, 9, generator=torch.Generator().manual_seed(1)) + 1e4
    with shared_statistics(True):
        normal = batch_norm(values, None, None, None, None, training=True, **OPTIONS)
    assert normal.var((0, 2), correction=0).tolist() == pytest.approx([1, 1], abs=1e-3)
