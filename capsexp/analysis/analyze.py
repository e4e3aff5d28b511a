"""`capsexp analyze`: a study of a trained run, and where its figures and numbers go.

figures/NAME.png      each figure, which `capsexp report` shows
studies/STUDY.json    the numbers, with the settings that they were made under
tb/                   both, at the step of the weights
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from capsexp.analysis.findings import Findings
from capsexp.analysis.trained_run import TrainedRun, load_model
from capsexp.config.components import Components
from capsexp.files import make_folder, write_atomic
from capsexp.training.run_dir import RunDir


def analyze(
    study: Callable[[TrainedRun], Findings],
    name: str,
    components: Components,
    settings: Mapping[str, Any],
    *,
    plugins: Sequence[str] = (),
) -> Findings:
    """Make a study of a run and write down what it comes to.

    Args:
        study: the study.
        name: as in `study=NAME`.
        components: of the run.
        settings: the plain config: `run`, `weights`, `limit`, `study`.
        plugins: see `capsexp.config.build.build_components`.
    """
    run, limit = RunDir(Path(settings["run"])), settings["limit"]
    model, step = load_model(components, run.path, weights=str(settings["weights"]))
    findings = study(TrainedRun(model, components, path=run.path, step=step, limit=limit, plugins=plugins))
    make_folder(run.figures)
    for title, figure in findings.figures.items():
        file = run.figures / f"{title}.png"
        write_atomic(file, functools.partial(figure.savefig, format="png", dpi=130))
        print(file)
    make_folder(run.path / "studies")
    remarks = components.dataset.caveats()
    told = {"study": settings["study"], "step": step.number, "limit": limit, "remarks": remarks}
    told |= findings.numbers
    file = run.path / "studies" / f"{name}.json"
    write_atomic(file, lambda opened: opened.write(json.dumps(told, indent=1).encode()))
    _to_tensorboard(run.path / "tb", name, findings, step.number)
    for remark in remarks:
        print(remark)
    if findings.table is not None:
        Console().print(findings.table)
    scalars = _scalars(findings.numbers).items()
    print("  ".join([str(file), *(f"{key} {value:.4g}" for key, value in scalars)]))
    return findings


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
