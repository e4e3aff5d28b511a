"""Attacks of several sizes on one batch, and which pictures withstand them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from capsexp.analysis.attack.methods import Ball, bim, fgsm, gradient, pgd, starts
from capsexp.analysis.attack.objective import Aim
from capsexp.capsules import Batch
from capsexp.training.evaluate import inference


class Sizes(NamedTuple):
    """The radii of a sweep, smallest first, and for each the balls around the pictures of a batch."""

    epsilons: Sequence[int | float]
    balls: Sequence[Ball]


class Plan(NamedTuple):
    """How the iterative attacks go about it; see `capsexp.study.attacks.Attacks`."""

    steps: int
    pgd_steps: int
    pgd_step_size: int | float
    restarts: int
    objectives: Sequence[str]
    seed: int


class Withstood:
    """For each picture of a batch the smallest radius at which any attack made it be classified wrong.

    A ball lies within the larger ones, so an example from it counts for them too. A picture that is wrong as
    it stands has 0; one that withstood everything, infinity.
    """

    def __init__(self, labels: Int[Tensor, " B"]) -> None:
        self._labels = labels
        self._broken_at = torch.full(labels.shape, torch.inf, device=labels.device)

    def see(
        self, epsilon: int | float, predictions: Int[Tensor, " M"], chosen: Bool[Tensor, " B"] | None = None
    ) -> None:
        """Take into account what the chosen pictures (None: all), attacked within a radius, are taken for."""
        chosen = torch.ones_like(self._labels, dtype=torch.bool) if chosen is None else chosen
        wrong = predictions != self._labels[chosen]
        before = self._broken_at[chosen]
        self._broken_at[chosen] = torch.where(wrong, before.clamp_max(epsilon), before)

    def within(self, epsilons: Sequence[int | float]) -> Bool[Tensor, "E B"]:
        """The pictures that withstood every attack of each radius or a smaller one."""
        # As float32, which is what the radii were put down in.
        radii = torch.tensor([float(epsilon) for epsilon in epsilons], device=self._labels.device)
        return self._broken_at > radii[:, None]


def predicted(model: nn.Module, images: Float[Tensor, "B C H W"]) -> Int[Tensor, " B"]:
    """The class with the highest score."""
    with inference(model):
        classes: Tensor = model(images).scores.argmax(1)
    return classes


class Attacker:
    """Attacks on one network.

    Args:
        model: the network.
        aims: objectives by name, of which FGSM and BIM take `own`.
        plan: of the iterative attacks.
    """

    def __init__(self, model: nn.Module, aims: Mapping[str, Aim], plan: Plan) -> None:
        self.model, self.aims, self.plan = model, aims, plan

    def slope(
        self, batch: Batch, targets: Int[Tensor, " B"] | None = None, *, objective: str = "own"
    ) -> Float[Tensor, "B C H W"]:
        """Gradient of an objective at the pictures as they are."""
        return gradient(self.aims[objective](batch, targets), batch.images)

    def examples(
        self,
        attack: str,
        batch: Batch,
        targets: Int[Tensor, " B"] | None,
        ball: Ball,
        slope: Float[Tensor, "B C H W"],
    ) -> Float[Tensor, "B C H W"]:
        """What `fgsm`, from the `slope` at the pictures, or `bim` makes of them."""
        if attack == "fgsm":
            return fgsm(slope, ball)
        return bim(self.aims["own"](batch, targets), ball, steps=self.plan.steps)

    def won(
        self,
        attacks: Sequence[str],
        batch: Batch,
        targets: Int[Tensor, " B"] | None,
        sizes: Sizes,
        withstood: Withstood,
        *,
        slope: Float[Tensor, "B C H W"],
    ) -> dict[str, Bool[Tensor, "E B"]]:
        """For each attack and radius the pictures taken for the class aimed at, or else for a wrong one.

        Args:
            attacks: `fgsm`, `bim`, `pgd`; the last has an entry for each of its objectives.
            batch: the pictures.
            targets: the classes aimed at; None: any but the right one.
            sizes: the radii.
            withstood: told of every example.
            slope: of the own objective.
        """
        found = {}
        for attack in attacks:
            if attack == "pgd":
                for name in self.plan.objectives:
                    found[f"pgd {name}"] = self._won_by_pgd(name, batch, targets, sizes, withstood)
                continue
            rows = []
            for epsilon, ball in zip(*sizes, strict=True):
                predictions = predicted(self.model, self.examples(attack, batch, targets, ball, slope))
                withstood.see(epsilon, predictions)
                rows.append(_hit(predictions, batch.labels, targets))
            found[attack] = torch.stack(rows)
        return found

    def _won_by_pgd(
        self,
        objective: str,
        batch: Batch,
        targets: Int[Tensor, " B"] | None,
        sizes: Sizes,
        withstood: Withstood,
    ) -> Bool[Tensor, "E B"]:
        """A picture that is won stays so in the larger balls, and is attacked no more."""
        plan = self.plan
        noise = [starts(batch.indices, batch.images, seed=plan.seed, restart=r) for r in range(plan.restarts)]
        predictions = predicted(self.model, batch.images)
        won = _hit(predictions, batch.labels, targets)
        withstood.see(0, predictions)
        rows = []
        for epsilon, ball in zip(*sizes, strict=True):
            for start in noise if epsilon > 0 else ():
                left = ~won
                if not left.any():
                    break
                part = Batch(*(one[left] for one in batch))
                aims = None if targets is None else targets[left]
                images = pgd(
                    self.aims[objective](part, aims),
                    ball.of(left),
                    noise=start[left],
                    steps=plan.pgd_steps,
                    step_size=plan.pgd_step_size,
                )
                predictions = predicted(self.model, images)
                withstood.see(epsilon, predictions, left)
                won[left] = _hit(predictions, part.labels, aims)
            rows.append(won.clone())
        return torch.stack(rows)


def _hit(
    predictions: Int[Tensor, " B"], labels: Int[Tensor, " B"], targets: Int[Tensor, " B"] | None
) -> Bool[Tensor, " B"]:
    return predictions != labels if targets is None else predictions == targets
