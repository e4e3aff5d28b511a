"""Mistakes on the command line: one line each, with the nearest right name."""

import re

import pytest

from capsexp.config import diagnosis
from capsexp.config.compose import compose, to_plain
from capsexp.errors import UserError, nearest

MINE = """
defaults:
  - dynamic_routing
  - _self_
  - override /optimizer@_global_.optimizer: sgd
class_dim: 4
"""


def composed(*overrides, **keywords):
    return to_plain(compose("train", list(overrides), config_dir=None, **keywords))


def problems(*overrides, **keywords):
    with pytest.raises(UserError) as caught:
        composed(*overrides, **keywords)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("modle=cnn_sabour", "unknown key 'modle': did you mean 'model'?"),
        ("routing.iteration=5", "unknown key 'routing.iteration': did you mean 'routing.iterations'?"),
        ("traner.max_epochs=5", "unknown key 'traner.max_epochs': did you mean 'trainer.max_epochs'?"),
        ("max_epochs=5", "unknown key 'max_epochs': did you mean 'trainer.max_epochs'?"),
        (
            "model.routing.iterations=5",
            "unknown key 'model.routing.iterations': did you mean 'routing.iterations'?",
        ),
        ("sed=1", "unknown key 'sed': did you mean 'seed'?"),
        ("xyzzy=1", "unknown key 'xyzzy'"),
        ("~sead", "unknown key 'sead': did you mean 'seed'?"),
        ("model=cnn_sabor", "model=cnn_sabor: no such option: did you mean 'cnn_sabour'?"),
        ("loss=xyzzy", "loss=xyzzy: no such option; choose from cross_entropy, margin"),
        ("experiment=quikstart", "experiment=quikstart: no such option: did you mean 'quickstart'?"),
        ("routing=null", "routing=null: no such option; choose from dynamic, em, "),
        ("model=3", "model=3: no such option"),
        ("seed", "cannot read 'seed': missing EQUAL at '<EOF>'; an override has the form KEY=VALUE"),
        ("=3", "cannot read '=3': no key; an override has the form KEY=VALUE"),
        (
            "routing.iterations=1,2",
            "routing.iterations=1,2: several values make a sweep, which -m starts; a list is ",
        ),
        (
            "experiment=glob(*)",
            "experiment=glob(*): several values make a sweep, which -m starts; a list is ",
        ),
    ],
)
def test_a_wrong_override_is_one_line_with_the_nearest_name(override, line):
    reported = problems(override)
    assert len(reported) == 1
    assert reported[0].startswith(line)
    assert "\n" not in reported[0]


def test_all_wrong_overrides_are_reported_at_once():
    reported = problems(
        "a=[1", "model=x", "loss=cross_entropi", "modle=y", "seed=1,2", "trainer.max_epoch=3", "seed=4"
    )
    assert [re.split("[ :;]", line, maxsplit=2)[:2] for line in reported] == [
        ["cannot", "read"],
        ["seed=1,2", ""],
        ["model=x", ""],
        ["loss=cross_entropi", ""],
        ["unknown", "key"],
        ["unknown", "key"],
    ]


def test_a_key_of_a_chosen_option_is_known_and_of_another_is_not():
    assert composed("routing=uniform", "routing.bias=true")["routing"]["bias"] is True
    reported = problems("routing=uniform", "routing.iterations=3", "routing.bias=true")
    assert [line.partition(":")[0] for line in reported] == ["unknown key 'routing.iterations'"]


def test_a_mistake_is_reported_beside_an_option_of_the_users_own(own):
    folder = own("model/mine", MINE)
    with pytest.raises(UserError) as caught:
        compose("train", ["model=mine", "model.clas_dim=8"], config_dir=folder)
    assert caught.value.problems == ("unknown key 'model.clas_dim': did you mean 'model.class_dim'?",)
    with pytest.raises(UserError, match="model=min: no such option: did you mean 'mine'"):
        compose("train", ["model=min"], config_dir=folder)


def test_a_folder_that_is_not_there_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"^-cd .*/nothing: there is no such folder$"):
        compose("train", [], config_dir=str(tmp_path / "nothing"))


def test_a_root_config_that_is_not_there_is_reported():
    with pytest.raises(UserError, match="Cannot find primary config 'nope'"):
        compose("nope", [], config_dir=None)


def test_values_that_must_be_set_are_reported_by_name():
    assert problems("dataset=image_folder") == ["dataset.path has no value yet: set dataset.path=…"]
    reported = problems("dataset=image_folder", "seed=???")
    assert reported == [f"{key} has no value yet: set {key}=…" for key in ("dataset.path", "seed")]


def test_an_interpolation_that_leads_nowhere_is_reported():
    assert problems("seed=${nope}") == ["seed: Interpolation key 'nope' not found"]


def test_a_new_key_can_be_added_with_a_plus():
    assert composed("+trainer.x=1")["trainer"]["x"] == 1


@pytest.mark.parametrize(
    ("name", "known", "text"),
    [
        ("lernrate", ["learnrate", "seed"], ": did you mean 'learnrate'?"),
        ("lr", ["optimizer.lr", "seed"], ": did you mean 'optimizer.lr'?"),
        ("epz", ["loss.present", "optimizer.epsz"], ": did you mean 'optimizer.epsz'?"),
        ("zzz", ["b", "a"], "; choose from a, b"),
        ("zzz", [f"k{number}" for number in range(21)], ""),
    ],
)
def test_the_nearest_name_is_offered_or_all_when_they_are_few(name, known, text):
    assert nearest(name, known) == text


@pytest.mark.parametrize("known", [True, False])
def test_a_plugin_that_is_not_installed_is_named_with_its_extra(known, monkeypatch):
    monkeypatch.setattr(diagnosis, "EXTRAS", {"nomad": "cluster"} if known else {})
    with pytest.raises(UserError) as reported:
        compose("train", ["hydra/launcher=nomad_local"], config_dir=None, sweep=True)
    (line,) = reported.value.problems
    assert line.startswith("hydra/launcher=nomad_local: no such option")
    assert line.endswith(": it comes with capsexp's extra [cluster]") == known
