"""Write the tables and the figure of docs/results.md from docs/results/runs.json; add finished runs to that.

    python docs/make_results_page.py add RUN… [--row NAME] [--cpu MODEL]  # add or replace records of runs
    python docs/make_results_page.py            # write the generated parts and the figure again
    python docs/make_results_page.py --check    # exit code 1 if a page does not equal the data
    python docs/make_results_page.py readme     # print the table of README.md

--row names the headline row beside which the runs stand; by default that of their recipe. --cpu names the
processor of runs whose env.json lacks it. A run with the same recipe, settings and seed is replaced.
Every number of the generated parts comes from runs.json.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from page_parts import markers, replace_part
from results_page import store, tables
from results_page.figure import draw, panels
from results_page.record import record
from results_page.trials import trials

from capsexp.errors import UserError, noting, print_error
from capsexp.files import write_atomic

DOCS = Path(__file__).resolve().parent
DATA, PAGE, FIGURE = DOCS / "results" / "runs.json", DOCS / "results.md", DOCS / "images" / "results.png"
README, README_PART = DOCS.parent / "README.md", "results"
COMMAND = "python docs/make_results_page.py"
PARTS: dict[str, Callable[[store.Data], str]] = {
    "headlines": tables.headlines,
    "curves": lambda data: curves(data),
    "errors": tables.errors,
    "trials": trials,
    "runs": tables.all_runs,
    "earlier": tables.earlier,
}


def curves(data: store.Data) -> str:
    """Return the figure's place in the page."""
    if not panels(data):
        return "No run with validation images yet.\n"
    return f"![Error on validation images against seconds of training](images/{FIGURE.name})\n"


def page(data: store.Data, before: str) -> str:
    """Return the page with the generated parts between their markers."""
    for name, content in PARTS.items():
        before = replace_part(before, name, content(data), origin=PAGE.name)
    return before


def readme(data: store.Data, before: str) -> str:
    """Return README.md with its table, if it has the markers of one."""
    if markers(README_PART)[0] not in before:
        return before
    return replace_part(before, README_PART, tables.readme(data), origin=README.name)


def check(data: store.Data) -> None:
    """Compare the pages with the data.

    Raises:
        SystemExit: one differs.
    """
    for file, content in ((PAGE, page), (README, readme)):
        written = file.read_text(encoding="utf-8")
        if content(data, written) != written:
            raise SystemExit(f"{file.name} does not equal {DATA.name}: run `{COMMAND}`")
    if FIGURE.exists() != bool(panels(data)):
        raise SystemExit(f"{FIGURE.name} does not equal {DATA.name}: run `{COMMAND}`")


def write(data: store.Data) -> None:
    """Write the generated parts of both pages, and the figure."""
    for file, content in ((PAGE, page), (README, readme)):
        text = content(data, file.read_text(encoding="utf-8"))
        write_atomic(file, lambda opened, text=text: opened.write(text.encode()))
    if panels(data):
        draw(data, FIGURE)


def add(data: store.Data, runs: Sequence[Path], *, row: str | None, cpu: str | None) -> None:
    """Add the records of runs; if one of them is refused, add none.

    Raises:
        UserError: one line for each run that is refused.
    """
    problems: list[str] = []
    records = []
    for run in runs:
        with noting(problems):
            records.append(record(run, cpu=cpu))
    if problems:
        raise UserError(*problems)
    for found in records:
        store.add(data, found, row=row)
    store.save(data, DATA)


def _arguments(texts: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit code 1 if a page does not equal the data")
    actions = parser.add_subparsers(dest="action")
    actions.add_parser("readme", help="print the table of README.md")
    adding = actions.add_parser("add", help="add or replace the records of finished runs")
    adding.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    adding.add_argument("--row", help="headline row; by default that of the recipe")
    adding.add_argument("--cpu", metavar="MODEL", help="processor, for runs whose env.json lacks it")
    return parser.parse_args(texts)


def main(texts: Sequence[str]) -> int:
    """Do what the command line asks for; return the exit code."""
    arguments, data = _arguments(texts), store.load(DATA)
    if arguments.check:
        check(data)
    elif arguments.action == "readme":
        print(tables.readme(data), end="")
    else:
        if arguments.action == "add":
            try:
                add(data, arguments.runs, row=arguments.row, cpu=arguments.cpu)
            except UserError as error:
                return print_error(error)
        write(data)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
