"""Attacks with several radii on one batch, and the smallest radius that breaks each image."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from capsexp.analysis.attack.methods import Ball, bim, fgsm, gradient, pgd, starts
from capsexp.analysis.attack.objective import ObjectiveFactory
from capsexp.analysis.attack.units import Radii
from capsexp.capsules import Batch
from capsexp.training.evaluate import inference


class AttackSettings(NamedTuple):
    """Settings of the iterative attacks; see `capsexp.study.attacks.Attacks`."""

    steps: int
    pgd_steps: int
    pgd_step_size: int | float
    restarts: int
    objectives: Sequence[str]
    seed: int


class SmallestBreakingRadius:
    """For each image of a batch, the smallest radius at which some attack made the network misclassify it.

    A ball lies within the larger ones, so an example from it counts for them, too. The radius is 0 for an
    image that is misclassified without an attack, and infinite for one that no attack has broken.
    """

    def __init__(self, labels: Int[Tensor, " B"]) -> None:
        self._labels = labels
        self._radius = torch.full(labels.shape, torch.inf, device=labels.device)

    def update(
        self, epsilon: int | float, predictions: Int[Tensor, " M"], mask: Bool[Tensor, " B"] | None = None
    ) -> None:
        """Take into account the predictions for examples within a radius.

        Args:
            epsilon: the radius.
            predictions: for the images of the mask.
            mask: the images that were attacked; None for all.
        """
        mask = torch.ones_like(self._labels, dtype=torch.bool) if mask is None else mask
        wrong = predictions != self._labels[mask]
        before = self._radius[mask]
        self._radius[mask] = torch.where(wrong, before.clamp_max(epsilon), before)

    def robust_at(self, epsilons: Sequence[int | float]) -> Bool[Tensor, "E B"]:
        """Return, for each radius, the images that no attack of that radius or a smaller one has broken."""
        # float32, as the stored radii.
        radii = torch.tensor([float(epsilon) for epsilon in epsilons], device=self._labels.device)
        return self._radius > radii[:, None]


def classify(model: nn.Module, images: Float[Tensor, "B C H W"]) -> Int[Tensor, " B"]:
    """Return the class with the highest score."""
    with inference(model):
        classes: Tensor = model(images).scores.argmax(1)
    return classes


class Attacker:
    """Attacks on one network.

    Args:
        model: the network.
        objectives: by name; FGSM and BIM take `own`.
        settings: of the iterative attacks.
    """

    def __init__(
        self, model: nn.Module, objectives: Mapping[str, ObjectiveFactory], settings: AttackSettings
    ) -> None:
        self.model, self.objectives, self.settings = model, objectives, settings

    def input_gradient(
        self, batch: Batch, targets: Int[Tensor, " B"] | None = None, *, objective: str = "own"
    ) -> Float[Tensor, "B C H W"]:
        """Return the gradient of an objective at the clean images."""
        return gradient(self.objectives[objective](batch, targets), batch.images)

    def examples(
        self,
        attack: str,
        batch: Batch,
        targets: Int[Tensor, " B"] | None,
        ball: Ball,
        input_gradient: Float[Tensor, "B C H W"],
    ) -> Float[Tensor, "B C H W"]:
        """Return the adversarial images of `fgsm` or `bim`; `fgsm` takes the gradient at the clean images."""
        if attack == "fgsm":
            return fgsm(input_gradient, ball)
        return bim(self.objectives["own"](batch, targets), ball, steps=self.settings.steps)

    def successes(
        self,
        attacks: Sequence[str],
        batch: Batch,
        targets: Int[Tensor, " B"] | None,
        radii: Radii,
        broken: SmallestBreakingRadius,
        *,
        input_gradient: Float[Tensor, "B C H W"],
    ) -> dict[str, Bool[Tensor, "E B"]]:
        """Return, by attack and radius, the images classified as their target or, without targets, wrongly.

        Args:
            attacks: `fgsm`, `bim`, `pgd`; the last has an entry for each of its objectives.
            batch: the images.
            targets: the target classes; None: any but the label.
            radii: of the attacks.
            broken: updated with every example.
            input_gradient: of the own objective at the clean images.
        """
        results = {}
        for attack in attacks:
            if attack == "pgd":
                for name in self.settings.objectives:
                    results[f"pgd {name}"] = self._pgd_successes(name, batch, targets, radii, broken)
                continue
            rows = []
            for epsilon, ball in zip(*radii, strict=True):
                images = self.examples(attack, batch, targets, ball, input_gradient)
                predictions = classify(self.model, images)
                broken.update(epsilon, predictions)
                rows.append(_is_success(predictions, batch.labels, targets))
            results[attack] = torch.stack(rows)
        return results

    def _pgd_successes(
        self,
        objective: str,
        batch: Batch,
        targets: Int[Tensor, " B"] | None,
        radii: Radii,
        broken: SmallestBreakingRadius,
    ) -> Bool[Tensor, "E B"]:
        """Attack each image until it succeeds once; a success counts for the larger balls, too."""
        restarts, seed = self.settings.restarts, self.settings.seed
        noise = [starts(batch.indices, batch.images, seed=seed, restart=number) for number in range(restarts)]
        predictions = classify(self.model, batch.images)
        success = _is_success(predictions, batch.labels, targets)
        broken.update(0, predictions)
        rows = []
        for epsilon, ball in zip(*radii, strict=True):
            for start in noise if epsilon > 0 else ():
                left = ~success
                if not left.any():
                    break
                remaining = batch.take(left)
                remaining_targets = None if targets is None else targets[left]
                images = pgd(
                    self.objectives[objective](remaining, remaining_targets),
                    ball.select(left),
                    noise=start[left],
                    steps=self.settings.pgd_steps,
                    step_size=self.settings.pgd_step_size,
                )
                predictions = classify(self.model, images)
                broken.update(epsilon, predictions, left)
                success[left] = _is_success(predictions, remaining.labels, remaining_targets)
            rows.append(success.clone())
        return torch.stack(rows)


def _is_success(
    predictions: Int[Tensor, " B"], labels: Int[Tensor, " B"], targets: Int[Tensor, " B"] | None
) -> Bool[Tensor, " B"]:
    return predictions != labels if targets is None else predictions == targets
