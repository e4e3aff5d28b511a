import math

import pytest
import torch

from capsexp.capsules import Batch, Output
from capsexp.errors import UserError
from capsexp.loss.negative_log_likelihood import NegativeLogLikelihood, negative_log_likelihood
from capsexp.schedule import Step

START = Step(0, 100)


def term_of(probabilities, labels):
    scores, pixels = torch.as_tensor(probabilities), torch.zeros(len(labels), 1, 2, 2)
    batch = Batch(pixels, torch.tensor(labels), pixels, torch.arange(len(labels)))
    loss = NegativeLogLikelihood(weight_decay=0.0, reconstruction_weight=0.0)
    (term,) = loss(Output(scores, scores), batch, START).values()
    return term


def test_it_is_the_mean_surprise_at_the_label():
    loss = term_of([[0.5, 0.25, 0.25], [0.125, 0.0, 0.875]], [1, 0])
    assert loss.item() == pytest.approx((math.log(4) + math.log(8)) / 2)


def test_it_is_the_cross_entropy_of_logarithms():
    logits, labels = torch.randn(5, 4).double(), torch.tensor([0, 3, 2, 1, 0])
    expected = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(negative_log_likelihood(logits.softmax(1), labels), expected)


def test_a_label_of_probability_0_costs_a_finite_amount_and_has_no_gradient():
    probabilities = torch.tensor([[0.0, 1.0]], requires_grad=True)
    loss = term_of(probabilities, [0])
    loss.backward()
    assert loss.item() == pytest.approx(27.63, abs=0.01)
    assert not probabilities.grad.any()


def test_gradients_pass_gradcheck():
    probabilities = torch.tensor([[0.6, 0.4], [0.5, 0.7]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda rows: negative_log_likelihood(rows, torch.tensor([0, 1])), probabilities
    )


@pytest.mark.parametrize(("scores", "got"), [([2.0, -1.0], r"-1 \.\.\. 2"), ([0.5, 1.5], r"0.5 \.\.\. 1.5")])
def test_scores_that_are_no_probabilities_are_one_line(scores, got):
    message = rf"the probabilities of the classes must be in \[0, 1\], got {got}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        negative_log_likelihood(torch.tensor([scores]), torch.tensor([0]))
    with pytest.raises(UserError, match=f"^loss=negative_log_likelihood: {message}; for other"):
        term_of([scores], [0])


def test_nan_is_left_to_the_check_of_the_loss():
    assert term_of([[math.nan, 0.5]], [0]).isnan()


@pytest.mark.usefixtures("no_type_checks")
def test_wrong_shapes_are_one_line():
    with pytest.raises(ValueError, match=r"^labels must have shape \[2\], got \[2, 1\]$"):
        negative_log_likelihood(torch.ones(2, 3), torch.zeros(2, 1, dtype=torch.int64))
