import pytest
import torch

from capsexp.capsules import Batch, Output
from capsexp.loss.cross_entropy import CrossEntropy
from capsexp.schedule import Linear, Step

START = Step(0, 100)


def example(reconstruction=None):
    logits = torch.tensor([[2.0, 1.0, -1.0], [0.0, 3.0, 0.0]])
    pixels = torch.zeros(2, 1, 2, 2)
    batch = Batch(pixels, torch.tensor([0, 2]), pixels, torch.arange(2))
    return Output(scores=logits, probabilities=logits.softmax(1), reconstruction=reconstruction), batch


def test_cross_entropy_is_the_mean_surprise_at_the_label():
    output, batch = example()
    terms = CrossEntropy(weight_decay=0.0, reconstruction_weight=0.0005)(output, batch, START)
    expected = -(output.probabilities[0, 0].log() + output.probabilities[1, 2].log()) / 2
    assert terms["cross_entropy"].item() == pytest.approx(expected.item())
    assert list(terms) == ["cross_entropy"]


def test_reconstruction_joins_with_its_weight():
    loss = CrossEntropy(weight_decay=0.0, reconstruction_weight=0.25)
    assert loss(*example(torch.ones(2, 1, 2, 2)), START)["reconstruction"].item() == 1


def test_weight_decay_joins_with_its_weight():
    output, batch = example()
    loss = CrossEntropy(weight_decay=0.5, reconstruction_weight=0.0)
    terms = loss(output._replace(weights=(torch.full((2, 3), 2.0),)), batch, START)
    assert list(terms) == ["cross_entropy", "weight_decay"]
    assert terms["weight_decay"].item() == 6


def test_scheduled_gives_the_present_weight():
    loss = CrossEntropy(weight_decay=0.0, reconstruction_weight=Linear(start=0.0, end=1.0, steps=100))
    assert loss.scheduled(Step(25, 100)) == {"reconstruction_weight": 0.25}


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="reconstruction_weight must be >= 0, got -1"):
        CrossEntropy(weight_decay=0.0, reconstruction_weight=-1.0)
    with pytest.raises(ValueError, match="weight_decay must be >= 0, got -1"):
        CrossEntropy(weight_decay=-1.0, reconstruction_weight=0.0)
