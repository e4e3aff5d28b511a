"""Images and their reconstructions, misclassified ones included."""

from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Float
from torch import Tensor

from capsexp.analysis.findings import Findings, as_matplotlib
from capsexp.analysis.trained_run import TrainedRun
from capsexp.errors import refuse

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Triple(NamedTuple):
    """An image, and its reconstruction from the capsule of one class."""

    label: int
    prediction: int
    decoded: int
    image: Float[Tensor, "C H W"]
    reconstruction: Float[Tensor, "C H W"]


class Reconstructions:
    """(label, prediction, reconstruction) as in figure 3 of Sabour et al., "Dynamic routing" (NIPS 2017).

    Differs from it in: the images are not hand-picked, but the first ones of the test split.

    Args:
        correct: correctly classified images, of different classes as far as possible.
        wrong: misclassified images; each is decoded from its label and from the prediction.

    Raises:
        ValueError: a number below 0, or nothing to show.
    """

    def __init__(self, *, correct: int, wrong: int) -> None:
        if correct < 0 or wrong < 0 or correct + wrong == 0:
            refuse(f"correct and wrong must be >= 0 and not both 0, got {correct} and {wrong}")
        self.correct, self.wrong = correct, wrong

    def __call__(self, run: TrainedRun) -> Findings:
        """Return the figure, and the error and the squared error per pixel over all images."""
        run.require_single_label()
        decoder = run.decoder()
        correct: list[Triple] = []
        spare: list[Triple] = []  # correct ones of classes that are shown already
        failures: list[Triple] = []
        mistakes = images = 0
        squared = 0.0
        for batch, output in run.outputs():
            poses, predictions = output.layers["class_caps"].poses, output.scores.argmax(1)
            from_label = decoder(poses, batch.labels)
            from_prediction = decoder(poses, predictions)
            squared += (from_label - batch.pixels).square().flatten(1).mean(1).sum().item()
            images += len(batch.labels)
            for place, (label, prediction) in enumerate(
                zip(batch.labels.tolist(), predictions.tolist(), strict=True)
            ):
                mistakes += label != prediction
                triple = Triple(label, prediction, label, batch.pixels[place].cpu(), from_label[place].cpu())
                if label != prediction and len(failures) < 2 * self.wrong:
                    other = triple._replace(decoded=prediction, reconstruction=from_prediction[place].cpu())
                    failures += [triple, other]
                elif label == prediction and len(correct) < self.correct:
                    is_new = label not in {shown.label for shown in correct}
                    (correct if is_new else spare).append(triple)
                    spare = spare[: self.correct]
        correct += spare[: self.correct - len(correct)]
        triples = correct + failures
        numbers = {
            "pictures": images,
            "error": mistakes / images,
            "squared_error": squared / images,
            "shown": [[triple.label, triple.prediction, triple.decoded] for triple in triples],
        }
        return Findings(numbers, {"reconstructions": _figure(triples)})


def _figure(triples: list[Triple]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.1 * len(triples), 2.6), layout="constrained")
    for column, triple in enumerate(triples):
        for row, image in enumerate((triple.image, triple.reconstruction)):
            plot = figure.add_subplot(2, len(triples), row * len(triples) + column + 1)
            plot.imshow(as_matplotlib(image), cmap="gray", vmin=0, vmax=1)
            plot.set_xticks([])
            plot.set_yticks([])
            if row == 0:
                color = "black" if triple.label == triple.prediction else "tab:red"
                title = f"({triple.label}, {triple.prediction}, {triple.decoded})"
                plot.set_title(title, fontsize=8, color=color)
    figure.supxlabel("(label, prediction, decoded class)", fontsize=8)
    return figure
