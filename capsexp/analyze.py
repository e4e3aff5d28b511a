"""`capsexp analyze`: a study of a trained run, and where its figures and numbers go.

figures/NAME.png      each figure, which `capsexp report` shows
studies/STUDY.json    the numbers, with the settings that they were made under
tb/                   both, at the step of the weights
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from capsexp.build import Parts
from capsexp.capsules import Batch, Output
from capsexp.errors import UserError
from capsexp.evaluate import inference, load_model
from capsexp.files import make_folder, write_whole
from capsexp.run_dir import RunDir


class Findings(NamedTuple):
    """What a study comes to."""

    numbers: dict[str, Any]
    """Plain values; those that are numbers also become scalars."""
    figures: dict[str, Any]
    """Figures of matplotlib by name."""


class Subject:
    """A trained network, and pictures to study it on, one batch at a time.

    Args:
        model: in evaluation mode.
        parts: of the run.
        limit: pictures of the test part at most; None for all.
    """

    def __init__(self, model: nn.Module, parts: Parts, *, limit: int | None) -> None:
        if limit is not None and limit < 1:
            raise UserError(f"limit: must be an integer >= 1 or null, got {limit}")
        self.model, self.limit = model, limit
        self.classes = parts.dataset.classes
        self._parts = parts

    def outputs(self) -> Iterator[tuple[Batch, Output]]:
        """The test pictures in order, and what the network makes of them, below a progress bar."""
        split = self._parts.dataset.read("test")
        if self.limit is not None:
            split = split.take(torch.arange(min(self.limit, split.size)))
        batches = self._parts.batches(split, limit=None)
        with inference(self.model):
            for batch in track(batches.in_order(), "pictures", total=len(batches), transient=True):
                yield batch, self.model(batch.images, batch.labels)

    def decoder(self) -> Callable[[Float[Tensor, "B J D"], Tensor], Float[Tensor, "B C H W"]]:
        """The network's decoder.

        Raises:
            UserError: it has none.
        """
        decoder = getattr(self.model, "decoder", None)
        if decoder is None:
            raise UserError("this run has no decoder, so there are no reconstructions to study")
        return decoder


def analyze(
    study: Callable[[Subject], Findings], name: str, parts: Parts, config: Mapping[str, Any]
) -> Findings:
    """Make a study of a run and write down what it comes to.

    Args:
        study: the study.
        name: as in `study=NAME`.
        parts: of the run.
        config: the plain config: `run`, `weights`, `limit`, `study`.
    """
    run = RunDir(Path(config["run"]))
    model, step = load_model(parts, run.path, weights=str(config["weights"]))
    findings = study(Subject(model, parts, limit=config["limit"]))
    make_folder(run.figures)
    for title, figure in findings.figures.items():
        file = run.figures / f"{title}.png"
        write_whole(file, functools.partial(figure.savefig, format="png", dpi=130))
        print(file)
    make_folder(run.path / "studies")
    told = {"study": config["study"], "step": step.number, "limit": config["limit"], **findings.numbers}
    file = run.path / "studies" / f"{name}.json"
    write_whole(file, lambda opened: opened.write(json.dumps(told, indent=1).encode()))
    _to_tensorboard(run.path / "tb", name, findings, step.number)
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
