import pytest

from capsexp.compare.selection import select
from capsexp.errors import Notes


@pytest.fixture
def notes():
    return Notes()


@pytest.fixture
def root(write_run, tmp_path):
    """Runs a, b, c with 1, 3, 3 iterations; c failed."""
    write_run("a", {"routing.iterations": 1, "seed": 0})
    write_run(
        "b", {"routing.iterations": 3, "seed": 1, "model.decoder.hidden": [4, 4], "optimizer.lr.start": 1e-06}
    )
    other = {"model": "large", "dataset": "mnist", "experiment": "quickstart"}
    write_run("c", {"routing.iterations": 3, "seed": 2, "routing.bias": True}, status="failed", choices=other)
    return tmp_path


@pytest.mark.parametrize(
    ("filters", "selected"),
    [
        ([], "abc"),
        (["iterations=3"], "bc"),
        (["routing.iterations=1,3"], "abc"),
        (["model.routing.iterations=1"], "a"),
        (["iterations=3.0", "seed=1"], "b"),
        (["seed=0,2"], "ac"),
        (["hidden=[4,4],[9]"], "b"),
        (["hidden=[4, 4]"], "b"),
        (["lr.start=1e-6"], "b"),
        (["bias=true"], "c"),
        (["model=large"], "c"),
        (["model=small", "dataset=digits"], "ab"),
        (["experiment=quickstart"], "c"),
        (["status=failed"], "c"),
        (["status=finished,failed"], "abc"),
    ],
)
def test_filters_select_runs(filters, selected, root, notes):
    assert "".join(run.path.name for run in select([str(root), *filters], notes)) == selected
    assert notes == Notes()


def test_null_matches_a_null_setting_and_not_a_missing_one(write_run, tmp_path, notes):
    write_run("a", {"loss.margin": None})
    write_run("b")
    assert [run.path.name for run in select([str(tmp_path), "margin=null"], notes)] == ["a"]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("iteratons=3", "unknown key 'iteratons': did you mean 'routing.iterations'?"),
        (
            "weight_decay=0",
            "'weight_decay' is ambiguous: write optimizer.weight_decay or loss.weight_decay",
        ),
        ("status=finishd", "unknown status 'finishd': did you mean 'finished'?"),
    ],
)
def test_an_invalid_filter_is_reported_and_passes_all_runs(condition, message, root, notes):
    assert len(select([str(root), condition], notes)) == 3
    assert notes.errors == [f"{condition}: {message}"]


def test_a_value_that_no_run_has_is_reported(root, notes):
    assert select([str(root), "seed=7"], notes) == []
    assert select([str(root), "status=died"], notes) == []
    assert select([str(root), "seed=0", "model=large"], notes) == []
    assert notes.warnings == [
        "no run has seed=7; values: 0, 1, 2",
        "no run has status=died",
        "no run has seed=0 and model=large",
    ]
    assert notes.errors == []


def test_a_directory_name_may_contain_an_equals_sign(write_run, notes, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_run("seed=1", {"seed": 1})
    write_run("other")
    assert [str(run.path) for run in select(["seed=1"], notes)] == ["seed=1"]


def test_the_default_directory_is_the_output_root(root, notes, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAPSEXP_OUTPUTS", str(root))
    assert len(select(["iterations=3"], notes)) == 2
    assert notes == Notes()
    monkeypatch.delenv("CAPSEXP_OUTPUTS")
    assert select(["iterations=3"], notes) == []
    assert notes.warnings == ["outputs: no runs yet; start one with `capsexp train`"]
    assert notes.errors == []
