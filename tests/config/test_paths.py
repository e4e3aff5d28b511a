"""Paths in stored configs are absolute."""

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from capsexp.config.paths import stored_form, with_absolute_paths
from capsexp.training.run_dir import RunDir


@pytest.mark.parametrize(
    "typed", ["data", "./data", "a/../data", "~/data", "/srv/data", "dätä [1] #2=3", "data/", "../data"]
)
def test_paths_become_absolute_at_any_depth(typed):
    expected = os.path.abspath(Path(typed).expanduser())
    config = {"dataset": {"source": {"path": typed}, "list": [{"root": typed}]}, "data_root": typed}
    absolute = {
        "dataset": {"source": {"path": expected}, "list": [{"root": expected}]},
        "data_root": expected,
    }
    assert with_absolute_paths(config) == absolute
    assert with_absolute_paths(absolute) == absolute


@pytest.mark.parametrize(
    "node",
    [
        {"name": "data", "other_path": "data", "output_root": "outputs"},
        {"path": None},
        {"path": ""},
        {"path": 5},
        {"root": "${data_root}"},
        {"root": "/srv", "path": "below/the/root"},
    ],
)
def test_everything_else_stays(node):
    assert with_absolute_paths(node) == node


def test_a_stored_config_keeps_its_interpolations_but_not_those_of_the_data_root(monkeypatch):
    monkeypatch.setenv("MINE", "data")
    composed = OmegaConf.create(
        {"data_root": "${oc.env:MINE}", "dataset": {"root": "${data_root}", "a": "${seed}"}, "seed": 1}
    )
    stored = stored_form(composed, OmegaConf.to_container(composed, resolve=True))
    assert stored == {
        "data_root": os.path.abspath("data"),
        "dataset": {"root": "${data_root}", "a": "${seed}"},
        "seed": 1,
    }


def test_a_run_that_stored_its_path_as_typed_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old, new = {"dataset": {"path": "data"}}, {"dataset": {"path": str(tmp_path / "data")}}
    run = RunDir(tmp_path / "run")
    with run.locked():
        run.check_config(old, resume="auto", command=["capsexp"])
        run.check_config(new, resume="auto", command=["capsexp"])
        run.update_status("completed")
    assert run.is_finished(new)
    assert run.is_finished(old)
    assert not run.is_finished({"dataset": {"path": str(tmp_path / "other")}})
