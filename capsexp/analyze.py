"""`capsexp analyze`: a study of a trained run, and where its figures and numbers go.

figures/NAME.png      each figure, which `capsexp report` shows
studies/STUDY.json    the numbers, with the settings that they were made under
tb/                   both, at the step of the weights
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from rich import get_console
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from capsexp.capsules import Batch, Output
from capsexp.config.build import components
from capsexp.config.parts import Parts
from capsexp.config.saved import load_saved_config
from capsexp.data.batches import Batches
from capsexp.data.seeds import epoch_order
from capsexp.data.split import Split
from capsexp.errors import UserError
from capsexp.evaluate import inference, load_model
from capsexp.files import make_folder, write_whole
from capsexp.run_dir import RunDir
from capsexp.schedule import Step


class Findings(NamedTuple):
    """What a study comes to."""

    numbers: dict[str, Any]
    """Plain values; those that are numbers also become scalars."""
    figures: dict[str, Any]
    """Figures of matplotlib by name."""
    table: Table | None = None
    """To be printed."""


class Subject:
    """A trained network, and pictures to study it on, one batch at a time.

    Args:
        model: in evaluation mode.
        parts: of the run.
        path: of the run.
        step: that the weights are from.
        limit: pictures at most of any split; None for all.
        plugins: see `capsexp.config.build.components`.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Parts,
        *,
        path: Path,
        step: Step,
        limit: int | None,
        plugins: Sequence[str] = (),
    ) -> None:
        if limit is not None and limit < 1:
            raise UserError(f"limit: must be an integer >= 1 or null, got {limit}")
        self.model = model.requires_grad_(False)
        self.parts, self.path, self.step, self.limit = parts, path, step, limit
        self.classes: tuple[str, ...] = parts.dataset.classes
        self._plugins = plugins

    def another(self, run: str) -> "Subject":
        """The best weights of another run, on the same device and under the same limit.

        Raises:
            UserError: no such run, or it cannot be loaded.
        """
        parts = components(load_saved_config(Path(run)), plugins=self._plugins)._replace(
            device=self.parts.device
        )
        model, step = load_model(parts, Path(run), weights="best")
        return Subject(model, parts, path=Path(run), step=step, limit=self.limit, plugins=self._plugins)

    def batches(self, split: Split | None = None, *, what: str = "pictures") -> Iterator[Batch]:
        """A split in order, by default the test part, below a progress bar."""
        split = self.parts.dataset.read("test") if split is None else split
        batches = self.in_batches(split)
        # Without a terminal a bar would leave an empty line for each time the pictures are read.
        silent = not get_console().is_terminal
        yield from track(batches.in_order(), what, total=len(batches), transient=True, disable=silent)

    def in_batches(self, split: Split) -> Batches:
        """A split, or what the limit leaves of it, on the run's device."""
        batches: Batches = self.parts.batches(split, limit=None)
        return batches if self.limit is None else batches.only(self.chosen(batches.count))

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

    def single(self) -> None:
        """Refuse a run whose pictures show several classes; for a study that asks for the class of a picture.

        Raises:
            UserError: it is one.
        """
        dataset = self.parts.dataset
        if dataset.targets > 1:
            raise UserError(
                f"this study needs pictures of one class each; those of {dataset.name} have {dataset.targets}"
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


def analyze(
    study: Callable[[Subject], Findings],
    name: str,
    parts: Parts,
    settings: Mapping[str, Any],
    *,
    plugins: Sequence[str] = (),
) -> Findings:
    """Make a study of a run and write down what it comes to.

    Args:
        study: the study.
        name: as in `study=NAME`.
        parts: of the run.
        settings: the plain config: `run`, `weights`, `limit`, `study`.
        plugins: see `capsexp.config.build.components`.
    """
    run, limit = RunDir(Path(settings["run"])), settings["limit"]
    model, step = load_model(parts, run.path, weights=str(settings["weights"]))
    findings = study(Subject(model, parts, path=run.path, step=step, limit=limit, plugins=plugins))
    make_folder(run.figures)
    for title, figure in findings.figures.items():
        file = run.figures / f"{title}.png"
        write_whole(file, functools.partial(figure.savefig, format="png", dpi=130))
        print(file)
    make_folder(run.path / "studies")
    remarks = parts.dataset.remarks()
    told = {"study": settings["study"], "step": step.number, "limit": limit, "remarks": remarks}
    told |= findings.numbers
    file = run.path / "studies" / f"{name}.json"
    write_whole(file, lambda opened: opened.write(json.dumps(told, indent=1).encode()))
    _to_tensorboard(run.path / "tb", name, findings, step.number)
    for remark in remarks:
        print(remark)
    if findings.table is not None:
        Console().print(findings.table)
    scalars = _scalars(findings.numbers).items()
    print("  ".join([str(file), *(f"{key} {value:.4g}" for key, value in scalars)]))
    return findings


def visible(picture: Float[Tensor, "C H W"]) -> Any:
    """A picture as matplotlib takes it; of other channel counts than 1 and 3, such as stereo, the first."""
    shown = picture.detach().cpu().clamp(0, 1)
    return torch.movedim(shown, 0, 2).numpy() if len(shown) == 3 else shown[0].numpy()


def _scalars(numbers: Mapping[str, Any]) -> dict[str, int | float]:
    return {
        key: value
        for key, value in numbers.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _to_tensorboard(folder: Path, name: str, findings: Findings, step: int) -> None:
    # A file of its own: the run's are closed. Its name sorts behind them.
    writer = SummaryWriter(str(folder), filename_suffix=f".{name}")
    for key, value in _scalars(findings.numbers).items():
        writer.add_scalar(f"{name}/{key}", value, step)
    for key, figure in findings.figures.items():
        writer.add_figure(f"{name}/{key}", figure, step, close=False)
    writer.close()
