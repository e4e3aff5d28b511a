import pytest
import torch

from capsexp.capsules import Batch, Output
from capsexp.loss.margin import Margin, margin_loss
from capsexp.schedule import Linear, Step

PAPER = {
    "present": 0.9,
    "absent": 0.1,
    "down_weight": 0.5,
    "weight_decay": 0.0,
    "reconstruction_weight": 0.0005,
}
START = Step(0, 100)


def batch_of(labels, pixels=None):
    labels = torch.tensor(labels)
    pixels = torch.zeros(len(labels), 1, 2, 2) if pixels is None else pixels
    return Batch(pixels, labels, pixels, torch.arange(len(labels)))


def output_of(lengths, reconstruction=None):
    lengths = torch.as_tensor(lengths)
    return Output(scores=lengths, probabilities=lengths, reconstruction=reconstruction)


def test_margin_is_squared_and_summed_over_classes():
    terms = Margin(**PAPER)(output_of([[0.6, 0.4, 0.1], [0.95, 0.05, 0.3]]), batch_of([0, 0]), START)
    per_image = [(0.9 - 0.6) ** 2 + 0.5 * (0.4 - 0.1) ** 2, 0.5 * (0.3 - 0.1) ** 2]
    assert terms["margin"].item() == pytest.approx(sum(per_image) / 2)
    assert list(terms) == ["margin"]


def test_a_satisfied_margin_costs_nothing():
    assert Margin(**PAPER)(output_of([[0.9, 0.1]]), batch_of([0]), START)["margin"].item() == 0


def test_reconstruction_is_the_papers_share_of_the_sum_of_squares():
    pixels = torch.rand(2, 1, 28, 28)
    output = output_of([[0.0] * 10] * 2, torch.rand(2, 1, 28, 28))
    terms = Margin(**PAPER)(output, batch_of([3, 7], pixels), START)
    squares = (output.reconstruction - pixels).square().sum() / 2
    assert terms["reconstruction"].item() == pytest.approx(0.0005 * squares.item(), rel=1e-5)
    assert terms["margin"].item() == pytest.approx(0.81)
    # As a mean over pixels the paper's weight is 0.392, and the whole loss is the sum of the terms.
    mean = torch.nn.functional.mse_loss(output.reconstruction, pixels)
    assert sum(terms.values()).item() == pytest.approx(0.81 + 0.392 * mean.item(), rel=1e-5)


def test_official_units_weigh_the_reconstruction_twenty_times_as_much():
    pixels, reconstruction = torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8)
    lengths, labels = torch.rand(4, 10), torch.tensor([1, 2, 3, 4])
    output, batch = output_of(lengths, reconstruction), batch_of(labels.tolist(), pixels)
    ours = sum(Margin(**{**PAPER, "reconstruction_weight": 0.01})(output, batch, START).values())
    present = torch.nn.functional.one_hot(labels, 10)
    long_enough = present * (0.9 - lengths).clamp(min=0) ** 2
    short_enough = (1 - present) * (lengths - 0.1).clamp(min=0) ** 2
    theirs = (0.5 * long_enough + 0.5 * 0.5 * short_enough).mean()
    theirs = theirs + 0.0005 * (reconstruction - pixels).square().flatten(1).sum(1).mean()
    assert ours.item() == pytest.approx(20 * theirs.item(), rel=1e-5)


def test_the_target_of_the_reconstruction_is_pixels_not_standardised_images():
    pixels = torch.rand(2, 1, 2, 2)
    batch = batch_of([0, 1], pixels)._replace(images=5 * pixels - 3)
    terms = Margin(**PAPER)(output_of([[0.5, 0.5]] * 2, pixels.clone()), batch, START)
    assert terms["reconstruction"].item() == 0


def test_reconstruction_weight_may_be_a_schedule():
    loss = Margin(**{**PAPER, "reconstruction_weight": Linear(start=0.0, end=1.0, steps=100)})
    output, batch = output_of([[0.9, 0.1]], torch.ones(1, 1, 2, 2)), batch_of([0])
    assert [loss(output, batch, Step(n, 100))["reconstruction"].item() for n in (0, 50, 100)] == [0, 2, 4]
    assert loss.scheduled(Step(50, 100)) == {"reconstruction_weight": 0.5}


def test_weight_decay_joins_with_its_weight():
    output = output_of([[0.9, 0.1]])._replace(weights=(torch.full((2, 3), 2.0),))
    terms = Margin(**{**PAPER, "weight_decay": 0.5})(output, batch_of([0]), START)
    assert {name: term.item() for name, term in terms.items()} == {"margin": 0.0, "weight_decay": 6.0}


def test_scheduled_names_a_constant_weight_too():
    assert Margin(**PAPER).scheduled(START) == {"reconstruction_weight": 0.0005}


def test_gradients_pass_gradcheck_away_from_the_hinges():
    lengths = torch.tensor([[0.6, 0.4, 0.2], [0.5, 0.7, 0.3]], dtype=torch.float64, requires_grad=True)
    loss, batch = Margin(**PAPER), batch_of([0, 1])
    assert torch.autograd.gradcheck(lambda values: loss(output_of(values), batch, START)["margin"], lengths)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"present": 1.5}, "0 <= absent < present <= 1, got 0.1 and 1.5"),
        ({"absent": 0.95}, "0 <= absent < present <= 1, got 0.95 and 0.9"),
        ({"absent": -0.1}, "0 <= absent < present <= 1, got -0.1 and 0.9"),
        ({"down_weight": -1.0}, "down_weight must be >= 0, got -1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0, got -0.1"),
        ({"reconstruction_weight": -0.5}, "reconstruction_weight must be >= 0, got -0.5"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Margin(**{**PAPER, **wrong})


def test_several_classes_may_be_present():
    pixels = torch.zeros(2, 2, 1, 2, 2)
    batch = Batch(pixels[:, 0], torch.tensor([[0, 2], [1, 0]]), pixels, torch.zeros(2, 2, dtype=torch.int64))
    output = output_of([[0.6, 0.4, 0.95], [0.3, 0.9, 0.2]], torch.full((2, 2, 1, 2, 2), 0.5))
    terms = Margin(**PAPER)(output, batch, START)
    per_image = [0.3**2 + 0.5 * 0.3**2, 0.6**2 + 0.5 * 0.1**2]
    assert terms["margin"].item() == pytest.approx(sum(per_image) / 2)
    assert terms["reconstruction"].item() == pytest.approx(0.0005 * 2 * 4 * 0.25)


@pytest.mark.parametrize("labels", [[0, 1], [[0, 2], [1, 0]]])
def test_the_function_alone_has_the_papers_values(labels):
    lengths, labels = torch.tensor([[0.6, 0.4, 0.1], [0.95, 0.05, 0.3]]), torch.tensor(labels)
    expected = Margin(**PAPER)(output_of(lengths), batch_of(labels.tolist()), START)["margin"]
    assert margin_loss(lengths, labels).item() == expected.item()
    assert margin_loss(lengths, labels, present=0.5, absent=0.2, down_weight=1).item() != expected.item()


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("lengths", "labels", "message"),
    [
        (torch.ones(3), torch.tensor([0]), r"scores must have shape \[B, J\], got \[3\]"),
        (torch.ones(2, 3), torch.tensor([0]), r"labels must have shape \[2\] or \[2, T\], got \[1\]"),
        (torch.ones(2, 3), torch.zeros(2, 1, 1), r"labels must have shape \[2\] or .*, got \[2, 1, 1\]"),
        (torch.ones(2, 3), torch.zeros(2), "labels must be torch.int64, got torch.float32"),
        (torch.ones(2, 3), torch.tensor([0, 3]), r"labels must be in 0 \.\.\. 2, got 0 \.\.\. 3"),
        (torch.ones(2, 3), torch.tensor([-1, 0]), r"labels must be in 0 \.\.\. 2, got -1 \.\.\. 0"),
    ],
)
def test_wrong_arguments_are_one_line(lengths, labels, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        margin_loss(lengths, labels)


def test_wrong_margins_are_one_line():
    with pytest.raises(ValueError, match=r"absent and present must be .*, got 0\.95 and 0\.9"):
        margin_loss(torch.ones(1, 3), torch.tensor([0]), absent=0.95)
    with pytest.raises(ValueError, match="down_weight must be >= 0, got -1"):
        margin_loss(torch.ones(1, 3), torch.tensor([0]), down_weight=-1)
