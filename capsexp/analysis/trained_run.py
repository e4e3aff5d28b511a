"""A trained network with everything that its run directory says about it."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxtyping import Float, Int64
from rich import get_console
from rich.progress import track
from torch import Tensor, nn

from capsexp.capsules import Batch, Output
from capsexp.config.build import build_components
from capsexp.config.components import Components
from capsexp.config.saved import load_saved_config
from capsexp.data.batches import Batches
from capsexp.data.seeds import epoch_order
from capsexp.data.split import Split
from capsexp.errors import UserError
from capsexp.schedule import Step
from capsexp.training import checkpoint
from capsexp.training.evaluate import inference
from capsexp.training.state import trained_weights


def load_model(components: Components, path: Path, *, weights: str) -> tuple[nn.Module, Step]:
    """A trained network on its device, and the step that its weights are from.

    Args:
        components: what `capsexp.config.build.build_components` returned.
        path: the run directory.
        weights: `best`, `last`, or the number of a step.

    Raises:
        UserError: no such checkpoint, a damaged one, or one of another network.
    """
    components.device.prepare()
    folder = path / "checkpoints"
    name = checkpoint.name_of(int(weights)) if weights.isdigit() else f"{weights}.pt"
    saved = checkpoint.load(folder / name)
    model = components.new_model()
    try:
        model.load_state_dict(trained_weights(saved))
    except RuntimeError as error:
        raise UserError(f"the weights in {path} are of another network: {_first_lines(error)}") from None
    return components.device.place(model).eval(), Step(saved["step"], saved["step"])


def _first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:3])


class TrainedRun:
    """A trained network, and pictures to study it on, one batch at a time.

    Args:
        model: in evaluation mode.
        components: of the run.
        path: of the run.
        step: that the weights are from.
        limit: pictures at most of any split; None for all.
        plugins: see `capsexp.config.build.build_components`.
    """

    def __init__(
        self,
        model: nn.Module,
        components: Components,
        *,
        path: Path,
        step: Step,
        limit: int | None,
        plugins: Sequence[str] = (),
    ) -> None:
        if limit is not None and limit < 1:
            raise UserError(f"limit: must be an integer >= 1 or null, got {limit}")
        self.model = model.requires_grad_(False)
        self.components, self.path, self.step, self.limit = components, path, step, limit
        self.classes: tuple[str, ...] = components.dataset.classes
        self._plugins = plugins

    def other_run(self, run: str) -> "TrainedRun":
        """The best weights of another run, on the same device and under the same limit.

        Raises:
            UserError: no such run, or it cannot be loaded.
        """
        components = build_components(load_saved_config(Path(run)), plugins=self._plugins)._replace(
            device=self.components.device
        )
        model, step = load_model(components, Path(run), weights="best")
        return TrainedRun(
            model, components, path=Path(run), step=step, limit=self.limit, plugins=self._plugins
        )

    def batches(self, split: Split | None = None, *, what: str = "pictures") -> Iterator[Batch]:
        """A split in order, by default the test part, below a progress bar."""
        split = self.components.dataset.read("test") if split is None else split
        batches = self.in_batches(split)
        # Without a terminal a bar would leave an empty line for each time the pictures are read.
        silent = not get_console().is_terminal
        yield from track(batches.in_order(), what, total=len(batches), transient=True, disable=silent)

    def in_batches(self, split: Split) -> Batches:
        """A split, or what the limit leaves of it, on the run's device."""
        batches: Batches = self.components.batches(split, limit=None)
        return batches if self.limit is None else batches.subset(self.chosen(batches.count))

    def chosen(self, size: int) -> Int64[Tensor, " N"]:
        """Which pictures of a split of this size the limit leaves, in their order; the same for every run."""
        # By chance, because the first ones may be alike: smallNORB begins with one toy of each class.
        order = epoch_order(size, seed=0, epoch=0)
        return order[: self.limit].sort().values

    def outputs(
        self, split: Split | None = None, *, what: str = "pictures"
    ) -> Iterator[tuple[Batch, Output]]:
        """The same, with what the network makes of them."""
        for batch in self.batches(split, what=what):
            with inference(self.model):
                output = self.model(batch.images, batch.labels)
            yield batch, output

    def require_single_label(self) -> None:
        """Refuse a run whose pictures show several classes; for a study that asks for the class of a picture.

        Raises:
            UserError: it is one.
        """
        dataset = self.components.dataset
        if dataset.labels_per_image > 1:
            raise UserError(
                f"this study needs pictures of one class each; those of {dataset.name} have "
                f"{dataset.labels_per_image}"
            )

    def decoder(self) -> Callable[[Float[Tensor, "B J D"], Tensor], Float[Tensor, "B *T C H W"]]:
        """The network's decoder.

        Raises:
            UserError: it has none.
        """
        decoder = getattr(self.model, "decoder", None)
        if decoder is None:
            raise UserError("this run has no decoder, so there are no reconstructions to study")
        return decoder
