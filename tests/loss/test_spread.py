import math

import pytest
import torch

from capsexp.capsules import Batch, Output
from capsexp.config.build import build
from capsexp.config.compose import compose, to_plain
from capsexp.loss.spread import Spread, spread_loss
from capsexp.schedule import Linear, Step

PAPER = {"margin": 0.5, "mean_over_classes": False, "weight_decay": 0.0, "reconstruction_weight": 0.0005}
START = Step(0, 100)


def configured(*overrides):
    node = to_plain(compose("train", ["model=em_routing", *overrides], config_dir=None))["loss"]
    return build(node, at="loss")


def batch_of(labels):
    pixels = torch.zeros(len(labels), 1, 2, 2)
    return Batch(pixels, torch.tensor(labels), pixels, torch.arange(len(labels)))


def output_of(activations, **more):
    activations = torch.as_tensor(activations)
    return Output(scores=activations, probabilities=activations, **more)


def spread_of(activations, labels, **changes):
    return Spread(**{**PAPER, **changes})(output_of(activations), batch_of(labels), START)["spread"]


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("margin", [0.2, 0.9])
def test_spread_is_the_squared_shortfall_of_every_wrong_class(margin, classes):
    torch.manual_seed(0)
    activations, labels = torch.rand(6, classes).double(), [number % classes for number in range(6)]
    per_image = [
        sum(max(0.0, margin - (row[label] - row[wrong])) ** 2 for wrong in range(classes) if wrong != label)
        for row, label in zip(activations.tolist(), labels, strict=True)
    ]
    loss = spread_of(activations, labels, margin=margin)
    assert loss.item() == pytest.approx(sum(per_image) / 6, rel=1e-12)
    average = spread_of(activations, labels, margin=margin, mean_over_classes=True)
    assert average.item() == pytest.approx(loss.item() / classes, rel=1e-12)


def test_a_lead_of_the_margin_costs_nothing():
    assert spread_of([[0.75, 0.25, 0.0], [0.0, 0.125, 0.875]], [0, 2]) == 0
    assert spread_of([[0.75, 0.375, 0.0]], [0]).item() == pytest.approx(0.125**2)


def test_undecided_classes_cost_the_margin_squared_each():
    assert spread_of([[0.3] * 5], [2]).item() == pytest.approx(4 * 0.25)


def test_a_single_class_costs_nothing():
    assert spread_of([[0.3]], [0]) == 0


def test_gradients_pass_gradcheck_away_from_the_hinges():
    activations = torch.tensor([[0.6, 0.4, 0.0], [0.5, 0.7, 0.3]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda activations: spread_of(activations, [0, 1]), activations)


@pytest.mark.parametrize("activations", [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.75, 0.25, 0.25]])
def test_gradients_are_finite_at_the_ends_and_hinges(activations):
    activations = torch.tensor([activations], requires_grad=True)
    spread_of(activations, [0]).backward()
    assert activations.grad.isfinite().all()


@pytest.mark.parametrize(("steps", "total"), [("1.0", 400), ("400", 1000)])
@pytest.mark.parametrize(("number", "margin"), [(0, 0.2), (200, 0.55), (400, 0.9), (600, 0.9)])
def test_the_papers_margin_rises_in_a_straight_line(number, margin, steps, total):
    loss = configured(f"loss.margin.steps={steps}")
    step = Step(number, total)
    assert loss.scheduled(step)["margin"] == pytest.approx(margin)
    undecided = loss(output_of([[0.5, 0.5]], weights=(torch.ones(1, 1),)), batch_of([0]), step)
    assert undecided["spread"].item() == pytest.approx(margin**2)


@pytest.mark.parametrize(("steps", "total"), [("1.0", 700_000), ("700000", 900_000)])
@pytest.mark.parametrize(
    ("number", "margin"),
    [(0, 0.214), (50_000, 0.237), (100_000, 0.294), (200_000, 0.595), (300_000, 0.896), (700_000, 0.99)],
)
def test_the_official_margin_is_a_sigmoid(number, margin, steps, total):
    loss = configured("loss=spread_official", f"loss.margin.steps={steps}")
    assert loss.scheduled(Step(number, total))["margin"] == pytest.approx(margin, abs=5e-4)


def test_terms_are_those_that_count():
    weights, pixels = (torch.full((2, 3), 2.0),), torch.ones(1, 1, 2, 2)
    output = output_of([[0.5, 0.5]], weights=weights, reconstruction=pixels)
    terms = Spread(**{**PAPER, "weight_decay": 0.5})(output, batch_of([0]), START)
    assert {name: term.item() for name, term in terms.items()} == {
        "spread": 0.25,
        "weight_decay": 6.0,
        "reconstruction": pytest.approx(0.002),
    }
    assert list(Spread(**PAPER)(output_of([[0.5, 0.5]]), batch_of([0]), START)) == ["spread"]


def test_scheduled_gives_the_present_margin_and_weight():
    loss = Spread(**{**PAPER, "margin": Linear(start=0.2, end=0.9, steps=100)})
    assert loss.scheduled(Step(50, 100)) == {
        "margin": pytest.approx(0.55),
        "reconstruction_weight": 0.0005,
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"margin": 0}, r"margin must be in \(0, 1\], got 0"),
        ({"margin": -0.2}, r"margin must be in \(0, 1\], got -0.2"),
        ({"margin": 1.1}, r"margin must be in \(0, 1\], got 1.1"),
        ({"margin": math.nan}, r"margin must be in \(0, 1\], got nan"),
        ({"weight_decay": -1e-7}, "weight_decay must be >= 0, got -1e-07"),
        ({"reconstruction_weight": -0.5}, "reconstruction_weight must be >= 0, got -0.5"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Spread(**{**PAPER, **wrong})


def test_the_function_alone_is_that_of_the_class():
    activations, labels = torch.rand(4, 5), [0, 1, 4, 2]
    for margin, mean in [(0.9, False), (0.3, True)]:
        expected = spread_of(activations, labels, margin=margin, mean_over_classes=mean)
        got = spread_loss(activations, torch.tensor(labels), margin=margin, mean_over_classes=mean)
        assert got.item() == expected.item()
    assert spread_loss(activations, torch.tensor(labels)).item() == spread_of(activations, labels, margin=0.9)


@pytest.mark.usefixtures("no_type_checks")
def test_wrong_arguments_are_one_line():
    with pytest.raises(ValueError, match=r"^labels must have shape \[2\], got \[2, 1\]$"):
        spread_loss(torch.ones(2, 3), torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^margin must be in \(0, 1\], got 0$"):
        spread_loss(torch.ones(2, 3), torch.tensor([0, 1]), margin=0)
