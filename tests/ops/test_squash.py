import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capsexp.ops.squash import exponential_squash, length, squash, squash_backward


def vectors(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_squash_is_equation_1():
    s = vectors(4, 5, 3)
    n = s.square().sum(-1, keepdim=True).sqrt()
    torch.testing.assert_close(squash(s), n**2 / (1 + n**2) * s / n, rtol=1e-14, atol=0)


@given(exponent=st.floats(-150, 150))
@settings(max_examples=40, deadline=None)
def test_squash_is_exact_at_every_length(exponent):
    n = 10.0**exponent
    expected = 1.0 if exponent > 100 else n**2 / (1 + n**2)
    squashed = squash(torch.tensor([0.0, n, 0.0], dtype=torch.float64))
    assert squashed.tolist() == [0, pytest.approx(expected, rel=1e-13, abs=0), 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-15, 1.0, 1e15])
@pytest.mark.parametrize("function", [squash, exponential_squash])
def test_values_and_gradients_are_finite(function, dtype, size):
    s = torch.full((2, 3), size, dtype=dtype, requires_grad=True)
    v = function(s)
    (v.sum() + length(v).sum()).backward()
    assert v.dtype == dtype
    assert v.isfinite().all()
    assert s.grad.isfinite().all()


def test_zero_stays_zero_with_gradient_zero():
    s = torch.zeros(2, 3, requires_grad=True)
    squash(s).sum().backward()
    assert not squash(s).any()
    assert not s.grad.any()


def test_gradients_pass_gradcheck():
    s = vectors(3, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(squash, s)
    assert torch.autograd.gradgradcheck(squash, s)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1.0, 1e6])
def test_squash_backward_is_the_gradient_of_squash(size):
    s = (size * vectors(4, 3)).requires_grad_()
    incoming = vectors(4, 3, seed=1)
    (expected,) = torch.autograd.grad(squash(s), s, incoming)
    torch.testing.assert_close(squash_backward(s.detach(), incoming), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_squashed_in_float32(dtype):
    s = vectors(4, 3).to(dtype)
    torch.testing.assert_close(squash(s), squash(s.float()), rtol=0, atol=0)
