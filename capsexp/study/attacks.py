"""Accuracy of a network under adversarial attacks on its input images."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeGuard

from jaxtyping import Float, Int
from torch import Tensor

from capsexp.analysis.attack import examples
from capsexp.analysis.attack.attacker import Attacker, AttackSettings, SmallestBreakingRadius, classify
from capsexp.analysis.attack.figures import attacked_images, curve_figures
from capsexp.analysis.attack.objective import own_loss, score_margin
from capsexp.analysis.attack.results import Results
from capsexp.analysis.attack.units import Units, radii_of, scale_of
from capsexp.analysis.findings import Findings
from capsexp.analysis.trained_run import TrainedRun
from capsexp.capsules import Batch
from capsexp.errors import (
    UserError,
    is_number,
    refuse,
    require_at_least_1,
    require_literal,
    require_positive,
    require_seed,
)

Attack = Literal["fgsm", "bim", "pgd"]
Objective = Literal["own", "difference"]
NOTE = (
    "A loss is flat where its margin is met. There fgsm and bim change nothing, so their accuracy does not "
    "show robustness. worst: correct under every untargeted attack of this study of this radius or a smaller "
    "one; examples made on another network do not count."
)


class Attacks:
    """Accuracy under FGSM, BIM and PGD by the radius of the attack, and success of targeted attacks.

    Section 6 of Hinton et al., "Matrix capsules with EM routing" (ICLR 2018), figures 3 and B.3.
    Differs from it in: PGD, and the worst of the untargeted attacks, because of flat losses; pixels stay in
    [0, 1] with `clip`. The paper gives neither the unit of epsilon nor BIM's steps.

    As in the paper, the success of targeted attacks is the share of all images that are classified as the
    target, averaged over all classes, the label included: 1 / J without an attack. The same over wrong
    classes only is reported as well. Exactly zero gradients include those of pixels that no filter covers,
    such as the last ones where a stride does not divide the image.

    Args:
        attacks: away from the label: `fgsm`, `bim`, `pgd`.
        targeted: attacks toward each class in turn.
        epsilons, targeted_epsilons: radii, rising.
        units: of the radii: `input`, of the network, or `pixel`, of 0 ... 255.
        clip: keep pixels in [0, 1].
        steps: of BIM.
        objectives: of PGD: `own` loss, `difference` of two scores.
        pgd_steps, pgd_step_size: of PGD; the size in radii.
        restarts: random starts of PGD for each image, radius and objective; the worst counts.
        seed: of these starts.
        source: another run, whose adversarial examples are tested on this one.
        pictures, shown: how many images to show, under FGSM of which radii.
        paper: curves to draw beside these, and the `dataset` that they belong to; None for none.

    Raises:
        ValueError: an unknown attack or objective, radii that do not rise from 0 or more, a count below 1, a
            curve of the paper that is longer or shorter than its epsilons.
    """

    def __init__(
        self,
        *,
        attacks: Sequence[Attack],
        targeted: Sequence[Attack],
        epsilons: Sequence[int | float],
        targeted_epsilons: Sequence[int | float],
        units: Units,
        clip: bool,
        steps: int,
        objectives: Sequence[Objective],
        pgd_steps: int,
        pgd_step_size: int | float,
        restarts: int,
        seed: int,
        source: str | None,
        pictures: int,
        shown: Sequence[int | float],
        paper: Mapping[str, Any] | None,
    ) -> None:
        for attack in attacks:
            require_literal(Attack, attacks=attack)
        for attack in targeted:
            require_literal(Attack, targeted=attack)
        for objective in objectives:
            require_literal(Objective, objectives=objective)
        if not attacks:
            refuse("attacks must name at least one of fgsm, bim, pgd")
        if "pgd" in (*attacks, *targeted) and not objectives:
            refuse("objectives must name own, difference or both for pgd")
        _check_rising(epsilons=epsilons, targeted_epsilons=targeted_epsilons, shown=shown)
        require_at_least_1(steps=steps, pgd_steps=pgd_steps, restarts=restarts, pictures=pictures)
        require_positive(pgd_step_size=pgd_step_size)
        require_seed(seed=seed)
        if source is not None and not _transferable(attacks):
            refuse("source needs fgsm or bim among the attacks")
        _check_paper(paper or {})
        self.attacks, self.targeted = attacks, targeted
        self.epsilons, self.targeted_epsilons, self.shown = epsilons, targeted_epsilons, shown
        self.units, self.clip, self.source = units, clip, source
        self.settings = AttackSettings(steps, pgd_steps, pgd_step_size, restarts, objectives, seed)
        self.pictures, self.paper = pictures, paper

    def __call__(self, run: TrainedRun) -> Findings:
        """Measure accuracy and success by epsilon, and gradients at the clean images.

        Returns:
            The numbers, their curves, and a figure of attacked images.

        Raises:
            UserError: images of several classes, or a `source` that does not match.
        """
        run.require_single_label()
        attacker = self._attacker(run)
        source = None if self.source is None else self._attacker(_matching(run, self.source))
        results = Results()
        images: dict[int, examples.CleanImage] = {}
        for batch in run.batches(description="attacks"):
            predictions, gradient = classify(run.model, batch.images), attacker.input_gradient(batch)
            self._measure(run, attacker, source, batch, predictions, gradient, results)
            examples.pick(images, batch, predictions == batch.labels, gradient, count=self.pictures)
        numbers = self._numbers(run, results)
        figures = curve_figures(numbers, units=self.units)
        if images:  # otherwise the network classifies no image correctly
            attacked = [
                examples.attack_image(run.model, image, self.shown, units=self.units, clip=self.clip)
                for image in images.values()
            ]
            figures["attacks-pictures"] = attacked_images(
                attacked, self.shown, classes=run.classes, units=self.units, attack="FGSM"
            )
        return Findings(numbers, figures)

    def _attacker(self, run: TrainedRun) -> Attacker:
        own = own_loss(run.model, run.components.loss, run.step)
        objectives = {"own": own, "difference": score_margin(run.model)}
        return Attacker(run.model, objectives, self.settings)

    def _measure(
        self,
        run: TrainedRun,
        attacker: Attacker,
        source: Attacker | None,
        batch: Batch,
        predictions: Int[Tensor, " B"],
        gradient: Float[Tensor, "B C H W"],
        results: Results,
    ) -> None:
        """Add a batch to the results. Predictions and gradient are those of the clean images."""
        scale, broken = scale_of(batch), SmallestBreakingRadius(batch.labels)
        radii, targeted_radii = (
            radii_of(batch, scale, epsilons, units=self.units, clip=self.clip)
            for epsilons in (self.epsilons, self.targeted_epsilons)
        )
        broken.update(0, predictions)
        results.add_clean(predictions == batch.labels, scale, self.units)
        results.add_gradient("own", gradient)
        results.add_gradient("difference", attacker.input_gradient(batch, objective="difference"))
        results.add_untargeted(attacker, self.attacks, batch, radii, broken, gradient)
        if self.targeted:
            results.add_targeted(attacker, self.targeted, batch, targeted_radii, len(run.classes))
        if source is not None:
            results.add_transfer(source, attacker, _transferable(self.attacks), batch, radii)
        results.add_worst(broken, self.epsilons)

    def _numbers(self, run: TrainedRun, results: Results) -> dict[str, Any]:
        images = results.images
        clean, untargeted = results.clean.over(images), results.untargeted.over(images)
        factor = clean["in_other_units"] / clean["known"] if clean["known"] else None
        numbers: dict[str, Any] = {
            "pictures": images,
            "accuracy": clean["accuracy"],
            "largest_epsilon": self.epsilons[-1],
            **{f"accuracy_{attack.replace(' ', '_')}": values[-1] for attack, values in untargeted.items()},
            "pictures_without_scale": round((1 - clean["known"]) * images),
            "chance": 1 / len(run.classes),
            "note": NOTE,
            "gradients": {name: means.over(images) for name, means in results.gradients.items()},
            "untargeted": {"epsilons": self._in_both_units(self.epsilons, factor), **untargeted},
            "paper": self._paper_or_reason(run),
        }
        if self.targeted:
            numbers["targeted"] = {
                "epsilons": self._in_both_units(self.targeted_epsilons, factor),
                **results.targeted.over(images),
                "wrong_classes": results.wrong_classes.over(images),
            }
        if self.source is not None:
            numbers["transfer"] = {
                "source": self.source,
                "epsilons": self._in_both_units(self.epsilons, factor),
                **results.transfer.over(images),
            }
        return numbers

    def _in_both_units(self, epsilons: Sequence[int | float], factor: float | None) -> dict[str, Any]:
        """Return the epsilons, and the same in the other units, as the mean over the images."""
        converted = None if factor is None else [epsilon * factor for epsilon in epsilons]
        return {self.units: list(epsilons), "pixel" if self.units == "input" else "input": converted}

    def _paper_or_reason(self, run: TrainedRun) -> dict[str, Any] | str | None:
        """Return the paper's curves if they are comparable, otherwise the reason."""
        if self.paper is None:
            return None
        if run.dataset.name != self.paper["dataset"] or run.dataset.preprocess.standardise is None:
            return f"left out: it is on {self.paper['dataset']}, standardized"
        if self.units != "input":
            return "left out: its unit is most likely that of the network's input"
        return dict(self.paper)


def _transferable(attacks: Sequence[str]) -> list[str]:
    return [attack for attack in attacks if attack != "pgd"]


def _matching(run: TrainedRun, path: str) -> TrainedRun:
    """Load the run that examples are made on, if its network takes the same images."""
    source = run.other_run(path)
    mine, theirs = run.dataset, source.dataset
    for property_name, here, there in (
        ("image shape", mine.image_shape, theirs.image_shape),
        ("image shape before a crop", mine.raw_shape, theirs.raw_shape),
        ("standardise", mine.preprocess.standardise, theirs.preprocess.standardise),
        ("number of classes", len(mine.classes), len(theirs.classes)),
        ("classes", ", ".join(mine.classes), ", ".join(theirs.classes)),
    ):
        if here != there:
            raise UserError(f"study.source: its {property_name} must be {here}, as here, got {there}")
    return source


def _check_rising(**lists: Sequence[int | float]) -> None:
    for name, epsilons in lists.items():
        rising = all(epsilon < following for epsilon, following in pairwise(epsilons))
        if not epsilons or epsilons[0] < 0 or not rising:
            refuse(f"{name} must rise from 0 or more, got {list(epsilons)}")


def _check_paper(paper: Mapping[str, Any]) -> None:
    if paper and not isinstance(paper.get("dataset"), str):
        refuse(f"paper.dataset must be the name of a dataset, got {paper.get('dataset')!r}")
    for kind in sorted(paper.keys() - {"dataset"}):
        curves = paper[kind]
        epsilons = curves.get("epsilons") if isinstance(curves, Mapping) else None
        if not _are_numbers(epsilons):
            refuse(f"paper.{kind} must have epsilons, a list of numbers, got {curves!r}")
            continue
        for network in sorted(curves.keys() - {"epsilons"}):
            if not isinstance(curves[network], Mapping):
                refuse(f"paper.{kind}.{network} must have a list for each attack, got {curves[network]!r}")
                continue
            for attack, values in curves[network].items():
                if not _are_numbers(values) or len(values) != len(epsilons):
                    refuse(
                        f"paper.{kind}.{network}.{attack} must have a number for each of its "
                        f"{len(epsilons)} epsilons, got {values!r}"
                    )


def _are_numbers(values: Any) -> TypeGuard[list[int | float]]:
    return isinstance(values, list) and bool(values) and all(map(is_number, values))
