"""Inside the routing: where the votes lie, what the couplings become, which parents take which children."""

from typing import Any

import torch
from torch import Tensor, nn

from capsexp.analysis.findings import Findings
from capsexp.analysis.routing import figures as routing_figures
from capsexp.analysis.routing.figures import Shown
from capsexp.analysis.routing.trace import (
    RoutedLayer,
    excess,
    measured,
    own_iterations,
    routed_layers,
    shares_and_means,
    traced,
    vote_distances,
)
from capsexp.analysis.trained_run import TrainedRun
from capsexp.capsules import Batch, Capsules, Output
from capsexp.errors import UserError, require_at_least_1, require_one_of
from capsexp.ops.receptive_fields import Grid

DISTANCES = ("l2", "squared")


class Routing:
    """Votes about their means, changes and entropies of the couplings, and the choices of the children.

    Figures 2 and B.2 of Hinton, Sabour, Frosst, "Matrix capsules with EM routing" (ICLR 2018); figure A.1 of
    Sabour, Frosst, Hinton, "Dynamic routing between capsules" (NIPS 2017). That children decide, as a parse
    tree would have it, is what Mitterreiter et al. (AAAI 2023) dispute, and what the entropy tells.
    Differs from them in: the means of dynamic routing, which are those of the votes by coupling, since v_j is
    squashed; and figure A.1 at the end of training alone.

    Args:
        iterations: passes that are followed, of a routing that can go on beyond its own number.
        pictures: how many are shown, the first ones of different classes that are classified right; the first
            one that is classified wrong comes on top.
        layer: whose couplings are followed, by name; None is all that route.
        bins: of a histogram.
        near: end of the histogram of the votes near the mean.
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
        distance: str,
    ) -> None:
        require_at_least_1(iterations=iterations, pictures=pictures, bins=bins)
        require_one_of(DISTANCES, distance=distance)
        if near <= 0:
            raise ValueError(f"near must be > 0, got {near}")
        self.iterations, self.pictures, self.layer = iterations, pictures, layer
        self.bins, self.near, self.squared = bins, near, distance == "squared"

    def __call__(self, subject: TrainedRun) -> Findings:
        """Curves by layer over all pictures; histograms and maps of a few."""
        subject.require_single_label()
        curves: dict[str, dict[str, Tensor]] = {}
        own: dict[str, int] = {}
        votes: dict[str, Tensor] = {}
        shown: list[Shown] = []
        count = 0
        for batch, output in subject.outputs():
            layers = routed_layers(subject.model, output.layers)
            for name, layer, children in self._followed(layers):
                own[name] = own_iterations(layer)
                for piece in traced(layer, children, iterations=self.iterations):
                    _add(curves.setdefault(name, {}), measured(layer, piece), len(piece.votes))
            self._add_votes(votes, layers[-1], batch, output)
            for place in self._wanted(shown, batch, output):
                shown.append(self._shown(place, layers[-1], _grid(subject.model), batch, output))
            count += len(batch.labels)
        told = {
            name: {"iterations": own[name], **{key: (one / count).tolist() for key, one in sums.items()}}
            for name, sums in curves.items()
        }
        numbers = {
            "pictures": count,
            **{f"entropy/{name}": curves[name]["entropy"][own[name] - 1].item() / count for name in told},
            "layers": told,
            "class_capsules": {key: (one / count).tolist() for key, one in votes.items()},
            "shown": [_told(one) for one in shown],
        }
        return Findings(numbers, self._figures(subject, told, shown))

    def _followed(self, layers: list[RoutedLayer]) -> list[RoutedLayer]:
        names = [one.name for one in layers]
        if self.layer is not None and self.layer not in names:
            raise UserError(f"study.layer: must be null or one of {', '.join(names)}, got {self.layer}")
        return [one for one in layers if self.layer in (None, one.name)]

    def _add_votes(self, sums: dict[str, Tensor], top: RoutedLayer, batch: Batch, output: Output) -> None:
        """Add what the class capsules of these pictures get, and from how far, in each iteration."""
        truths, guesses = batch.labels, output.scores.argmax(1)
        for votes, states in traced(top.layer, top.children, iterations=None):
            pictures = torch.arange(len(votes), device=votes.device)
            labels, truths = truths[: len(votes)], truths[len(votes) :]
            predictions, guesses = guesses[: len(votes)], guesses[len(votes) :]
            rows: dict[str, list[float]] = {}
            for state in states:
                distances = vote_distances(top.layer, votes, state, squared=self.squared)
                shares, means = shares_and_means(state.coupling, distances)
                for name, value in {
                    "share_of_label": shares[pictures, labels],
                    "share_of_prediction": shares[pictures, predictions],
                    "distance_from_label": means[pictures, labels],
                    "distance_from_all": (means * shares).sum(1),
                }.items():
                    rows.setdefault(name, []).append(value.mean().item())
            _add(sums, rows, len(votes))

    def _wanted(self, shown: list[Shown], batch: Batch, output: Output) -> list[int]:
        """Places in the batch of pictures that are still to be shown."""
        right = {one.label for one in shown if one.label == one.prediction}
        wrong = len(shown) > len(right)
        wanted = []
        pairs = zip(batch.labels.tolist(), output.scores.argmax(1).tolist(), strict=True)
        for place, (label, prediction) in enumerate(pairs):
            if label != prediction and not wrong:
                wrong = True
                wanted.append(place)
            elif label == prediction and label not in right and len(right) < self.pictures:
                right.add(label)
                wanted.append(place)
        return wanted

    def _shown(self, place: int, top: RoutedLayer, grid: Grid, batch: Batch, output: Output) -> Shown:
        children = Capsules(*(tensor[place : place + 1] for tensor in top.children))
        ((votes, states),) = traced(top.layer, children, iterations=None)
        distances = [vote_distances(top.layer, votes, one, squared=self.squared) for one in states]
        maps = [excess(one, children.activations, grid.positions) for one in states]
        return Shown(
            number=int(batch.indices[place]),
            label=int(batch.labels[place]),
            prediction=int(output.scores[place].argmax()),
            picture=batch.pixels[place].cpu(),
            distances=torch.cat(distances).cpu(),
            coupling=torch.cat([one.coupling for one in states]).cpu(),
            excess=torch.cat(maps).cpu(),
        )

    def _figures(
        self, subject: TrainedRun, told: dict[str, dict[str, Any]], shown: list[Shown]
    ) -> dict[str, Any]:
        figures = {
            "routing-entropy": routing_figures.entropies(told),
            "routing-change": routing_figures.changes(told),
        }
        for one in shown:
            figures[f"routing-votes-{one.number}"] = routing_figures.histograms(
                one, subject.classes, bins=self.bins, near=self.near, squared=self.squared
            )
            figures[f"routing-parents-{one.number}"] = routing_figures.parents(
                one, _grid(subject.model), subject.classes
            )
        return figures


def _grid(model: nn.Module) -> Grid:
    grid = getattr(model, "grid", None)
    if not isinstance(grid, Grid):
        raise UserError("this network has no `grid`, so nobody knows where the children of its classes look")
    return grid


def _add(sums: dict[str, Tensor], means: dict[str, list[float]], pictures: int) -> None:
    for name, values in means.items():
        here = pictures * torch.tensor(values, dtype=torch.float64)
        sums[name] = here + sums[name] if name in sums else here


def _told(one: Shown) -> dict[str, Any]:
    """By iteration and class: the share of all assignment, and the mean distance under it."""
    shares, means = shares_and_means(one.coupling, one.distances)
    return {
        "picture": one.number,
        "label": one.label,
        "prediction": one.prediction,
        "share": shares.tolist(),
        "distance": means.tolist(),
    }
