"""The table of trials: runs with toys held out, which have a validation error and no test."""

from page_parts import NONE, table

from results_page.groups import Group, training
from results_page.store import Data, Record

FOLD = "dataset.validation_instance="
"""Begins the override that names the toys that are held out."""
Trial = dict[str, list[Record]]
"""Runs by the toys that they hold out; several seeds share an entry."""


def trials(data: Data) -> str:
    """Return the last error on held-out toys of each recipe and settings, by toy; the best mean first."""
    found: dict[tuple[str, tuple[str, ...]], Trial] = {}
    for run in data["runs"]:
        fold = _fold(run)
        if run["kept"] and run["curve"] and not run["tests"] and fold is not None:
            rest = tuple(sorted(text for text in run["overrides"] if not text.startswith(FOLD)))
            found.setdefault((run["recipe"], rest), {}).setdefault(fold, []).append(run)
    if not found:
        return "No run yet.\n"
    folds = sorted({fold for trial in found.values() for fold in trial})
    shared = set.intersection(*(set(rest) for _, rest in found))
    lines = [
        _line(recipe, [text for text in rest if text not in shared], trial, folds)
        for (recipe, rest), trial in sorted(found.items(), key=lambda item: _mean(item[1]))
    ]
    titles = ("recipe", "settings", "training", *(f"toy {fold}, %" for fold in folds), "mean, %")
    common = f"In all rows: `{' '.join(sorted(shared))}`.\n" if shared else ""
    return "\n".join([table(titles, lines), common])


def _fold(run: Record) -> str | None:
    return next((text.removeprefix(FOLD) for text in run["overrides"] if text.startswith(FOLD)), None)


def _error(runs: list[Record]) -> float:
    """Return the error of the last validation round, the mean over seeds."""
    return sum(run["curve"][-1][2] for run in runs) / len(runs)


def _mean(trial: Trial) -> float:
    return sum(map(_error, trial.values())) / len(trial)


def _line(recipe: str, settings: list[str], trial: Trial, folds: list[str]) -> list[str]:
    runs = [run for same in trial.values() for run in same]
    errors = [f"{_error(trial[fold]):.1f}" if fold in trial else NONE for fold in folds]
    changed = f"`{' '.join(settings)}`" if settings else NONE
    work = training(Group(tuple(runs), tuple(range(len(runs)))))
    return [f"`{recipe}`", changed, work, *errors, f"{_mean(trial):.1f}"]
