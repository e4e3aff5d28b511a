import pytest
import torch

from capsexp.capsules import Batch, Mixed, Output
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
    terms = CrossEntropy(label_smoothing=0.0, weight_decay=0.0, reconstruction_weight=0.0005)(
        output, batch, START
    )
    expected = -(output.probabilities[0, 0].log() + output.probabilities[1, 2].log()) / 2
    assert terms["cross_entropy"].item() == pytest.approx(expected.item())
    assert list(terms) == ["cross_entropy"]


def test_reconstruction_joins_with_its_weight():
    loss = CrossEntropy(label_smoothing=0.0, weight_decay=0.0, reconstruction_weight=0.25)
    assert loss(*example(torch.ones(2, 1, 2, 2)), START)["reconstruction"].item() == 1


def test_weight_decay_joins_with_its_weight():
    output, batch = example()
    loss = CrossEntropy(label_smoothing=0.0, weight_decay=0.5, reconstruction_weight=0.0)
    terms = loss(output._replace(weights=(torch.full((2, 3), 2.0),)), batch, START)
    assert list(terms) == ["cross_entropy", "weight_decay"]
    assert terms["weight_decay"].item() == 6


def test_scheduled_gives_the_present_weight():
    loss = CrossEntropy(
        label_smoothing=0.0, weight_decay=0.0, reconstruction_weight=Linear(start=0.0, end=1.0, steps=100)
    )
    assert loss.scheduled(Step(25, 100)) == {"reconstruction_weight": 0.25}


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="reconstruction_weight must be >= 0, got -1"):
        CrossEntropy(label_smoothing=0.0, weight_decay=0.0, reconstruction_weight=-1.0)
    with pytest.raises(ValueError, match="weight_decay must be >= 0, got -1"):
        CrossEntropy(label_smoothing=0.0, weight_decay=-1.0, reconstruction_weight=0.0)


def test_label_smoothing_spreads_the_target():
    output, batch = example()
    loss = CrossEntropy(label_smoothing=0.3, weight_decay=0.0, reconstruction_weight=0.0)
    target = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    expected = -(target * output.scores.log_softmax(1)).sum(1).mean()
    assert loss(output, batch, START)["cross_entropy"].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_a_smoothing_out_of_range_is_refused(smoothing):
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        CrossEntropy(label_smoothing=smoothing, weight_decay=0.0, reconstruction_weight=0.0)


def test_the_loss_of_a_mixed_image_is_that_of_its_mixed_target():
    output, batch = example()
    mixed = batch._replace(mixed=Mixed(torch.tensor([1, 0]), 0.7))
    loss = CrossEntropy(label_smoothing=0.0, weight_decay=0.0, reconstruction_weight=0.0)
    target = torch.tensor([[0.7, 0.3, 0.0], [0.3, 0.0, 0.7]])
    expected = -(target * output.scores.log_softmax(1)).sum(1).mean()
    assert loss(output, mixed, START)["cross_entropy"].item() == pytest.approx(expected.item())
