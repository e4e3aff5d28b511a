import math

import pytest
import torch

from capsexp.capsules import Batch, Output
from capsexp.loss.sigmoid_cross_entropy import SigmoidCrossEntropy, sigmoid_cross_entropy
from capsexp.schedule import Linear, Step

START = Step(0, 100)
PLAIN = {"target": 1.0, "weight_decay": 0.0, "reconstruction_weight": 0.0005}
LOGITS = [[2.0, 1.0, -1.0], [0.0, 3.0, 0.5]]


def example(labels, reconstruction=None):
    pixels = torch.zeros(2, 2, 1, 2, 2)
    batch = Batch(pixels[:, 0], torch.tensor(labels), pixels, torch.arange(4).unflatten(0, (2, 2)))
    logits = torch.tensor(LOGITS)
    return Output(scores=logits, probabilities=logits.sigmoid(), reconstruction=reconstruction), batch


def by_hand(labels, target):
    total = 0.0
    for row, present in zip(LOGITS, labels, strict=True):
        for place, logit in enumerate(row):
            expected = target if place in present else 0
            chance = 1 / (1 + math.exp(-logit))
            total -= expected * math.log(chance) + (1 - expected) * math.log(1 - chance)
    return total / 2


@pytest.mark.parametrize("target", [1.0, 0.5])
def test_every_class_counts_by_itself_summed_over_classes_mean_over_images(target):
    labels = [[0, 2], [1, 0]]
    terms = SigmoidCrossEntropy(**{**PLAIN, "target": target})(*example(labels), START)
    assert list(terms) == ["sigmoid_cross_entropy"]
    assert terms["sigmoid_cross_entropy"].item() == pytest.approx(by_hand(labels, target))


def test_one_class_in_each_image_will_do():
    output, batch = example([[0, 2], [1, 0]])
    terms = SigmoidCrossEntropy(**PLAIN)(output, batch._replace(labels=torch.tensor([2, 1])), START)
    assert terms["sigmoid_cross_entropy"].item() == pytest.approx(by_hand([[2], [1]], 1.0))


def test_reconstruction_and_weight_decay_join_with_their_weights():
    loss = SigmoidCrossEntropy(target=1, weight_decay=0.5, reconstruction_weight=0.25)
    output, batch = example([[0, 2], [1, 0]], torch.ones(2, 2, 1, 2, 2))
    terms = loss(output._replace(weights=(torch.full((2, 3), 2.0),)), batch, START)
    assert terms["weight_decay"].item() == 6
    assert terms["reconstruction"].item() == 0.25 * 2 * 4  # two images of four pixels for each


def test_scheduled_gives_the_present_weight():
    loss = SigmoidCrossEntropy(
        target=1, weight_decay=0.0, reconstruction_weight=Linear(start=0.0, end=1.0, steps=100)
    )
    assert loss.scheduled(Step(25, 100)) == {"reconstruction_weight": 0.25}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target": 0}, r"^target must be in \(0, 1\], got 0"),
        ({"target": 1.5}, r"^target must be in \(0, 1\], got 1\.5"),
        ({"weight_decay": -1}, "weight_decay must be >= 0, got -1"),
        ({"reconstruction_weight": -1}, "reconstruction_weight must be >= 0, got -1"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SigmoidCrossEntropy(**{**PLAIN, **wrong})


def test_the_function_alone_is_that_of_the_class():
    labels = [[0, 2], [1, 0]]
    assert sigmoid_cross_entropy(torch.tensor(LOGITS), torch.tensor(labels)).item() == pytest.approx(
        by_hand(labels, 1.0)
    )
    with pytest.raises(ValueError, match=r"^target must be in \(0, 1\], got 0$"):
        sigmoid_cross_entropy(torch.tensor(LOGITS), torch.tensor(labels), target=0)
