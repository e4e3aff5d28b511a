"""What a sweep checks before it makes a folder: its lists of values, its data, its directories."""

import pytest

from capsexp.cli.sweep import launcher
from capsexp.cli.sweep.directories import directory_problems
from capsexp.cli.sweep.tables import TAKES
from capsexp.config.sweeps import data_variants
from capsexp.errors import RunStopped


@pytest.fixture
def refused(capsexp, no_runs):
    """The problems of a sweep that is refused."""

    def call(*overrides):
        code, _, error = capsexp("train", "-m", *overrides)
        assert code == 2
        lines = error.splitlines()
        assert all(line.startswith("capsexp: ") for line in lines)
        return [line.removeprefix("capsexp: ") for line in lines]

    return call


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("optimizer.lr.start=interval(1e-4,1e-2)", TAKES),
        ("seed=interval(0,1)", TAKES),
        ("seed=interval(1,0)", "an interval goes from a number to a larger one"),
        ("seed=range(0,0)", "the list of values is empty"),
        ("seed=range(3,0)", "the list of values is empty"),
        ("seed=shuffle(range(0,0))", "the list of values is empty"),
        ("seed=glob(*)", "the list of values is empty"),
        ("loss=glob(x*)", "no option fits; choose from cross_entropy, margin, "),
        ("loss=glob(*,exclude=*)", "no option fits; choose from cross_entropy, "),
        ("seed=range(0,9,0)", "range() arg 3 must not be zero"),
        ("seed=range(nan,1)", "a range takes finite numbers"),
        ("seed=range(0,1e9)", "more than 10,000 values"),
        ("seed=range(0,inf)", "more than 10,000 values"),
        ("seed=1,2,1", "1 is there more than once"),
        ("seed=choice(1,1)", "1 is there more than once"),
        ("experiment=quickstart,quickstart", "quickstart is there more than once"),
        ("hydra.sweep.dir=a,b", "the settings of the sweep itself have one value"),
    ],
)
def test_a_list_that_makes_no_jobs_is_refused_in_one_line(override, problem, refused):
    (line,) = refused(override)
    assert line.startswith(f"{override}: {problem}")


def test_all_problems_of_a_sweep_are_reported_together(refused):
    assert refused("seed=range(0,0)", "trainer.max_steps=3,3", "modle=x") == [
        "trainer.max_steps=3,3: 3 is there more than once",
        "seed=range(0,0): the list of values is empty",
        "unknown key 'modle': did you mean 'model'?",
    ]


def test_a_sweep_of_too_many_jobs_is_refused(refused):
    swept = [f"{key}=range(1,23)" for key in ("seed", "trainer.log_every", "trainer.max_epochs")]
    assert refused(*swept) == ["this sweep has 10,648 jobs; the most are 10,000"]


@pytest.mark.parametrize("override", ["model=glob(x*)", "seed=range(0,0)", "seed=range(0,9,0)"])
@pytest.mark.parametrize("command", ["train", "bench"])
def test_empty_lists_are_refused_without_a_sweep_too(command, override, capsexp, no_runs):
    code, _, error = capsexp(command, override)
    assert code == 2
    assert error.startswith(f"capsexp: {override}: ")
    assert len(error.splitlines()) == 1


# Data


def test_the_data_of_all_jobs_are_looked_for_before_the_first(refused):
    lines = refused("seed=0,1", "dataset=digits,mnist,cifar10")
    assert len(lines) == 2
    for line, name in zip(lines, ("mnist", "cifar10"), strict=True):
        assert line.startswith(f"dataset {name} is not complete under ")
        assert f"`capsexp data prepare {name}`" in line


def test_every_combination_of_the_settings_of_data_is_looked_for():
    overrides = ["dataset=mnist,svhn", "seed=0,1", "+dataset.root=a,b", "loss=margin"]
    variants = data_variants(overrides, config_dir=None)
    assert [(variant[0], variant[2]) for variant in variants] == [
        (f"dataset={name}", f"+dataset.root={root}") for name in ("mnist", "svhn") for root in "ab"
    ]
    assert {variant[1] for variant in variants} == {"seed=0"}
    assert data_variants(["dataset=mnist,svhn", "seed=0,1"], config_dir=None) == []


# Directories


@pytest.mark.parametrize(
    ("subdir", "problem"),
    [
        ("x", "the directory of the jobs seed=0 and seed=1; add what differs between jobs"),
        ("x/${trainer.max_epochs}", "the directory of the jobs seed=0 and seed=1"),
        ("/absolute${seed}", "must be a path below the sweep's folder, without '..'"),
        ("../${seed}", "must be a path below the sweep's folder, without '..'"),
        ("a/../../${seed}", "must be a path below the sweep's folder, without '..'"),
        (".", "must be a path below the sweep's folder, without '..'"),
        ("sweep.json/${seed}", "the sweep has a file of this name"),
        ("${nowhere}", "Interpolation key 'nowhere' not found"),
    ],
)
def test_directories_that_jobs_cannot_have_are_refused(subdir, problem, refused):
    line = refused("seed=0,1", f"hydra.sweep.subdir={subdir}")[0]
    assert line.startswith("hydra.sweep.subdir")
    assert problem in line


def test_a_directory_in_the_directory_of_another_job_is_refused():
    jobs = [["seed=0"], ["seed=1"], ["seed=2"]]
    (line,) = directory_problems(["a/b", "a", "c"], jobs)
    assert line == "hydra.sweep.subdir=a/b: inside a, the directory of the job seed=1"
    assert list(directory_problems(["a", "a", "b"], [["seed=0"], ["seed=0"], ["seed=1"]])) == []


def test_jobs_get_the_directories_and_options_that_were_typed(capsexp, tmp_path, monkeypatch):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    recipe = "# @package _global_\ndefaults: [quickstart]\n"
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(recipe)
    commands = {}

    def record(waiting, slots, arguments_of, stop, print_line):
        commands.update((job.run.path, arguments_of(job)) for job in waiting)
        raise RunStopped("enough", exit_code=130)

    monkeypatch.setattr(launcher, "_run_jobs", record)
    typed = ["-cd", tmp_path / "own", "experiment=mine", "seed=5,6", "hydra.verbose=false"]
    chosen = ["hydra.sweep.subdir=${hydra.job.num}/${experiment_name}-${seed}", "+experiment_name=mine"]
    assert capsexp("train", "-m", *typed, *chosen, f"hydra.sweep.dir={tmp_path / 'sweep'}")[0] == 130
    assert [*commands] == [tmp_path / "sweep" / "0" / "mine-5", tmp_path / "sweep" / "1" / "mine-6"]
    for path, arguments in commands.items():
        assert arguments[:4] == ["-cn", "train", "-cd", str(tmp_path / "own")]
        assert arguments[4:] == [
            "hydra.verbose=false",
            "experiment=mine",
            f"seed={path.name[-1]}",
            "+experiment_name=mine",
            f"run='{path}'",
        ]
