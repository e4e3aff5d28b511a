"""Pictures above what the decoder makes of them, with failures chosen on purpose."""

from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from capsexp.analysis.findings import Findings, displayable
from capsexp.analysis.trained_run import TrainedRun


class Triple(NamedTuple):
    """A picture, and its reconstruction from the capsule of one class."""

    label: int
    prediction: int
    decoded: int
    picture: Float[Tensor, "C H W"]
    reconstruction: Float[Tensor, "C H W"]


class Reconstructions:
    """(label, prediction, reconstruction) as in figure 3 of Sabour et al., "Dynamic routing" (NIPS 2017).

    Differs from it in: which pictures are shown is not left to taste, but the first ones of the test part.

    Args:
        correct: pictures that are classified right, of different classes as far as possible.
        wrong: pictures that are classified wrong; each is decoded from its label and from the prediction.

    Raises:
        ValueError: a number below 0, or nothing to show.
    """

    def __init__(self, *, correct: int, wrong: int) -> None:
        if correct < 0 or wrong < 0 or correct + wrong == 0:
            raise ValueError(f"correct and wrong must be >= 0 and not both 0, got {correct} and {wrong}")
        self.correct, self.wrong = correct, wrong

    def __call__(self, subject: TrainedRun) -> Findings:
        """The figure, and over all pictures that were read the error and the squared error per pixel."""
        subject.require_single_label()
        decoder = subject.decoder()
        right: list[Triple] = []
        spare: list[Triple] = []
        failures: list[Triple] = []
        mistakes = pictures = 0
        squared = 0.0
        for batch, output in subject.outputs():
            poses, predictions = output.layers["class_caps"].poses, output.scores.argmax(1)
            from_label = decoder(poses, batch.labels)
            from_prediction = decoder(poses, predictions)
            squared += (from_label - batch.pixels).square().flatten(1).mean(1).sum().item()
            pictures += len(batch.labels)
            for place, (label, guess) in enumerate(
                zip(batch.labels.tolist(), predictions.tolist(), strict=True)
            ):
                mistakes += label != guess
                triple = Triple(label, guess, label, batch.pixels[place].cpu(), from_label[place].cpu())
                if label != guess and len(failures) < 2 * self.wrong:
                    other = triple._replace(decoded=guess, reconstruction=from_prediction[place].cpu())
                    failures += [triple, other]
                elif label == guess and len(right) < self.correct:
                    new = label not in {one.label for one in right}
                    (right if new else spare).append(triple)
                    spare = spare[: self.correct]
        right += spare[: self.correct - len(right)]
        numbers = {
            "pictures": pictures,
            "error": mistakes / pictures,
            "squared_error": squared / pictures,
            "shown": [[one.label, one.prediction, one.decoded] for one in right + failures],
        }
        return Findings(numbers, {"reconstructions": _drawn(right, failures)})


def _drawn(right: list[Triple], failures: list[Triple]) -> Any:
    from matplotlib.figure import Figure

    shown = right + failures
    figure = Figure(figsize=(1.1 * len(shown), 2.6), layout="constrained")
    for column, one in enumerate(shown):
        for row, picture in enumerate((one.picture, one.reconstruction)):
            plot = figure.add_subplot(2, len(shown), row * len(shown) + column + 1)
            plot.imshow(displayable(picture), cmap="gray", vmin=0, vmax=1)
            plot.set_xticks([])
            plot.set_yticks([])
            if row == 0:
                colour = "black" if one.label == one.prediction else "tab:red"
                plot.set_title(f"({one.label}, {one.prediction}, {one.decoded})", fontsize=8, color=colour)
    figure.supxlabel("(label, prediction, class decoded)", fontsize=8)
    return figure
