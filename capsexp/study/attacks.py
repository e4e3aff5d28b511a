"""What is left of a network's accuracy when its pictures are changed against it."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from capsexp.analysis.attack.attacker import Attacker, Plan, Sizes, Withstood, predicted
from capsexp.analysis.attack.figures import Shown, attacked_pictures, figures_of_curves
from capsexp.analysis.attack.methods import fgsm
from capsexp.analysis.attack.objective import difference, own_loss
from capsexp.analysis.attack.tally import Tally
from capsexp.analysis.attack.units import Scale, Units, as_pixels, ball_of, scale_of
from capsexp.analysis.findings import Findings
from capsexp.analysis.trained_run import TrainedRun
from capsexp.capsules import Batch
from capsexp.errors import UserError, require_at_least_1, require_one_of

ATTACKS = ("fgsm", "bim", "pgd")
OBJECTIVES = ("own", "difference")
NOTE = (
    "Where a loss is flat, as one with a margin is where the margin is kept, fgsm and bim do nothing: what "
    "they leave is no robustness. worst: right under every attack tried here, of this size or smaller."
)


class Attacks:
    """Accuracy under FGSM, BIM and PGD by the size of the attack, and success of attacks with an aim.

    Section 6 of Hinton et al., "Matrix capsules with EM routing" (ICLR 2018), figures 3 and B.3.
    Differs from it in: PGD, and the worst of all attacks, because of flat losses; pixels stay in [0, 1] with
    `clip`. The paper gives neither the unit of epsilon nor BIM's steps.

    As in the paper, the success of aimed attacks is the share of all pictures that are taken for the class
    aimed at, averaged over all classes, the right one included: 1 / J without an attack. What they come to
    for wrong classes only stands beside it. Exactly zero gradients count those of pixels that no filter sees,
    such as the last ones where a stride does not come out even.

    Args:
        attacks: away from the right class: `fgsm`, `bim`, `pgd`.
        targeted: towards each class in turn.
        epsilons, targeted_epsilons: radii, rising.
        units: of the radii: `input`, of the network, or `pixel`, of 0 ... 255.
        clip: keep pixels in [0, 1].
        steps: of BIM.
        objectives: of PGD: `own` loss, `difference` of two scores.
        pgd_steps, pgd_step_size: of PGD; the size in radii.
        restarts: starts of PGD for each picture, radius and objective; the worst counts.
        seed: of these starts.
        source: another run, whose examples are to be withstood.
        pictures, shown: how many pictures to show, under FGSM of which sizes.
        paper: curves to be drawn beside these, and the `dataset` that they belong to; None for none.

    Raises:
        ValueError: no such attack or objective, radii that do not rise from 0 or more, a count below 1, a
            curve of the paper that is longer or shorter than its epsilons.
    """

    def __init__(
        self,
        *,
        attacks: Sequence[str],
        targeted: Sequence[str],
        epsilons: Sequence[int | float],
        targeted_epsilons: Sequence[int | float],
        units: Units,
        clip: bool,
        steps: int,
        objectives: Sequence[str],
        pgd_steps: int,
        pgd_step_size: int | float,
        restarts: int,
        seed: int,
        source: str | None,
        pictures: int,
        shown: Sequence[int | float],
        paper: Mapping[str, Any] | None,
    ) -> None:
        for one in attacks:
            require_one_of(ATTACKS, attacks=one)
        for one in targeted:
            require_one_of(ATTACKS, targeted=one)
        for one in objectives:
            require_one_of(OBJECTIVES, objectives=one)
        if not attacks:
            raise ValueError("attacks must name at least one of fgsm, bim, pgd")
        if "pgd" in (*attacks, *targeted) and not objectives:
            raise ValueError("objectives must name own, difference or both for pgd")
        _check_rising(epsilons=epsilons, targeted_epsilons=targeted_epsilons, shown=shown)
        require_at_least_1(steps=steps, pgd_steps=pgd_steps, restarts=restarts, pictures=pictures)
        if not pgd_step_size > 0:
            raise ValueError(f"pgd_step_size must be > 0, got {pgd_step_size}")
        if source is not None and not _transferable(attacks):
            raise ValueError("source needs fgsm or bim among the attacks")
        _check_paper(paper or {})
        self.attacks, self.targeted = attacks, targeted
        self.epsilons, self.targeted_epsilons, self.shown = epsilons, targeted_epsilons, shown
        self.units, self.clip, self.source = units, clip, source
        self.plan = Plan(steps, pgd_steps, pgd_step_size, restarts, objectives, seed)
        self.pictures, self.paper = pictures, paper

    def __call__(self, subject: TrainedRun) -> Findings:
        """Accuracy and success by epsilon, gradients at the pictures as they are; curves and pictures.

        Raises:
            UserError: pictures of several classes, or a `source` that does not match.
        """
        subject.require_single_label()
        attacker = self._attacker(subject)
        source = None if self.source is None else self._attacker(_matching(subject, self.source))
        tally = Tally(counted="accuracy")
        picked: dict[int, tuple[Batch, Tensor]] = {}
        for batch in subject.batches(description="attacks"):
            scale, slope, withstood = scale_of(batch), attacker.slope(batch), Withstood(batch.labels)
            clean = predicted(attacker.model, batch.images)
            withstood.see(0, clean)
            self._as_they_are(attacker, batch, clean == batch.labels, slope, scale, tally)
            self._pick(batch, clean == batch.labels, slope, picked)
            sizes = self._sizes(batch, scale, self.epsilons)
            won = attacker.won(self.attacks, batch, None, sizes, withstood, slope=slope)
            for attack, rows in won.items():
                tally.add(f"untargeted/{attack}", ~rows)
            if self.targeted:
                self._aim(attacker, batch, scale, withstood, tally, len(subject.classes))
            if source is not None:
                self._transfer(source, attacker, batch, sizes, withstood, tally)
            tally.add("untargeted/worst", withstood.within(self.epsilons))
        numbers = self._numbers(subject, tally)
        figures = figures_of_curves(numbers, units=self.units)
        if picked:  # else the network is right about nothing
            shown = [self._attacked(attacker, *one) for one in picked.values()]
            figures["attacks-pictures"] = attacked_pictures(
                shown, self.shown, classes=subject.classes, units=self.units, attack="FGSM"
            )
        return Findings(numbers, figures)

    def _attacker(self, subject: TrainedRun) -> Attacker:
        model = subject.model
        own = own_loss(model, subject.components.loss, subject.step)
        return Attacker(model, {"own": own, "difference": difference(model)}, self.plan)

    def _sizes(self, batch: Batch, scale: Scale, epsilons: Sequence[int | float]) -> Sizes:
        balls = [ball_of(batch, scale, epsilon, units=self.units, clip=self.clip) for epsilon in epsilons]
        return Sizes(epsilons, balls)

    def _as_they_are(
        self,
        attacker: Attacker,
        batch: Batch,
        right: Bool[Tensor, " B"],
        slope: Float[Tensor, "B C H W"],
        scale: Scale,
        tally: Tally,
    ) -> None:
        """What is told about the pictures without an attack."""
        tally.add("accuracy", right)
        for name, found in (("own", slope), ("difference", attacker.slope(batch, objective="difference"))):
            numbers = found.flatten(1)
            tally.add(f"gradients/{name}/share_exactly_zero", (numbers == 0).float().mean(1))
            tally.add(f"gradients/{name}/pictures_without_gradient", (numbers == 0).all(1))
            tally.add(f"gradients/{name}/mean_size", numbers.abs().mean(1))
        tally.add("known", scale.known)
        tally.add("in_other_units", scale.epsilon(1, given=self.units, wanted=self._other()).nan_to_num(0))

    def _pick(
        self, batch: Batch, right: Bool[Tensor, " B"], slope: Tensor, picked: dict[int, tuple[Batch, Tensor]]
    ) -> None:
        """Take pictures to be shown."""
        for place in right.nonzero().flatten().tolist():
            if len(picked) < self.pictures:
                one = Batch(*(field[place : place + 1] for field in batch))
                picked.setdefault(int(one.labels), (one, slope[place : place + 1]))

    def _aim(
        self, attacker: Attacker, batch: Batch, scale: Scale, withstood: Withstood, tally: Tally, classes: int
    ) -> None:
        """Attacks towards each class."""
        sizes = self._sizes(batch, scale, self.targeted_epsilons)
        for target in range(classes):
            targets = torch.full_like(batch.labels, target)
            slope = attacker.slope(batch, targets)
            reached = attacker.won(self.targeted, batch, targets, sizes, withstood, slope=slope)
            for attack, rows in reached.items():
                tally.add(f"targeted/{attack}", rows, factor=1 / classes)
                wrong = rows & (batch.labels != target)
                tally.add(f"wrong/{attack}", wrong, factor=1 / (classes - 1))

    def _transfer(
        self,
        source: Attacker,
        attacker: Attacker,
        batch: Batch,
        sizes: Sizes,
        withstood: Withstood,
        tally: Tally,
    ) -> None:
        """Examples made on one network, tested on both."""
        slope = source.slope(batch)
        for attack in _transferable(self.attacks):
            rows: dict[str, list[Tensor]] = {"run": [], "source": []}
            for epsilon, ball in zip(*sizes, strict=True):
                images = source.examples(attack, batch, None, ball, slope)
                predictions = predicted(attacker.model, images)
                withstood.see(epsilon, predictions)
                rows["run"].append(predictions == batch.labels)
                rows["source"].append(predicted(source.model, images) == batch.labels)
            for name, right in rows.items():
                tally.add(f"transfer/{attack} on {name}", torch.stack(right))

    def _attacked(self, attacker: Attacker, one: Batch, slope: Tensor) -> Shown:
        scale = scale_of(one)
        balls = self._sizes(one, scale, self.shown).balls
        images = torch.cat([one.images, *(fgsm(slope, ball) for ball in balls)])
        scales = Scale(*(field.expand(len(images)) for field in scale))
        classes = predicted(attacker.model, images).tolist()
        return Shown(int(one.labels), classes, as_pixels(images, scales))

    def _other(self) -> Units:
        return "pixel" if self.units == "input" else "input"

    def _numbers(self, subject: TrainedRun, tally: Tally) -> dict[str, Any]:
        known, pictures = tally.mean("known"), tally.pictures
        factor = tally.mean("in_other_units") / known if known else None
        untargeted, targeted = tally.means("untargeted"), tally.means("targeted")
        numbers: dict[str, Any] = {
            "pictures": pictures,
            "accuracy": tally.mean("accuracy"),
            "largest_epsilon": self.epsilons[-1],
            **{f"accuracy_{attack.replace(' ', '_')}": line[-1] for attack, line in untargeted.items()},
            "pictures_without_scale": round((1 - known) * pictures),
            "chance": 1 / len(subject.classes),
            "note": NOTE,
            "gradients": {name: tally.means(f"gradients/{name}") for name in OBJECTIVES},
            "untargeted": {"epsilons": self._in_both(self.epsilons, factor), **untargeted},
            "paper": self._papers(subject),
        }
        if self.targeted:
            epsilons = self._in_both(self.targeted_epsilons, factor)
            numbers["targeted"] = {"epsilons": epsilons, **targeted, "wrong_classes": tally.means("wrong")}
        if self.source is not None:
            epsilons = self._in_both(self.epsilons, factor)
            numbers["transfer"] = {"source": self.source, "epsilons": epsilons, **tally.means("transfer")}
        return numbers

    def _in_both(self, epsilons: Sequence[int | float], factor: float | None) -> dict[str, Any]:
        """The epsilons, and what they come to in the other units, as the mean over the pictures."""
        other = None if factor is None else [epsilon * factor for epsilon in epsilons]
        return {self.units: list(epsilons), self._other(): other}

    def _papers(self, subject: TrainedRun) -> Any:
        if self.paper is None:
            return None
        dataset = subject.components.dataset
        if dataset.name != self.paper["dataset"] or dataset.preprocess.standardise is None:
            return f"left out: it is on {self.paper['dataset']}, standardised"
        if self.units != "input":
            return "left out: its unit is most likely that of the network's input"
        return dict(self.paper)


def _transferable(attacks: Sequence[str]) -> list[str]:
    return [attack for attack in attacks if attack != "pgd"]


def _matching(subject: TrainedRun, run: str) -> TrainedRun:
    """The run that examples come from, if its network takes the same pictures."""
    source = subject.other_run(run)
    mine, theirs = subject.components.dataset, source.components.dataset
    for what, here, there in (
        ("picture shape", mine.image_shape, theirs.image_shape),
        ("picture shape before a crop", mine.raw_shape, theirs.raw_shape),
        ("standardise", mine.preprocess.standardise, theirs.preprocess.standardise),
        ("number of classes", len(mine.classes), len(theirs.classes)),
        ("classes", ", ".join(mine.classes), ", ".join(theirs.classes)),
    ):
        if here != there:
            raise UserError(f"study.source: its {what} must be {here}, as here, got {there}")
    return source


def _check_rising(**lists: Sequence[int | float]) -> None:
    for name, epsilons in lists.items():
        rising = all(one < following for one, following in pairwise(epsilons))
        if not epsilons or epsilons[0] < 0 or not rising:
            raise ValueError(f"{name} must rise from 0 or more, got {list(epsilons)}")


def _check_paper(paper: Mapping[str, Any]) -> None:
    for part in paper.keys() - {"dataset"}:
        for network in paper[part].keys() - {"epsilons"}:
            for attack, line in paper[part][network].items():
                if len(line) != len(paper[part]["epsilons"]):
                    raise ValueError(
                        f"paper.{part}.{network}.{attack} must have a number for each of its "
                        f"{len(paper[part]['epsilons'])} epsilons, got {len(line)}"
                    )
