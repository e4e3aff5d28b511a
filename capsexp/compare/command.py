"""The commands `capsexp runs`, `compare` and `report`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

from capsexp.compare import layout, selection, tables
from capsexp.compare.comparison import Comparison, compare
from capsexp.compare.curves import TAGS, TIME_TAGS, XAxis, draw, learning_curves, mean_over_seeds
from capsexp.errors import Notes, UserError
from capsexp.outputs import require_figure_file, require_output
from capsexp.text import printable

ARGUMENTS = """\
arguments:
  DIRS                  run directories, or folders that contain runs
                        (default: $CAPSEXP_OUTPUTS if set, else outputs)
  FILTERS               KEY=VALUE[,VALUE…]; a run must pass every filter. KEY is
                        - a setting, in full or by a unique ending: routing.iterations=3, iterations=3
                        - a config group: model=em_routing, dataset=mnist, experiment=quickstart
                        - status: status=running|finished|failed|interrupted|died"""


class _Parser(argparse.ArgumentParser):
    """A parser that reports errors as UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def run(command: str, arguments: Sequence[str], *, heading: str, example: str) -> int:
    """Run one of the commands.

    Args:
        command: runs, compare or report.
        arguments: the arguments that follow it.
        heading: start of its help.
        example: end of its help.

    Returns:
        The exit code.

    Raises:
        UserError: all errors in the arguments. The rest of the output is printed first.
    """
    parser = _parser(command, heading, example)
    notes = Notes()
    options = parser.parse_intermixed_args(list(arguments))
    {"runs": _runs, "compare": _compare, "report": _report}[command](options, notes)
    notes.print_warnings()
    if notes.errors:
        raise UserError(*notes.errors)
    return 0


def _parser(command: str, heading: str, example: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"capsexp {command}",
        usage=argparse.SUPPRESS,  # the heading has it
        description=f"{heading}\n\n{ARGUMENTS}",
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("dirs_and_filters", nargs="*", help=argparse.SUPPRESS)
    if command != "runs":
        _add_table_options(parser)
    if command == "compare":
        _add_compare_options(parser)
    if command == "report":
        parser.add_argument(
            "-o",
            "--output",
            type=Path,
            default=Path("report.html"),
            metavar="FILE",
            help="the HTML file to write (default: report.html)",
        )
    return parser


def _add_table_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--show",
        type=_split,
        default=[],
        metavar="TAG[,TAG]",
        help="add a column with the last value of each metric: --show train/loss",
    )
    parser.add_argument(
        "--sort-by",
        default="validation",
        metavar="NAME",
        help="sort rows by a setting, config group, metric or tag: --sort-by test (default: validation)",
    )
    order = parser.add_mutually_exclusive_group()
    order.add_argument(
        "--ascending",
        dest="descending",
        action="store_const",
        const=False,
        help="smallest first (default: best first for metrics, smallest first for settings)",
    )
    order.add_argument("--descending", action="store_const", const=True, help="largest first")
    parser.add_argument(
        "--baseline",
        type=_split,
        default=[],
        metavar="NAME[,NAME]",
        help="add a column with the difference in test error to the runs with this choice or setting, with "
        "as many images or as much time: --baseline uniform,pool or --baseline iterations=1",
    )
    parser.add_argument("--hide-failed", action="store_true", help="leave out runs that failed or died")
    parser.add_argument(
        "--metric",
        type=_split,
        metavar="TAG[,TAG]",
        help="draw curves of these metrics: --metric train/loss (default: validation/accuracy,train/loss)",
    )


def _add_compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--group-by",
        type=_split,
        default=[],
        metavar="KEY[,KEY]",
        help="average over these settings, and show mean ± standard deviation: --group-by seed",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw learning curves, averaged over --group-by (default: over seeds): --plot curves.png",
    )
    parser.add_argument(
        "--x-axis",
        choices=get_args(XAxis),
        default="step",
        help="what --plot draws curves over: step (default), or seconds of training, then by default of "
        + ",".join(TIME_TAGS),
    )
    parser.add_argument(
        "--folds",
        action="store_true",
        help="average over the toys held out (dataset.validation_instance) and over seeds: class-balanced "
        "validation accuracy of folds 4, 6, 7, 8, and fold 9 beside it",
    )
    form = parser.add_mutually_exclusive_group()
    for name, text in (
        ("csv", "print CSV with all digits: capsexp compare --csv > table.csv"),
        ("md", "print Markdown with rounded metrics"),
        ("json", "print JSON with all digits"),
    ):
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=text)


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _runs(options: argparse.Namespace, notes: Notes) -> None:
    tables.print_runs(selection.select(options.dirs_and_filters, notes))


def _compare(options: argparse.Namespace, notes: Notes) -> None:
    if options.plot:
        require_figure_file(options.plot, option="--plot")
    comparison = _comparison(options, notes, group_by=options.group_by)
    forms = {"csv": tables.csv_text, "md": tables.markdown, "json": tables.json_text}
    if options.form:
        layout.write_stdout(forms[options.form](comparison))
    else:
        tables.print_comparison(comparison)
    if options.plot:
        _plot(options, comparison, notes)


def _plot(options: argparse.Namespace, comparison: Comparison, notes: Notes) -> None:
    x_axis: XAxis = options.x_axis
    tags = options.metric or (TAGS if x_axis == "step" else TIME_TAGS)
    means = mean_over_seeds(comparison, notes)
    curves = learning_curves(means, tags, notes, x_axis=x_axis)
    if not options.metric and x_axis == "seconds":  # a run without validation has no such panel
        tags = [tag for tag in tags if any(curve.points[tag] for curve in curves)]
    if curves:
        draw(curves, tags, options.plot, x_axis=x_axis)
        print(f"curves: {printable(options.plot)}", file=sys.stderr)


def _report(options: argparse.Namespace, notes: Notes) -> None:
    file: Path = options.output
    if file.is_dir():
        raise UserError(f"--output: {file} is a folder")
    if not file.absolute().parent.is_dir():
        raise UserError(f"--output: no such folder: {file.parent}")
    require_output(file)
    from capsexp.compare.report import write  # imports jinja2, which no other command needs

    comparison = _comparison(options, notes)
    if comparison.rows:
        size = write(file, comparison, options.metric or TAGS, notes)
        count = len(comparison.rows)
        print(f"{printable(file)}: {count} run{'s' * (count != 1)}, {size / 1e6:.1f} MB")
    else:
        notes.warning(f"no runs to show: {file} is not written")


def _comparison(options: argparse.Namespace, notes: Notes, *, group_by: Sequence[str] = ()) -> Comparison:
    return compare(
        selection.select(options.dirs_and_filters, notes),
        notes,
        show=options.show,
        group_by=group_by,
        sort_by=options.sort_by,
        descending=options.descending,
        hide_failed=options.hide_failed,
        baselines=options.baseline,
        folds=getattr(options, "folds", False),
    )
