import pytest
import torch

from capsexp.ops.mean_variance import mean_and_variance


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 2, 1, 3), (2, 1, 2, 3, 4, 2)])
def test_values_and_gradients_are_those_of_var_mean(shape):
    values = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    variance, mean = torch.var_mean(values, 2, correction=0)
    got = mean_and_variance(values)
    torch.testing.assert_close(got, (mean, variance))
    weights = [torch.randn_like(mean) for _ in range(2)]
    expected = torch.autograd.grad((mean * weights[0] + variance * weights[1]).sum(), values)
    gradient = torch.autograd.grad(sum((a * b).sum() for a, b in zip(got, weights, strict=True)), values)
    torch.testing.assert_close(gradient, expected)


def test_one_result_alone_has_its_gradient():
    values = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    for number in range(2):
        assert torch.autograd.gradcheck(lambda x, number=number: mean_and_variance(x)[number], values)


def test_a_large_mean_costs_no_digits_of_a_small_variance():
    values = 1000 + torch.randn(1, 1, 8, 100)
    _, variance = mean_and_variance(values)
    torch.testing.assert_close(variance, values.double().var(2, correction=0).float(), rtol=1e-3, atol=0)


def test_only_the_values_and_their_mean_are_stored():
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x.numel()) or x, lambda x: x):
        mean_and_variance(torch.randn(2, 3, 4, 5, requires_grad=True))
    assert sum(stored) == 2 * 3 * 5 * (4 + 1)
