"""Saved configs of this version and of earlier ones.

old_run/ is a run of an earlier version, of a very small network: `trainer=smoke trainer.save_every=1 seed=3`.
"""

import functools
import inspect
import json
import operator
import os
import shlex
import shutil
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from capsexp.config import saved
from capsexp.config.build import build_components
from capsexp.config.compose import compose, to_plain
from capsexp.config.saved import (
    RENAMED_KEYS,
    RENAMED_TARGETS,
    load_saved_config,
    parse_saved,
    store_as_primary,
)
from capsexp.config.targets import resolve
from capsexp.errors import UserError
from capsexp.training import checkpoint
from capsexp.training.run_dir import RunDir

OLD_RUN = Path(__file__).with_name("old_run")
KEYS_OF = {  # overrides under which each renamed key exists
    "model.identity": ["model=em_routing", "dataset=mnist"],
    "model.noise": ["model=em_routing", "dataset=mnist"],
    "loss.average": ["loss=spread"],
    "dataset.source.preprocess.light": ["dataset=multimnist", "dataset@dataset.source=digits"],
}


@pytest.fixture
def old_run(tmp_path):
    """A copy of the old run, with the links that every run has."""
    path = tmp_path / "old"
    shutil.copytree(OLD_RUN, path)
    for name in ("last", "best"):
        checkpoint.link(path / "checkpoints", name, 2)
    return path


@pytest.fixture
def train_again(old_run, capsexp):
    """The command of the old run, for its copy; more overrides may follow."""
    _, *arguments = shlex.split((old_run / "command.txt").read_text())
    return lambda *more: capsexp(*arguments, f"run={old_run}", *more)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_an_old_run_is_evaluated(old_run, capsexp):
    code, _, error = capsexp("eval", f"run={old_run}", "weights=last")
    assert (code, error) == (0, "")
    evaluation = json.loads((old_run / "evaluations.jsonl").read_text())
    for name, value in metrics(OLD_RUN)[-1].items():
        if name.startswith("test/"):
            assert evaluation[name.removeprefix("test/")] == pytest.approx(value, rel=1e-4)


def test_an_old_run_is_complete(old_run, train_again):
    code, out, error = train_again()
    assert (code, error) == (0, "")
    assert out.startswith(f"{old_run} is complete: ")


def test_an_old_run_resumes_from_its_checkpoint(old_run, train_again):
    for path in (old_run / "checkpoints").glob("*"):
        if path.stem != "step-00000001":
            path.unlink()
    status = json.loads((old_run / "status.json").read_text())
    (old_run / "status.json").write_text(json.dumps(status | {"status": "interrupted", "step": 1}))
    code, _, error = train_again()
    assert (code, error) == (0, "")
    status = json.loads((old_run / "status.json").read_text())
    assert [resume["step"] for resume in status["resumes"]] == [1]
    expected = metrics(OLD_RUN)
    assert len(metrics(old_run)) == len(expected)
    for line, old_line in zip(metrics(old_run), expected, strict=True):
        assert {name: line[name] for name in old_line} == pytest.approx(old_line, rel=1e-4)


def test_an_old_run_under_another_config_is_refused_with_that_key_alone(train_again):
    code, _, error = train_again("loss.present=0.8")
    assert code == 2
    first, *others = error.splitlines()
    assert first == "capsexp: loss.present: was 0.9, is 0.8"
    assert len(others) == 1


def test_an_old_run_and_a_new_one_are_compared_without_a_difference(old_run, train_again, capsexp):
    new_run = old_run.with_name("new")
    assert train_again(f"run={new_run}", "seed=4")[0] == 0
    code, out, error = capsexp("compare", old_run, new_run, "--json")
    assert (code, error) == (0, "")
    columns = {name for row in json.loads(out) for name in row}
    assert "seed" in columns
    assert not any("_target_" in name or "." in name for name in columns)


def test_every_renamed_target_may_be_built():
    config = parse_saved((OLD_RUN / ".hydra" / "config.yaml").read_bytes())
    targets = {config["device"]["_target_"], config["trainer"]["_target_"]}
    targets.add(config["dataset"]["preprocess"]["_target_"])
    assert {f"{target.rpartition('.')[0]}." for target in targets} == set(RENAMED_TARGETS.values())
    assert all(inspect.isclass(resolve(target)) for target in targets)


def test_an_old_config_builds(old_run):
    components = build_components(load_saved_config(old_run), plugins=[])
    assert components.trainer.batch_size == 16


def test_targets_are_renamed_at_any_depth_and_others_are_kept():
    text = b"a: [{b: {_target_: capsexp.device.Device}}]\nc: {_target_: torch.nn.ReLU, d: capsexp.device.}\n"
    assert parse_saved(text) == {
        "a": [{"b": {"_target_": "capsexp.training.device.Device"}}],
        "c": {"_target_": "torch.nn.ReLU", "d": "capsexp.device."},
    }


def test_a_renamed_key_keeps_its_place_and_its_value(monkeypatch):
    renamed = {"model.mask": "model.decode", "data.source.light": "data.source.mean"}
    monkeypatch.setattr(saved, "RENAMED_KEYS", renamed)
    text = b"model: {_target_: capsexp.x.Y, a: 1, mask: label, b: {mask: 2}}\nmask: 3\n"
    text += b"data: {source: {_target_: capsexp.x.Z, light: [window]}, light: 4}\n"
    assert parse_saved(text) == {
        "model": {"_target_": "capsexp.x.Y", "a": 1, "decode": "label", "b": {"mask": 2}},
        "mask": 3,
        "data": {"source": {"_target_": "capsexp.x.Z", "mean": ["window"]}, "light": 4},
    }
    assert list(parse_saved(text)["model"]) == ["_target_", "a", "decode", "b"]


def test_a_renamed_value_is_that_of_one_key(monkeypatch):
    monkeypatch.setattr(saved, "RENAMED_KEYS", {"a.light": "a.mean"})
    monkeypatch.setattr(saved, "RENAMED_VALUES", {"a.mean": {"picture": "image"}})
    text = b"a: {_target_: capsexp.x.Y, light: picture, b: picture}\nc: picture"
    assert parse_saved(text) == {
        "a": {"_target_": "capsexp.x.Y", "mean": "image", "b": "picture"},
        "c": "picture",
    }
    assert parse_saved(b"a: {_target_: capsexp.x.Y, mean: picture}")["a"]["mean"] == "image"
    assert parse_saved(b"a: {_target_: capsexp.x.Y, light: window}")["a"]["mean"] == "window"


def test_a_class_of_a_plugin_keeps_its_keys(monkeypatch):
    monkeypatch.setattr(saved, "RENAMED_KEYS", {"model.mask": "model.decode"})
    config = {"model": {"_target_": "mine.Model", "mask": 1}}
    assert parse_saved(b"model: {_target_: mine.Model, mask: 1}") == config


@pytest.mark.parametrize(("old", "new"), list(RENAMED_KEYS.items()))
def test_every_renamed_key_is_one_that_its_target_takes(old, new):
    """The config of today under its old key gives the config of today."""
    today = to_plain(compose("train", KEYS_OF.get(old, []), config_dir=None))
    *folders, leaf = new.split(".")
    node = functools.reduce(operator.getitem, folders, today)
    assert leaf in inspect.signature(resolve(node["_target_"])).parameters
    earlier = json.loads(json.dumps(today))
    node = functools.reduce(operator.getitem, folders, earlier)
    node[old.rpartition(".")[2]] = node.pop(leaf)
    assert earlier != today
    assert parse_saved(json.dumps(earlier).encode()) == today


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.0e-06", 1e-06),
        ("2020-01-01", "2020-01-01"),
        ("${routing}", "${routing}"),
        ("~", None),
    ],
)
def test_values_are_read_as_omegaconf_reads_them(text, value):
    assert parse_saved(f"a: {text}".encode()) == {"a": value}


@pytest.mark.parametrize("text", [b"", b"- 1", b"a: [1", b"\xff", b"!!python/name:os.system", b"a: *b"])
def test_what_is_no_config_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        parse_saved(text)


@pytest.fixture
def config():
    node = OmegaConf.to_container(compose("train", ["loss.present=0.8"], config_dir=None), resolve=False)
    del node["hydra"]
    return node


def as_root(config, *overrides):
    store_as_primary(config, extra={"split": "test"}, name="saved_test")
    return compose("saved_test", list(overrides), config_dir=None)


def test_a_saved_config_comes_back_as_it_was(config):
    back = to_plain(as_root(config))
    assert back.pop("split") == "test"
    assert back == to_plain(compose("train", ["loss.present=0.8"], config_dir=None))


def test_a_saved_config_takes_overrides_and_other_options(config):
    changed = to_plain(as_root(config, "routing.iterations=5", "dataset=mnist", "split=train"))
    assert changed["model"]["routing"]["iterations"] == 5
    assert changed["dataset"]["_target_"].endswith("MNIST")
    assert (changed["split"], changed["loss"]["present"]) == ("train", 0.8)


def test_a_wrong_override_of_a_saved_config_is_reported(config):
    with pytest.raises(
        UserError, match=r"unknown key 'routing.iteration': did you mean 'routing.iterations'"
    ):
        as_root(config, "routing.iteration=5")


def test_a_saved_config_without_a_routing_comes_back():
    node = OmegaConf.to_container(compose("train", ["model=cnn_sabour"], config_dir=None), resolve=False)
    del node["hydra"]
    for change in ({}, {"routing": None}):
        back = to_plain(as_root(node | change))
        assert back["model"]["_target_"] == "capsexp.model.cnn_sabour.CNN"
        assert back.get("routing") is None


def test_what_could_start_code_is_left_out_of_a_saved_config(config):
    hostile = {"x": {"_target_": "a.b"}}
    moved = {"defaults": ["_self_", {"/loss@_global_.hydra": "stored"}]}
    extra = {
        "hydra": {"callbacks": hostile},
        "defaults": ["a"],
        "plugins": ["os"],
        "experiment": {"callbacks": hostile},
    }
    root = as_root(config | extra | {"model": config["model"] | moved})
    assert to_plain(root)["plugins"] == []
    assert root.hydra.callbacks == {}
    assert "defaults" not in root.model
    assert ConfigStore.instance().load("model/stored.yaml").node.get("defaults") is None


def test_a_renamed_value_is_read_under_its_new_name():
    node = b"{_target_: capsexp.preprocess.Preprocess, light: picture}"
    preprocess = parse_saved(b"dataset: {preprocess: " + node + b"}")["dataset"]["preprocess"]
    added = saved.ADDED_KEYS["capsexp.data.preprocess.Preprocess"]
    expected = {"_target_": "capsexp.data.preprocess.Preprocess", "contrast_mean": "image", **added}
    assert preprocess == expected


def no_config(kind, path):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "huge":
        path.touch()
        os.truncate(path, 2**40)
    else:
        path.write_text(kind)


@pytest.mark.parametrize(
    "kind",
    [
        "pipe",
        "folder",
        "device",
        "huge",
        "a: &a [*a]",
        "a: !!bool x",
        "a: " + "[" * 5000,
        "- 1",
        "x: !!set {1}",
    ],
)
def test_whatever_is_in_the_place_of_a_config_is_one_line(kind, tmp_path):
    (tmp_path / ".hydra").mkdir()
    no_config(kind, tmp_path / ".hydra" / "config.yaml")
    with pytest.raises(UserError) as error:
        load_saved_config(tmp_path)
    (line,) = error.value.problems
    assert "config.yaml" in line
    assert "\n" not in line


@pytest.mark.parametrize("content", [b"", b"x", b"\xff", b"a: 1", b"- &a [*a]", b"[" * 5000])
def test_overrides_that_are_no_list_are_unknown(content, tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_bytes(content)
    assert RunDir(tmp_path).overrides() == []


def nodes_of(config, target):
    """The nodes of a config that build this class."""
    if isinstance(config, dict):
        found = [config] if config.get("_target_") == target else []
        return found + [node for value in config.values() for node in nodes_of(value, target)]
    return []


@pytest.mark.parametrize("target", saved.ADDED_KEYS)
def test_an_added_key_has_the_value_of_conf_in_the_config_of_an_earlier_run(target):
    overrides = ["dataset=image_folder", "dataset.path=x"]
    if target == "capsexp.model.em_routing.MatrixCapsNet":
        overrides.append("model=em_routing")
    if target == "capsexp.loss.cross_entropy.CrossEntropy":
        overrides.append("loss=cross_entropy")
    today = to_plain(compose("train", overrides, config_dir=None))
    earlier = json.loads(json.dumps(today))
    nodes = nodes_of(earlier, target)
    assert nodes
    for node in nodes:
        for key in saved.ADDED_KEYS[target]:
            del node[key]
    assert parse_saved(json.dumps(earlier).encode()) == today
