import pytest
import torch
from torch import nn

from capsexp.analysis.attack.attacker import Attacker, AttackSettings, SmallestBreakingRadius, classify
from capsexp.analysis.attack.methods import Ball, bim, fgsm, gradient, pgd, starts
from capsexp.analysis.attack.objective import own_loss, score_margin
from capsexp.analysis.attack.units import Radii
from capsexp.capsules import Batch, Output
from capsexp.loss.cross_entropy import CrossEntropy
from capsexp.loss.spread import Spread
from capsexp.schedule import Step

LOSS = CrossEntropy(label_smoothing=0.0, weight_decay=0.0, reconstruction_weight=0.0)
SETTINGS = AttackSettings(10, 10, 0.25, 2, ("own", "difference"), 0)


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


def attacker(model, loss=LOSS, settings=SETTINGS):
    return Attacker(
        model, {"own": own_loss(model, loss, Step(1, 1)), "difference": score_margin(model)}, settings
    )


def radii(images, epsilons, **bounds):
    return Radii(epsilons, [ball(images, float(epsilon), **bounds) for epsilon in epsilons])


def test_on_a_linear_model_fgsm_moves_the_gap_by_epsilon_times_the_weights_sum():
    weights = torch.tensor([[1.0, -2.0, 0.5, 0.0], [-1.0, 1.0, 0.5, 0.0]])
    linear = nn.Linear(4, 2, bias=False)
    linear.weight.data = weights
    model = frozen(nn.Sequential(nn.Flatten(), linear))
    images = torch.tensor([0.3, -0.1, 0.8, 0.2]).view(1, 1, 2, 2)
    single = Batch(images, torch.tensor([0]), images, torch.tensor([0]))
    input_gradient = gradient(score_margin(model)(single, None), images)
    torch.testing.assert_close(input_gradient.flatten(), weights[1] - weights[0])
    attacked = fgsm(input_gradient, ball(images, 0.1))
    scores = [model(image).scores[0] for image in (images, attacked)]
    # |w1 - w0| = 2 + 3 + 0 + 0; the third and the fourth number have no gradient and stay.
    torch.testing.assert_close((scores[1] - scores[0]) @ torch.tensor([-1.0, 1.0]), torch.tensor(0.5))
    assert torch.equal(attacked.flatten()[2:], images.flatten()[2:])
    # The gap of 0.3 * 2 + 0.1 * 3 = 0.9 closes at epsilon 0.18.
    assert classify(model, fgsm(input_gradient, ball(images, 0.179))).tolist() == [0]
    assert classify(model, fgsm(input_gradient, ball(images, 0.181))).tolist() == [1]
    torch.testing.assert_close(bim(score_margin(model)(single, None), ball(images, 0.1), steps=10), attacked)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", ["own", "difference"])
def test_every_attack_stays_in_its_ball_and_bounds_and_reaches_both(cnn, batch, name, targeted):
    targets = (batch.labels + 1) % 4 if targeted else None
    objective = attacker(cnn).objectives[name](batch, targets)
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
        within.project(batch.images + 0.2 * noise),
    )


def test_attacks_raise_their_objective(cnn, batch):
    objectives = attacker(cnn).objectives
    for targets in (None, (batch.labels + 1) % 4):
        for factory in objectives.values():
            objective = factory(batch, targets)
            values = [objective(batch.images)]
            within = ball(batch.images, 0.05)
            values.append(objective(fgsm(gradient(objective, batch.images), within)))
            values.append(objective(bim(objective, within, steps=10)))
            assert values[0] < values[1] <= values[2] * (1 + 1e-3 * values[2].sign())


@pytest.mark.parametrize(
    "loss", [LOSS, Spread(margin=0.9, mean_over_classes=True, weight_decay=0.0, reconstruction_weight=0.0)]
)
def test_an_images_gradient_is_its_own_whatever_batch_it_is_in(cnn, batch, loss):
    together = attacker(cnn, loss).input_gradient(batch)
    for place in (0, 7, 39):
        alone = batch.take(slice(place, place + 1))
        torch.testing.assert_close(attacker(cnn, loss).input_gradient(alone), together[place : place + 1])


def test_where_the_margin_is_met_the_spread_loss_has_no_gradient_and_the_difference_has_one(cnn, batch):
    labels = classify(cnn, batch.images)
    scores = cnn(batch.images).scores.topk(2).values
    margin = float((scores[:, 0] - scores[:, 1]).quantile(0.5))
    loss = Spread(margin=margin, mean_over_classes=False, weight_decay=0.0, reconstruction_weight=0.0)
    batch = batch._replace(labels=labels)
    meets_margin = scores[:, 0] - scores[:, 1] >= margin
    attack = attacker(cnn, loss)
    assert 0.4 < meets_margin.float().mean() < 0.6
    assert torch.equal((attack.input_gradient(batch) == 0).flatten(1).all(1), meets_margin)
    assert not (attack.input_gradient(batch, objective="difference") == 0).flatten(1).all(1).any()
    # So FGSM does not change these images, and their accuracy shows no robustness.
    epsilons, broken = [0.5], SmallestBreakingRadius(labels)
    successes = attack.successes(
        ["fgsm", "bim", "pgd"],
        batch,
        None,
        radii(batch.images, epsilons),
        broken,
        input_gradient=attack.input_gradient(batch),
    )
    assert not successes["fgsm"][0, meets_margin].any()
    assert not successes["bim"][0, meets_margin].any()
    assert successes["pgd difference"][0, meets_margin].float().mean() > 0.5


def test_a_network_that_does_not_depend_on_its_images_has_gradients_of_exactly_zero(batch):
    class Constant(nn.Module):
        def forward(self, images):
            return 0 * images.sum((1, 2, 3))[:, None] + torch.tensor([0.1, 0.3, 0.2, 0.0])

    attack = attacker(frozen(Constant()))
    for name in ("own", "difference"):
        assert (attack.input_gradient(batch, objective=name) == 0).all()
    assert torch.equal(fgsm(attack.input_gradient(batch), ball(batch.images, 0.3)), batch.images)


def test_an_objective_that_is_independent_of_the_images_is_an_error(batch):
    class Detached(nn.Module):
        def forward(self, images):
            return images.detach().flatten(1)[:, :4]

    with pytest.raises(RuntimeError, match="does not require grad"):
        attacker(frozen(Detached())).input_gradient(batch)


def test_starts_are_seeded_uniform_and_each_images_own():
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
        attack, broken = (
            attacker(cnn, settings=SETTINGS._replace(restarts=restarts, pgd_steps=2)),
            SmallestBreakingRadius(batch.labels),
        )
        for targets in (None, (batch.labels + 2) % 4):
            input_gradient = attack.input_gradient(batch, targets)
            successes = attack.successes(
                ["fgsm", "bim", "pgd"],
                batch,
                targets,
                radii(batch.images, epsilons),
                broken,
                input_gradient=input_gradient,
            )
            if targets is not None:
                continue
            after = successes
        left = broken.robust_at(epsilons)
        for rows in after.values():
            assert not (left & rows).any()
        for name in ("pgd own", "pgd difference"):
            assert (after[name][1:] >= after[name][:-1]).all()
            if before is not None:
                assert (after[name] >= before[name]).all()
        assert (left[1:] <= left[:-1]).all()
        before = after
    clean = classify(cnn, batch.images)
    assert all(torch.equal(rows[0], clean != batch.labels) for rows in after.values())


def test_pgd_is_the_same_in_batches_of_any_size(cnn, batch):
    attack, epsilons = attacker(cnn), [0.03, 0.06]

    def successes(subset):
        return attack.successes(
            ["pgd"],
            subset,
            None,
            radii(subset.images, epsilons),
            SmallestBreakingRadius(subset.labels),
            input_gradient=subset.images,
        )

    halves = [successes(batch.take(place)) for place in (slice(0, 13), slice(13, 40))]
    for name, rows in successes(batch).items():
        assert torch.equal(torch.cat([half[name] for half in halves], 1), rows)
        assert 0 < rows.float().mean() < 1


def test_an_image_is_robust_below_the_smallest_radius_that_broke_it():
    broken = SmallestBreakingRadius(torch.tensor([0, 1, 2]))
    broken.update(0, torch.tensor([0, 1, 0]))
    broken.update(0.3, torch.tensor([1, 1]), torch.tensor([True, True, False]))
    broken.update(0.1, torch.tensor([1]), torch.tensor([True, False, False]))
    broken.update(0.2, torch.tensor([0]), torch.tensor([True, False, False]))
    assert broken.robust_at([0, 0.05, 0.1, 0.5]).tolist() == [
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
    objective = attacker(cnn).objectives["own"](batch, targets)
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
    for their_attack, ours in pairs:
        raw, clipped, _ = their_attack(theirs, batch.images, criterion, epsilons=epsilon)
        for examples in (raw, clipped):
            torch.testing.assert_close(ours, examples, rtol=0, atol=2e-6)
