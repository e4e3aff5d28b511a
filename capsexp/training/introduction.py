"""The first lines of a run: its data and its network."""

from collections.abc import Mapping, Sequence

from capsexp.config.components import Components
from capsexp.data.dataset import Dataset
from capsexp.data.preprocess import Shape
from capsexp.text import printable
from capsexp.training.costs import in_words
from capsexp.training.early_stop import caveats
from capsexp.training.running_statistics import describe_statistics
from capsexp.training.splits import Splits
from capsexp.training.state import State

SHOWN_CLASSES = 10
SHOWN_LETTERS = 20


def first_lines(
    components: Components, splits: Splits, state: State, costs: Mapping[str, int | None]
) -> list[str]:
    """Return the data, the network with what it costs, and what to keep in mind beside every metric."""
    network = describe_network(state, costs, epochs=components.trainer.max_epochs)
    data = describe_data(components.dataset, splits)
    statistics = describe_statistics(state.model, accumulate=components.trainer.accumulate)
    return [*data, network, *statistics, *components.caveats(), *caveats(splits.familiar)]


def describe_data(dataset: Dataset, splits: Splits) -> list[str]:
    """Return the classes, the number of images in each split, their shape, and how files are read."""
    images = f"images of {_format(dataset.image_shape)}"
    if dataset.file_shape != dataset.image_shape:
        images += f", {_format(dataset.file_shape)} on disk"
    first = f"{dataset.name}: {_list(dataset.classes)}; {images}; {_counts(splits)}"
    return [first, *dataset.notes()]


def describe_network(state: State, costs: Mapping[str, int | None], *, epochs: int | None) -> str:
    """Return the network, what it costs, and the step at which the run starts.

    Args:
        state: of the run.
        costs: parameters and multiplications.
        epochs: `trainer.max_epochs`.
    """
    products = costs["multiplications"]
    work = "" if products is None else f" and {in_words(products)} multiplications per image"
    budget = state.budget
    start = (
        f"resuming at {budget.describe_place(state.step, state.seconds)}"
        if state.step
        else budget.describe(epochs)
    )
    return f"{type(state.model).__name__} with {costs['parameters']:,} parameters{work}; {start}"


def _counts(splits: Splits) -> str:
    validation = 0 if splits.validation is None else splits.validation.count
    parts = [f"{splits.training.count:,} training", f"{validation:,} validation"]
    if splits.test_count is not None:
        parts.append(f"{splits.test_count:,} test")
    return f"{', '.join(parts[:-1])} and {parts[-1]} images"


def _list(classes: Sequence[str]) -> str:
    names = [printable(name) for name in classes[:SHOWN_CLASSES]]
    short = [name if len(name) <= SHOWN_LETTERS else f"{name[: SHOWN_LETTERS - 1]}…" for name in names]
    more = ", …" if len(classes) > SHOWN_CLASSES else ""
    return f"{len(classes)} classes ({', '.join(short)}{more})"


def _format(shape: Shape) -> str:
    return "x".join(map(str, shape))
