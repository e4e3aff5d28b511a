"""`capsexp analyze`: run a study of a trained network and write its results into the run directory.

figures/NAME.png      each figure; `capsexp report` shows them
studies/STUDY.json    the numbers, with the study's settings
tb/                   figures and numbers, at the step of the weights
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from capsexp.analysis.findings import Findings
from capsexp.analysis.trained_run import TrainedRun
from capsexp.config.components import Components
from capsexp.errors import is_number
from capsexp.files import own_folder, require_writable, write_atomic
from capsexp.terminal import new_console
from capsexp.text import printable, show_as_typed
from capsexp.training.events import EventFile
from capsexp.training.run_dir import RunDir

RESULT_FOLDERS = ("figures", "studies", "tb")


def analyze(
    study: Callable[[TrainedRun], Findings],
    name: str,
    components: Components,
    settings: Mapping[str, Any],
    *,
    plugins: Sequence[str] = (),
) -> Findings:
    """Run a study and write its results.

    Args:
        study: the study.
        name: as in `study=NAME`.
        components: of the run.
        settings: the plain config: `run`, `weights`, `limit`, `study`.
        plugins: see `capsexp.config.build.build_components`.

    Raises:
        UserError: the weights cannot be loaded; the study refuses the run.
        WriteError: the run directory cannot be written, or one of its folders is a link.
    """
    components.device.prepare()
    directory, limit = RunDir(Path(settings["run"])), settings["limit"]
    directory.require_own(*RESULT_FOLDERS)
    require_writable(directory.path)
    run = TrainedRun.restore(
        components,
        directory.path,
        weights=settings["weights"],
        config=dict(settings),
        limit=limit,
        plugins=plugins,
    )
    findings = study(run)
    _save_figures(directory.figures, findings)
    caveats = components.caveats()
    header = {"study": settings["study"], "step": run.step.number, "limit": limit, "remarks": caveats}
    file = _save_numbers(run.path / "studies", name, {**header, **findings.numbers})
    _to_tensorboard(run.path / "tb", name, findings, run.step.number)
    for caveat in caveats:
        print(printable(caveat))
    if findings.table is not None:
        new_console().print(findings.table)
    scalars = _scalars(findings.numbers).items()
    print(printable("  ".join([str(file), *(f"{key} {value:.4g}" for key, value in scalars)])))
    return findings


def _save_figures(folder: Path, findings: Findings) -> None:
    own_folder(folder)
    for title, figure in findings.figures.items():
        show_as_typed(figure)
        file = folder / f"{title}.png"
        write_atomic(file, functools.partial(figure.savefig, format="png", dpi=130))
        print(printable(file))


def _save_numbers(folder: Path, name: str, numbers: Mapping[str, Any]) -> Path:
    own_folder(folder)
    file = folder / f"{name}.json"
    write_atomic(file, lambda opened: opened.write(json.dumps(numbers, indent=1).encode()))
    return file


def _scalars(numbers: Mapping[str, Any]) -> dict[str, int | float]:
    return {key: value for key, value in numbers.items() if is_number(value) and math.isfinite(value)}


def _to_tensorboard(folder: Path, name: str, findings: Findings, step: int) -> None:
    # A new file, because those of the training are closed. Its name sorts after theirs.
    writer = EventFile(folder, suffix=f".{name}")
    for key, value in _scalars(findings.numbers).items():
        writer.add_scalar(f"{name}/{key}", value, step)
    for key, figure in findings.figures.items():
        writer.add_figure(f"{name}/{key}", figure, step)
    writer.close()
