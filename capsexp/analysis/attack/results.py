"""The measurements of `study=attacks`: means over the images of all batches."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from capsexp.analysis.attack.attacker import Attacker, SmallestBreakingRadius, classify
from capsexp.analysis.attack.means import Means
from capsexp.analysis.attack.units import Radii, Scale, Units
from capsexp.capsules import Batch


class Results:
    """Means over all images.

    Attributes:
        images: their number.
        clean: `accuracy`; `known`: whether the scale is; `in_other_units`: of an epsilon of 1.
        gradients: by objective, statistics of its gradients at the clean images.
        untargeted: accuracy by attack, in rows of epsilons; `worst` is that under all of them, and under
            nothing else: neither targeted attacks nor examples made on another network.
        targeted: share of images classified as the target by attack, in rows of epsilons.
        wrong_classes: the same for wrong targets only.
        transfer: accuracy by "ATTACK on NETWORK", in rows of epsilons.
    """

    def __init__(self) -> None:
        self.images = 0
        self.clean = Means()
        self.gradients: dict[str, Means] = {}
        self.untargeted, self.targeted, self.wrong_classes, self.transfer = (Means() for _ in range(4))

    def add_clean(self, correct: Bool[Tensor, " B"], scale: Scale, units: Units) -> None:
        """Count images, those classified correctly, and their scale.

        Args:
            correct: whether the network classifies each image correctly.
            scale: of the images.
            units: of the epsilons.
        """
        self.images += len(correct)
        self.clean.add("accuracy", correct)
        self.clean.add("known", scale.known)
        other: Units = "pixel" if units == "input" else "input"
        self.clean.add("in_other_units", scale.epsilon(1, units=units, to=other).nan_to_num(0))

    def add_gradient(self, objective: str, input_gradient: Float[Tensor, "B C H W"]) -> None:
        """Add the gradient of an objective at the clean images."""
        means, values = self.gradients.setdefault(objective, Means()), input_gradient.flatten(1)
        means.add("share_exactly_zero", (values == 0).float().mean(1))
        means.add("pictures_without_gradient", (values == 0).all(1))
        means.add("mean_size", values.abs().mean(1))

    def add_untargeted(
        self,
        attacker: Attacker,
        attacks: Sequence[str],
        batch: Batch,
        radii: Radii,
        broken: SmallestBreakingRadius,
        input_gradient: Float[Tensor, "B C H W"],
    ) -> None:
        """Attack the images away from their labels."""
        successes = attacker.successes(attacks, batch, None, radii, broken, input_gradient=input_gradient)
        for attack, rows in successes.items():
            self.untargeted.add(attack, ~rows)

    def add_targeted(
        self,
        attacker: Attacker,
        attacks: Sequence[str],
        batch: Batch,
        radii: Radii,
        classes: int,
    ) -> None:
        """Attack the images toward each class."""
        broken = SmallestBreakingRadius(batch.labels)  # not that of the untargeted attacks
        for target in range(classes):
            targets = torch.full_like(batch.labels, target)
            gradient = attacker.input_gradient(batch, targets)
            successes = attacker.successes(attacks, batch, targets, radii, broken, input_gradient=gradient)
            for attack, rows in successes.items():
                self.targeted.add(attack, rows, factor=1 / classes)
                wrong = rows & (batch.labels != target)
                self.wrong_classes.add(attack, wrong, factor=1 / (classes - 1))

    def add_transfer(
        self,
        source: Attacker,
        attacker: Attacker,
        attacks: Sequence[str],
        batch: Batch,
        radii: Radii,
    ) -> None:
        """Attack the source's network by FGSM or BIM, and classify the examples by both networks."""
        gradient = source.input_gradient(batch)
        for attack in attacks:
            on_run, on_source = [], []
            for ball in radii.balls:
                images = source.examples(attack, batch, None, ball, gradient)
                predictions: Int[Tensor, " B"] = classify(attacker.model, images)
                on_run.append(predictions == batch.labels)
                on_source.append(classify(source.model, images) == batch.labels)
            self.transfer.add(f"{attack} on run", torch.stack(on_run))
            self.transfer.add(f"{attack} on source", torch.stack(on_source))

    def add_worst(self, broken: SmallestBreakingRadius, epsilons: Sequence[int | float]) -> None:
        """Add the images that no untargeted attack of a radius or a smaller one has broken."""
        self.untargeted.add("worst", broken.robust_at(epsilons))
