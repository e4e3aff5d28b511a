"""Inside the routing: distances of the votes, changes of the couplings, and the parent of each child."""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from capsexp.analysis.findings import Findings
from capsexp.analysis.routing import figures as routing_figures
from capsexp.analysis.routing.figures import Example
from capsexp.analysis.routing.trace import (
    TracedLayer,
    excess,
    own_iterations,
    routed_layers,
    shares_and_means,
    trace_layer,
    trace_metrics,
    vote_distances,
)
from capsexp.analysis.trained_run import TrainedRun
from capsexp.capsules import Batch, Capsules, Output
from capsexp.errors import (
    UserError,
    require_at_least_1,
    require_at_most,
    require_literal,
    require_positive,
)
from capsexp.ops.receptive_fields import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Distance = Literal["l2", "squared"]
MOST_ITERATIONS = 1000
MOST_BINS = 10_000


class Routing:
    """Distances of votes from their means, changes and entropies of the couplings, and maps of the couplings.

    Figures 2 and B.2 of Hinton, Sabour, Frosst, "Matrix capsules with EM routing" (ICLR 2018); figure A.1 of
    Sabour, Frosst, Hinton, "Dynamic routing between capsules" (NIPS 2017). In a parse tree each child chooses
    one parent; Mitterreiter et al. (AAAI 2023) dispute that, and the entropy of the couplings measures it.
    Differs from them in: the means of dynamic routing, which are those of the votes by coupling, since v_j is
    squashed; and figure A.1 only at the end of training.

    Args:
        iterations: to trace, of a routing that can run more than its own number.
        pictures: how many images to show: the first correctly classified ones, of different classes; and
            in addition the first misclassified one.
        layer: whose couplings to trace, by name; None for all routed layers.
        bins: of a histogram.
        near: end of the histogram of the small distances.
        distance: "l2" or "squared".

    Raises:
        ValueError: a number below 1, near <= 0, no such distance.
    """

    def __init__(
        self,
        *,
        iterations: int,
        pictures: int,
        layer: str | None,
        bins: int,
        near: int | float,
        distance: Distance,
    ) -> None:
        require_at_least_1(iterations=iterations, pictures=pictures, bins=bins)
        require_at_most(MOST_ITERATIONS, iterations=iterations)
        require_at_most(MOST_BINS, bins=bins)
        require_literal(Distance, distance=distance)
        require_positive(near=near)
        self.iterations, self.pictures, self.layer = iterations, pictures, layer
        self.bins, self.near, self.squared = bins, near, distance == "squared"

    def __call__(self, run: TrainedRun) -> Findings:
        """Return curves by layer over all images; histograms and maps of a few."""
        run.require_single_label()
        curves: dict[str, dict[str, Tensor]] = {}
        own: dict[str, int] = {}
        vote_sums: dict[str, Tensor] = {}
        examples: list[Example] = []
        count = 0
        for batch, output in run.outputs():
            layers = routed_layers(run.model, output.layers)
            for layer in self._selected(layers):
                own[layer.name] = own_iterations(layer.routing)
                sums = curves.setdefault(layer.name, {})
                for trace in trace_layer(layer, iterations=self.iterations):
                    _add(sums, trace_metrics(layer.routing, trace), len(trace.votes))
            self._add_votes(vote_sums, layers[-1], batch, output)
            for place in self._places_to_show(examples, batch, output):
                examples.append(self._example(place, layers[-1], _grid(run.model), batch, output))
            count += len(batch.labels)
        layer_numbers = {
            name: {"iterations": own[name], **{key: (total / count).tolist() for key, total in sums.items()}}
            for name, sums in curves.items()
        }
        numbers = {
            "pictures": count,
            **{
                f"entropy/{name}": sums["entropy"][own[name] - 1].item() / count
                for name, sums in curves.items()
            },
            "layers": layer_numbers,
            "class_capsules": {key: (total / count).tolist() for key, total in vote_sums.items()},
            "shown": [_example_numbers(example) for example in examples],
        }
        return Findings(numbers, self._figures(run, layer_numbers, examples))

    def _selected(self, layers: list[TracedLayer]) -> list[TracedLayer]:
        names = [layer.name for layer in layers]
        if self.layer is not None and self.layer not in names:
            raise UserError(f"study.layer: must be null or one of {', '.join(names)}, got {self.layer}")
        return [layer for layer in layers if self.layer in (None, layer.name)]

    def _add_votes(self, sums: dict[str, Tensor], top: TracedLayer, batch: Batch, output: Output) -> None:
        """Add each iteration's shares of coupling and vote distances of the class capsules."""
        start, all_predictions = 0, output.scores.argmax(1)
        for votes, states in trace_layer(top, iterations=None):
            chunk = slice(start, start + len(votes))
            start += len(votes)
            images = torch.arange(len(votes), device=votes.device)
            labels, predictions = batch.labels[chunk], all_predictions[chunk]
            rows: dict[str, list[float]] = {}
            for state in states:
                distances = vote_distances(top.routing, votes, state, squared=self.squared)
                shares, means = shares_and_means(state.coupling, distances)
                for name, values in {
                    "share_of_label": shares[images, labels],
                    "share_of_prediction": shares[images, predictions],
                    "distance_from_label": means[images, labels],
                    "distance_from_all": (means * shares).sum(1),
                }.items():
                    rows.setdefault(name, []).append(values.mean().item())
            _add(sums, rows, len(votes))

    def _places_to_show(self, examples: list[Example], batch: Batch, output: Output) -> list[int]:
        """Return the places in the batch of images to show beside the examples so far."""
        correct = {example.label for example in examples if example.label == example.prediction}
        has_wrong = len(examples) > len(correct)
        places = []
        pairs = zip(batch.labels.tolist(), output.scores.argmax(1).tolist(), strict=True)
        for place, (label, prediction) in enumerate(pairs):
            if label != prediction and not has_wrong:
                has_wrong = True
                places.append(place)
            elif label == prediction and label not in correct and len(correct) < self.pictures:
                correct.add(label)
                places.append(place)
        return places

    def _example(self, place: int, top: TracedLayer, grid: Grid, batch: Batch, output: Output) -> Example:
        children = Capsules(*(tensor[place : place + 1] for tensor in top.children))
        ((votes, states),) = trace_layer(top._replace(children=children), iterations=None)
        distances = [vote_distances(top.routing, votes, state, squared=self.squared) for state in states]
        maps = [excess(state, children.activations, grid.positions) for state in states]
        return Example(
            number=int(batch.indices[place]),
            label=int(batch.labels[place]),
            prediction=int(output.scores[place].argmax()),
            image=batch.pixels[place].cpu(),
            distances=torch.cat(distances).cpu(),
            coupling=torch.cat([state.coupling for state in states]).cpu(),
            excess=torch.cat(maps).cpu(),
        )

    def _figures(
        self, run: TrainedRun, layers: dict[str, dict[str, Any]], examples: list[Example]
    ) -> dict[str, "Figure"]:
        figures = {
            "routing-entropy": routing_figures.entropies(layers),
            "routing-change": routing_figures.changes(layers),
        }
        for example in examples:
            figures[f"routing-votes-{example.number}"] = routing_figures.histograms(
                example, run.classes, bins=self.bins, near=self.near, squared=self.squared
            )
            figures[f"routing-parents-{example.number}"] = routing_figures.parents(
                example, _grid(run.model), run.classes
            )
        return figures


def _grid(model: nn.Module) -> Grid:
    grid = getattr(model, "grid", None)
    if not isinstance(grid, Grid):
        raise UserError("this network has no `grid`, so its capsules cannot be mapped to image positions")
    return grid


def _add(sums: dict[str, Tensor], means: dict[str, list[float]], images: int) -> None:
    for name, values in means.items():
        total = images * torch.tensor(values, dtype=torch.float64)
        sums[name] = total + sums[name] if name in sums else total


def _example_numbers(example: Example) -> dict[str, Any]:
    """Return, by iteration and class, the share of all coupling, and the mean distance weighted by it."""
    shares, means = shares_and_means(example.coupling, example.distances)
    return {
        "picture": example.number,
        "label": example.label,
        "prediction": example.prediction,
        "share": shares.tolist(),
        "distance": means.tolist(),
    }
