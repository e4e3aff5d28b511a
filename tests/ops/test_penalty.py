import math

import pytest
import torch

from capsexp.capsules import Output
from capsexp.loss.cross_entropy import CrossEntropy
from capsexp.ops.penalty import weight_decay_term


def output_of(*weights):
    return Output(scores=torch.zeros(1, 2), probabilities=torch.zeros(1, 2), weights=weights)


def test_weight_decay_is_half_the_sum_of_all_squared_weights():
    weights = torch.randn(3, 4, requires_grad=True), torch.randn(2, 3, 5, 5, requires_grad=True)
    term = weight_decay_term(output_of(*weights), 0.3)["weight_decay"]
    assert term.item() == pytest.approx(
        0.15 * sum(weight.square().sum().item() for weight in weights), rel=1e-5
    )
    for weight, gradient in zip(weights, torch.autograd.grad(term, weights), strict=True):
        torch.testing.assert_close(gradient, 0.3 * weight)


def test_weight_decay_is_summed_in_float32():
    weight = torch.full((40, 40), 16.0, dtype=torch.float16, requires_grad=True)
    assert weight_decay_term(output_of(weight), 2.0)["weight_decay"].item() == 40 * 40 * 256


def test_a_weight_of_0_adds_no_term():
    assert weight_decay_term(output_of(torch.ones(2, 2)), 0.0) == {}
    assert weight_decay_term(output_of(), 0.0) == {}


def test_a_network_that_names_no_weights_is_refused():
    with pytest.raises(ValueError, match="weight_decay needs a network that returns its weights"):
        weight_decay_term(output_of(), 1e-7)


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(ValueError, match=f"weight_decay must be >= 0, got {weight}"):
        CrossEntropy(label_smoothing=0.0, weight_decay=weight, reconstruction_weight=0)
