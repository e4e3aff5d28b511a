"""The commands that look at runs, as they are typed: `capsexp runs`, `compare` and `report`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from capsexp.errors import Notes, UserError
from capsexp.files import require_figure_file

WORDS = """\
DIRS     directories of runs, or folders with runs below them; without one, $CAPSEXP_OUTPUTS or outputs
FILTERS  KEY=VALUE[,VALUE…]: a setting (routing.iterations=3, or iterations=3 where no other key ends so),
         a choice (model=, dataset=, experiment= …) or status=running|finished|failed|interrupted|died"""


class _Parser(argparse.ArgumentParser):
    """A mistake is one line, as everywhere else."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} -h tells what there is)")


def run(command: str, arguments: Sequence[str], description: str) -> int:
    """Do what one of the commands was asked to do.

    Args:
        command: runs, compare or report.
        arguments: the words after it.
        description: one line for its help.

    Returns:
        The exit code.

    Raises:
        UserError: at the end of the work, every mistake in the arguments.
    """
    parser = _parser(command, description)
    try:
        options = parser.parse_intermixed_args(list(arguments))
        notes = Notes()
        {"runs": _runs, "compare": _compare, "report": _report}[command](options, notes)
    except KeyboardInterrupt:
        return 130
    for line in notes.warnings:
        print(f"capsexp: {line}", file=sys.stderr)
    if notes.errors:
        raise UserError(*notes.errors)
    return 0


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"capsexp {command}",
        usage=f"capsexp {command} [DIRS] [FILTERS]" + " [OPTIONS]" * (command != "runs"),
        description=f"{command}: {description}\n\n{WORDS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    if command != "runs":
        _add_table_options(parser)
    if command == "compare":
        _add_compare_options(parser)
    if command == "report":
        page: dict[str, Any] = {"type": Path, "default": Path("report.html"), "metavar": "FILE"}
        parser.add_argument("-o", "--output", **page, help="the page (report.html)")
    return parser


def _add_table_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--show",
        type=_names,
        default=[],
        metavar="TAG[,TAG]",
        help="last values of these, such as train/loss",
    )
    add(
        "--sort-by",
        metavar="NAME",
        default="validation",
        help="a setting, choice, figure or tag (validation)",
    )
    order = parser.add_mutually_exclusive_group()
    switch: dict[str, Any] = {"dest": "descending", "action": "store_const"}
    order.add_argument("--ascending", **switch, const=False, help="smallest first; else figures best first")
    order.add_argument("--descending", **switch, const=True, help="largest first")
    add("--hide-failed", action="store_true", help="without runs that failed or died")
    add("--metric", type=_names, metavar="TAG[,TAG]", help="curves of these (validation/accuracy,train/loss)")


def _add_compare_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--group-by", type=_names, default=[], metavar="KEY[,KEY]", help="mean ± sd over these, such as seed")
    add("--plot", type=Path, metavar="FILE", help="draw learning curves, means over the seeds or --group-by")
    form = parser.add_mutually_exclusive_group()
    for name, words in (
        ("csv", "CSV, every digit"),
        ("md", "Markdown, rounded"),
        ("json", "JSON, every digit"),
    ):
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=words)


def _names(words: str) -> list[str]:
    return [word.strip() for word in words.split(",") if word.strip()]


def _runs(options: argparse.Namespace, notes: Notes) -> None:
    from capsexp.compare.selection import select
    from capsexp.compare.tables import print_runs

    print_runs(select(options.words, notes))


def _compare(options: argparse.Namespace, notes: Notes) -> None:
    if options.plot:
        require_figure_file(options.plot, option="--plot")
    from capsexp.compare import tables

    comparison = _comparison(options, notes, group_by=options.group_by)
    forms = {"csv": tables.csv_text, "md": tables.markdown, "json": tables.json_text}
    if options.form:
        tables.put(forms[options.form](comparison))
    else:
        tables.print_comparison(comparison)
    if options.plot:
        from capsexp.compare import curves

        tags = options.metric or curves.TAGS
        if drawn := curves.curves(curves.by_setting(comparison), tags, notes):
            curves.draw(drawn, tags, options.plot)
            print(f"curves: {options.plot}", file=sys.stderr)


def _report(options: argparse.Namespace, notes: Notes) -> None:
    page = options.output
    if page.is_dir() or not page.absolute().parent.is_dir():
        raise UserError(f"--output: {page} cannot be written: no such folder, or a folder itself")
    from capsexp.compare.curves import TAGS
    from capsexp.compare.report import write

    comparison = _comparison(options, notes)
    if comparison.rows:
        write(page, comparison, options.metric or TAGS, notes)
        count = len(comparison.rows)
        print(f"{page}: {count} run{'s' * (count != 1)}, {page.stat().st_size / 1e6:.1f} MB")
    else:
        notes.warning(f"{page} is not written: there are no runs to show")


def _comparison(options: argparse.Namespace, notes: Notes, *, group_by: Sequence[str] = ()) -> Any:
    from capsexp.compare.comparison import compare
    from capsexp.compare.selection import select

    wishes = {name: getattr(options, name) for name in ("show", "sort_by", "descending", "hide_failed")}
    return compare(select(options.words, notes), notes, group_by=group_by, **wishes)
