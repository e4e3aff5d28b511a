"""Test the commands runs, compare and report from the command line."""

import csv
import json
import os
import subprocess
import sys

import matplotlib.image
import pytest
from fork_server import NO_FORK

from capsexp.cli import entry as cli
from capsexp.compare import selection


@pytest.fixture
def capsexp(monkeypatch, capsys, tmp_path):
    """Run the command line in this process, in an empty folder; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAPSEXP_OUTPUTS", raising=False)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["capsexp", *map(str, arguments)])
        try:
            code = cli.main()
        except SystemExit as stop:
            code = stop.code
        return code or 0, *capsys.readouterr()

    return call


@pytest.fixture
def sweep(write_run):
    for iterations in (1, 3):
        for seed in (0, 1):
            settings = {"routing.iterations": iterations, "seed": seed}
            accuracy = iterations / 10 + seed / 100
            write_run(
                f"outputs/sweep/{iterations}-{seed}", settings, validation=[0.05, accuracy], test=accuracy
            )


def lines(text):
    return text.splitlines()


@pytest.mark.parametrize("command", ["runs", "compare", "report"])
def test_help_lists_arguments_and_options(command, capsexp):
    for flag in ("-h", "--help"):
        code, out, error = capsexp(command, flag)
        assert (code, error) == (0, "")
        assert f"usage: capsexp {command} [DIRS] [FILTERS]" in out
        assert cli.COMMANDS[command].summary[1:] in out
        assert "status=running|finished|failed|interrupted|died" in out
        assert ("--sort-by" in out) == (command != "runs")


def test_all_runs_of_the_output_root_are_listed(sweep, capsexp):
    code, out, error = capsexp("runs")
    assert (code, error) == (0, "")
    assert sorted(line.split()[-1] for line in lines(out)[2:]) == [
        f"outputs/sweep/{name}" for name in ("1-0", "1-1", "3-0", "3-1")
    ]


def test_options_stand_before_between_and_after_directories_and_filters(sweep, capsexp):
    for arguments in (
        ("outputs", "iterations=3", "--csv"),
        ("--csv", "iterations=3", "outputs"),
        ("outputs", "--csv", "iterations=3"),
    ):
        code, out, error = capsexp("compare", *arguments)
        assert (code, error) == (0, "")
        assert [row["run"] for row in csv.DictReader(lines(out))] == [
            "outputs/sweep/3-1",
            "outputs/sweep/3-0",
        ]


def test_csv_markdown_and_json_are_the_only_output(sweep, capsexp):
    _, out, error = capsexp("compare", "--json", "--group-by", "seed", "--show", "train/loss,train/accuracy")
    assert [row["train/loss.n"] for row in json.loads(out)] == [2, 2]
    assert error == ""
    _, out, _ = capsexp("compare", "--md", "--sort-by", "seed", "--descending")
    assert [line.split(" | ")[1] for line in lines(out)[2:]] == ["1", "1", "0", "0"]
    code, out, error = capsexp("compare", "--csv", "--md")
    assert (code, out) == (2, "")
    hint = "(see capsexp compare --help)"
    assert error == f"capsexp: argument --md: not allowed with argument --csv {hint}\n"


def test_the_order_can_be_reversed(sweep, capsexp):
    def first(*options):
        return next(csv.DictReader(lines(capsexp("compare", "--csv", *options)[1])))["run"].rpartition("/")[2]

    assert first() == first("--descending") == "3-1"
    assert first("--ascending") == "1-0"
    assert first("--sort-by", "iterations", "--descending")[0] == "3"


def test_failed_runs_are_shown_unless_hidden(sweep, write_run, capsexp):
    write_run("outputs/sweep/bad", status="failed", error="X: y\nz")
    assert "\n    X: y\n" in capsexp("runs", "outputs", "status=failed")[1]
    assert len(json.loads(capsexp("compare", "--json")[1])) == 5
    assert len(json.loads(capsexp("compare", "--json", "--hide-failed")[1])) == 4


def test_curves_are_drawn_without_output_on_stdout(sweep, capsexp, tmp_path):
    code, out, error = capsexp("compare", "--json", "--plot", "a.png")
    assert (code, error) == (0, "curves: a.png\n")
    assert len(json.loads(out)) == 4
    two_panels = matplotlib.image.imread(tmp_path / "a.png").shape
    capsexp("compare", "--plot", "b.png", "--metric", "train/accuracy")
    assert matplotlib.image.imread(tmp_path / "b.png").shape[1] < two_panels[1]


def test_a_report_is_written_to_the_given_file(sweep, capsexp, tmp_path):
    code, out, error = capsexp(
        "report", "outputs/sweep", "iterations=3", "-o", "page.html", "--metric", "train/loss"
    )
    assert (code, error) == (0, "")
    assert out.startswith("page.html: 2 runs, ")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<svg") == 1
    assert text.count("<details class=") == 2
    capsexp("report")
    assert (tmp_path / "report.html").read_text().count("<details class=") == 4


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none: no such directory"),
        (["empty"], "empty: no runs at or below this folder"),
        (["file"], "file is a file, not a run directory"),
        (["sed=1"], "sed=1: unknown key 'sed': did you mean 'seed'?"),
        (["--sort-by", "sed"], "--sort-by: unknown key 'sed': did you mean 'seed'?"),
        (["--group-by", "sed"], "--group-by: unknown key 'sed': did you mean 'seed'?"),
        (["--show", "train/los"], "--show: no run has the metric 'train/los': did you mean 'train/loss'?"),
        (["--metric", "x/y", "--plot", "c.png"], "--metric: no run has the metric 'x/y'; choose from"),
    ],
)
def test_an_error_is_one_line_and_the_table_is_still_printed(arguments, message, sweep, capsexp, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    code, out, error = capsexp("compare", "outputs", *arguments, "--json")
    assert code == 2
    assert len(json.loads(out)) == 4
    assert len(lines(error)) == 1
    assert error.startswith(f"capsexp: {message}")


def test_all_errors_are_reported_at_once(sweep, capsexp):
    code, out, error = capsexp("compare", "outputs", "none", "sed=1", "--sort-by", "x/y", "--show", "z")
    assert code == 2
    assert len(lines(error)) == 4
    assert "4 runs in outputs/sweep" in out


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("compare", ["--sortby", "x"], "unrecognized arguments: --sortby"),
        ("runs", ["--csv"], "unrecognized arguments: --csv"),
        ("compare", ["--plot", "a.xyz"], "--plot: must be an image file"),
        ("compare", ["--plot", "none/a.png"], "--plot: there is no folder"),
        ("report", ["-o", "none/a.html"], "--output: no such folder: none"),
        ("report", ["-o", "."], "--output: . is a folder"),
        ("report", ["-o"], "argument -o/--output: expected one argument"),
    ],
)
def test_invalid_options_are_reported_before_any_run_is_read(
    command, arguments, message, sweep, capsexp, monkeypatch
):
    monkeypatch.setattr(selection, "select", lambda *_: 1 / 0)
    code, out, error = capsexp(command, *arguments)
    assert (code, out) == (2, "")
    assert error.startswith(f"capsexp: {message}")
    assert len(lines(error)) == 1


def test_damaged_runs_are_shown_with_warnings(sweep, write_run, capsexp):
    path = write_run("outputs/sweep/bad", {"seed": 2}, version="0.0.1")
    (path / "status.json").write_text('{"status": "compl')
    (path / "resolved_config.yaml").write_text("a: [")
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "train/l')
    code, out, error = capsexp("compare", "--show", "train/loss", "--json")
    assert (code, len(json.loads(out))) == (0, 5)
    warnings = lines(error)
    assert [line.startswith("capsexp: ") for line in warnings] == [True] * 4
    assert "status.json cannot be read" in warnings[0]
    assert "resolved_config.yaml cannot be read" in warnings[1]
    assert (
        warnings[2]
        == "capsexp: 1 of 5 runs were written by capsexp 0.0.1, this is 0.1.0: they may lack settings"
    )
    assert warnings[3].endswith("metrics.jsonl: ignored the incomplete last line")
    assert capsexp("runs")[0] == capsexp("report")[0] == 0


def test_missing_runs_are_reported(capsexp, tmp_path):
    code, out, error = capsexp("runs")
    assert (code, out, error) == (0, "", "capsexp: outputs: no runs yet; start one with `capsexp train`\n")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    code, out, error = capsexp("compare", "sweep", "--csv", "--group-by", "seed", "--plot", "a.png")
    assert (code, error) == (0, "capsexp: sweep: this sweep has no runs yet\n")
    assert len(lines(out)) == 1
    code, out, error = capsexp("report", "sweep")
    assert (code, out) == (0, "")
    assert lines(error)[1] == "capsexp: no runs to show: report.html is not written"
    assert not (tmp_path / "report.html").exists()


def test_ctrl_c_ends_without_a_traceback(sweep, capsexp, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(selection, "select", interrupt)
    assert capsexp("compare") == (130, "", "")


def start(*arguments, cwd, code="import sys; from capsexp.cli import main; sys.exit(main())", **options):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, stderr=subprocess.PIPE, text=True, check=False, **options)


@pytest.mark.parametrize("arguments", [["runs"], ["compare"], ["compare", "--csv"]])
def test_a_closed_pipe_ends_the_command_quietly(arguments, sweep, tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = start(*arguments, cwd=tmp_path, stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_two_hundred_runs_are_compared_without_torch(write_run, tiny_config, tmp_path):
    config = tiny_config()
    for number in range(200):
        path = write_run(
            f"outputs/{number}", {"seed": number % 10, "routing.iterations": number // 10}, config=config
        )
        loss = [{"step": step, "epoch": 1, "train/loss": 1 / step, "x": "y" * 500} for step in range(1, 101)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in loss))
    arguments = ("compare", "--json", "--show", "train/loss", "--group-by", "seed")
    code = "import sys; from capsexp.cli import main; print(main(), 'torch' in sys.modules, file=sys.stderr)"
    done = start(*arguments, cwd=tmp_path, code=code, stdout=subprocess.PIPE, env=os.environ | {NO_FORK: "1"})
    assert done.stderr == "0 False\n"
    rows = json.loads(done.stdout)
    assert [(row["routing.iterations"], row["train/loss.mean"], row["train/loss.n"]) for row in rows] == [
        (number, 0.01, 10) for number in range(20)
    ]


def test_a_trained_run_shows_in_all_three_commands(train_tiny, capsexp, tmp_path):
    results = train_tiny(tmp_path / "outputs" / "run")
    assert "outputs/run" in capsexp("runs")[1]
    (row,) = json.loads(capsexp("compare", "--json", "--plot", "a.png", "--show", "train/loss")[1])
    assert row["test/accuracy"] == results["test/accuracy"]
    assert 0 < row["train/loss"] < 1
    assert capsexp("report")[0] == 0
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 2
    assert text.count('<img src="data:image/png') == 1
