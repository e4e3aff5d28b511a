import pytest
import torch
from torch import nn

from capsexp.analysis.attack.attacker import Attacker, Plan, Sizes, Withstood, predicted
from capsexp.analysis.attack.methods import Ball, bim, fgsm, gradient, pgd, starts
from capsexp.analysis.attack.objective import difference, own_loss
from capsexp.capsules import Batch, Output
from capsexp.loss.cross_entropy import CrossEntropy
from capsexp.loss.spread import Spread
from capsexp.schedule import Step

LOSS = CrossEntropy(weight_decay=0.0, reconstruction_weight=0.0)
PLAN = Plan(10, 10, 0.25, 2, ("own", "difference"), 0)


class Network(nn.Module):
    """Scores from a module."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, images, labels=None):
        scores = self.scores(images)
        return Output(scores=scores, probabilities=scores.softmax(1))


def frozen(scores):
    return Network(scores).eval().requires_grad_(False)


@pytest.fixture
def cnn():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4)]
    return frozen(nn.Sequential(*layers))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(40, 2, 7, 7, generator=generator)
    return Batch(images, torch.arange(40) % 4, images, torch.arange(40))


def ball(images, epsilon, low=-torch.inf, high=torch.inf):
    shape = (len(images), 1, 1, 1)
    return Ball(images, torch.full(shape, epsilon), low=torch.full(shape, low), high=torch.full(shape, high))


def attacker(model, loss=LOSS, plan=PLAN):
    return Attacker(model, {"own": own_loss(model, loss, Step(1, 1)), "difference": difference(model)}, plan)


def sizes(images, epsilons, **bounds):
    return Sizes(epsilons, [ball(images, float(epsilon), **bounds) for epsilon in epsilons])


def test_on_a_linear_model_fgsm_moves_the_gap_by_epsilon_times_the_weights_sum():
    weights = torch.tensor([[1.0, -2.0, 0.5, 0.0], [-1.0, 1.0, 0.5, 0.0]])
    linear = nn.Linear(4, 2, bias=False)
    linear.weight.data = weights
    model = frozen(nn.Sequential(nn.Flatten(), linear))
    images = torch.tensor([0.3, -0.1, 0.8, 0.2]).view(1, 1, 2, 2)
    one = Batch(images, torch.tensor([0]), images, torch.tensor([0]))
    slope = gradient(difference(model)(one, None), images)
    torch.testing.assert_close(slope.flatten(), weights[1] - weights[0])
    attacked = fgsm(slope, ball(images, 0.1))
    scores = [model(picture).scores[0] for picture in (images, attacked)]
    # |w1 - w0| = 2 + 3 + 0 + 0; the third and the fourth number have no gradient and stay.
    torch.testing.assert_close((scores[1] - scores[0]) @ torch.tensor([-1.0, 1.0]), torch.tensor(0.5))
    assert torch.equal(attacked.flatten()[2:], images.flatten()[2:])
    # The gap of 0.3 * 2 + 0.1 * 3 = 0.9 closes at epsilon 0.18.
    assert predicted(model, fgsm(slope, ball(images, 0.179))).tolist() == [0]
    assert predicted(model, fgsm(slope, ball(images, 0.181))).tolist() == [1]
    torch.testing.assert_close(bim(difference(model)(one, None), ball(images, 0.1), steps=10), attacked)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", ["own", "difference"])
def test_every_attack_stays_in_its_ball_and_its_bounds_and_reaches_for_both(cnn, batch, name, targeted):
    targets = (batch.labels + 1) % 4 if targeted else None
    objective = attacker(cnn).aims[name](batch, targets)
    within = ball(batch.images, 0.2, low=0.0, high=0.9)
    images = batch.images.clamp(0.0, 0.9)
    noise = starts(batch.indices, images, seed=0, restart=0)
    for attacked in (
        fgsm(gradient(objective, images), within),
        bim(objective, within, steps=3),
        pgd(objective, within, noise=noise, steps=5, step_size=0.7),
    ):
        assert (attacked - batch.images).abs().max().item() <= 0.2 + 1e-6
        assert (attacked - batch.images).abs().max().item() > 0.19
        assert (attacked.min().item(), attacked.max().item()) == pytest.approx((0.0, 0.9))
    assert torch.equal(
        pgd(objective, within, noise=noise, steps=0, step_size=1.0).clamp(0, 0.9),
        within.nearest(batch.images + 0.2 * noise),
    )


def test_attacks_raise_what_they_are_given(cnn, batch):
    aims = attacker(cnn).aims
    for targets in (None, (batch.labels + 1) % 4):
        for aim in aims.values():
            objective = aim(batch, targets)
            values = [objective(batch.images)]
            within = ball(batch.images, 0.05)
            values.append(objective(fgsm(gradient(objective, batch.images), within)))
            values.append(objective(bim(objective, within, steps=10)))
            assert values[0] < values[1] <= values[2] * (1 + 1e-3 * values[2].sign())


@pytest.mark.parametrize(
    "loss", [LOSS, Spread(margin=0.9, mean_over_classes=True, weight_decay=0.0, reconstruction_weight=0.0)]
)
def test_a_pictures_gradient_is_its_own_whatever_batch_it_is_in(cnn, batch, loss):
    together = attacker(cnn, loss).slope(batch)
    for place in (0, 7, 39):
        alone = Batch(*(field[place : place + 1] for field in batch))
        torch.testing.assert_close(attacker(cnn, loss).slope(alone), together[place : place + 1])


def test_where_the_margin_is_kept_the_spread_loss_has_no_gradient_and_the_difference_has_one(cnn, batch):
    labels = predicted(cnn, batch.images)
    scores = cnn(batch.images).scores.topk(2).values
    margin = float((scores[:, 0] - scores[:, 1]).quantile(0.5))
    loss = Spread(margin=margin, mean_over_classes=False, weight_decay=0.0, reconstruction_weight=0.0)
    batch = batch._replace(labels=labels)
    kept = scores[:, 0] - scores[:, 1] >= margin
    one = attacker(cnn, loss)
    assert 0.4 < kept.float().mean() < 0.6
    assert torch.equal((one.slope(batch) == 0).flatten(1).all(1), kept)
    assert not (one.slope(batch, objective="difference") == 0).flatten(1).all(1).any()
    # So FGSM leaves these pictures as they are, and a robustness is told that is none.
    epsilons, withstood = [0.5], Withstood(labels)
    won = one.won(
        ["fgsm", "bim", "pgd"], batch, None, sizes(batch.images, epsilons), withstood, slope=one.slope(batch)
    )
    assert not won["fgsm"][0, kept].any()
    assert not won["bim"][0, kept].any()
    assert won["pgd difference"][0, kept].float().mean() > 0.5


def test_a_network_that_does_not_depend_on_its_pictures_has_gradients_of_exactly_zero(batch):
    class Constant(nn.Module):
        def forward(self, images):
            return 0 * images.sum((1, 2, 3))[:, None] + torch.tensor([0.1, 0.3, 0.2, 0.0])

    one = attacker(frozen(Constant()))
    for name in ("own", "difference"):
        assert (one.slope(batch, objective=name) == 0).all()
    assert torch.equal(fgsm(one.slope(batch), ball(batch.images, 0.3)), batch.images)


def test_an_objective_that_is_cut_off_from_the_pictures_is_an_error(batch):
    class Cut(nn.Module):
        def forward(self, images):
            return images.detach().flatten(1)[:, :4]

    with pytest.raises(RuntimeError, match="does not require grad"):
        attacker(frozen(Cut())).slope(batch)


def test_starts_are_seeded_uniform_and_each_pictures_own():
    like = torch.empty(50, 1, 20, 20)
    every = starts(torch.arange(50), like, seed=3, restart=0)
    assert -1 <= every.min() < -0.999 < 0.999 < every.max() <= 1
    assert abs(every.mean()) < 0.02
    assert every.square().mean().item() == pytest.approx(1 / 3, rel=0.02)
    assert torch.equal(starts(torch.tensor([31, 4]), like[:2], seed=3, restart=0), every[[31, 4]])
    for other in (
        starts(torch.arange(50), like, seed=4, restart=0),
        starts(torch.arange(50), like, seed=3, restart=1),
    ):
        assert not torch.equal(other, every)


def test_restarts_and_larger_balls_never_help_the_network_and_the_worst_is_at_most_each(cnn, batch):
    epsilons, before = [0, 0.02, 0.05, 0.1], None
    for restarts in (1, 3):
        one, withstood = (
            attacker(cnn, plan=PLAN._replace(restarts=restarts, pgd_steps=2)),
            Withstood(batch.labels),
        )
        for targets in (None, (batch.labels + 2) % 4):
            slope = one.slope(batch, targets)
            won = one.won(
                ["fgsm", "bim", "pgd"], batch, targets, sizes(batch.images, epsilons), withstood, slope=slope
            )
            if targets is not None:
                continue
            after = won
        left = withstood.within(epsilons)
        for rows in after.values():
            assert not (left & rows).any()
        for name in ("pgd own", "pgd difference"):
            assert (after[name][1:] >= after[name][:-1]).all()
            if before is not None:
                assert (after[name] >= before[name]).all()
        assert (left[1:] <= left[:-1]).all()
        before = after
    clean = predicted(cnn, batch.images)
    assert all(torch.equal(rows[0], clean != batch.labels) for rows in after.values())


def test_pgd_is_the_same_in_batches_of_any_size(cnn, batch):
    one, epsilons = attacker(cnn), [0.03, 0.06]

    def won(part):
        return one.won(
            ["pgd"], part, None, sizes(part.images, epsilons), Withstood(part.labels), slope=part.images
        )

    halves = [won(Batch(*(field[place] for field in batch))) for place in (slice(0, 13), slice(13, 40))]
    for name, rows in won(batch).items():
        assert torch.equal(torch.cat([half[name] for half in halves], 1), rows)
        assert 0 < rows.float().mean() < 1


def test_a_picture_withstands_what_is_smaller_than_the_smallest_attack_that_it_fell_to():
    withstood = Withstood(torch.tensor([0, 1, 2]))
    withstood.see(0, torch.tensor([0, 1, 0]))
    withstood.see(0.3, torch.tensor([1, 1]), torch.tensor([True, True, False]))
    withstood.see(0.1, torch.tensor([1]), torch.tensor([True, False, False]))
    withstood.see(0.2, torch.tensor([0]), torch.tensor([True, False, False]))
    assert withstood.within([0, 0.05, 0.1, 0.5]).tolist() == [
        [True, True, False],
        [True, True, False],
        [False, True, False],
        [False, True, False],
    ]


# The same attacks by foolbox (Rauber et al. 2020)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 2.0)])
@pytest.mark.parametrize("epsilon", [0.03, 0.2])
def test_examples_are_those_of_foolbox(cnn, batch, epsilon, low, high, targeted):
    foolbox = pytest.importorskip("foolbox", reason="foolbox is not installed: pip install foolbox")
    theirs = foolbox.PyTorchModel(nn.Sequential(cnn.scores).eval(), bounds=(low, high), device="cpu")
    targets = (batch.labels + 1) % 4 if targeted else None
    criterion = foolbox.criteria.TargetedMisclassification(targets) if targeted else batch.labels
    within = ball(batch.images, epsilon, low=low, high=high)
    objective = attacker(cnn).aims["own"](batch, targets)
    attacks = foolbox.attacks
    pairs = [
        (
            attacks.LinfBasicIterativeAttack(rel_stepsize=0.1, steps=10, random_start=False),
            bim(objective, within, steps=10),
        ),
        (
            attacks.LinfProjectedGradientDescentAttack(rel_stepsize=0.25, steps=7, random_start=False),
            pgd(objective, within, noise=torch.zeros_like(batch.images), steps=7, step_size=0.25),
        ),
    ]
    if not targeted:  # foolbox's FGSM takes no target
        pairs.append((attacks.FGSM(random_start=False), fgsm(gradient(objective, batch.images), within)))
    for attack, ours in pairs:
        raw, clipped, _ = attack(theirs, batch.images, criterion, epsilons=epsilon)
        for made in (raw, clipped):
            torch.testing.assert_close(ours, made, rtol=0, atol=2e-6)
