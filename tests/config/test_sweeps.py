"""Overrides with several values."""

from pathlib import Path

import pytest

from capsexp.config.compose import compose, conf_dir, to_plain
from capsexp.config.sweeps import swept_variants, with_constants_swept
from capsexp.errors import UserError

RECIPE = """
# @package _global_
defaults:
  - override /loss: cross_entropy
"""


def composed(*overrides, **keywords):
    return to_plain(compose("train", list(overrides), config_dir=None, **keywords))


def problems(*overrides, **keywords):
    with pytest.raises(UserError) as caught:
        composed(*overrides, **keywords)
    return list(caught.value.problems)


def test_a_sweep_is_checked_once_for_each_value():
    overrides = ["seed=1,2", "model=cnn_sabour", "loss.present=0.8,0.9,1.0", "trainer.max_epochs=range(1,4)"]
    variants = swept_variants(overrides, config_dir=None)
    fixed = ["seed=1", "model=cnn_sabour", "loss.present=0.8", "trainer.max_epochs=1"]
    changes = [[override for override in variant if override not in fixed] for variant in variants]
    assert changes == [
        ["seed=2"],
        ["loss.present=0.9"],
        ["loss.present=1.0"],
        ["trainer.max_epochs=2"],
        ["trainer.max_epochs=3"],
    ]
    assert all(len(variant) == 4 for variant in variants)


def test_a_sweep_over_all_options_is_checked_for_each(own):
    folder = own("experiment/recipe", RECIPE)
    names = {path.stem for path in Path(conf_dir(), "experiment").glob("*.yaml")} | {"recipe"}
    first = compose("train", ["experiment=glob(*)"], config_dir=folder, sweep=True)
    variants = swept_variants(["experiment=glob(*)"], config_dir=folder)
    swept = [first.hydra.runtime.choices.experiment, *(variant[0].partition("=")[2] for variant in variants)]
    assert sorted(swept) == sorted(names)


def test_nothing_swept_gives_no_variants():
    assert swept_variants(["seed=1", "model.decoder.hidden=[8,8]"], config_dir=None) == []


def test_in_a_sweep_the_first_values_stand():
    assert composed("seed=3,4", "model.decoder.hidden=[4,4],[8,8]", sweep=True)["seed"] == 3
    assert problems("sead=3,4", "loss=margin,mrgin", sweep=True) == [
        "loss=mrgin: no such option: did you mean 'margin'?",
        "unknown key 'sead': did you mean 'seed'?",
    ]


def test_constants_beside_a_swept_group_are_choices_of_one_so_that_hydra_asks_for_their_keys_last():
    arguments = ["experiment=quickstart,sabour2017_mnist", "dataset.root='a, b'"]
    arguments += ["+new=[1,2]", "~seed", "seed="]
    arguments += ["hydra.launcher.n_jobs=2", "loss=margin", "dataset.validation_instance=null"]
    expected = [arguments[0], "dataset.root=choice('a, b')", "+new=choice([1,2])", "~seed", "seed="]
    expected += ["hydra.launcher.n_jobs=2", "loss=choice(margin)"]
    expected += ["++dataset.validation_instance=null"]
    assert with_constants_swept(arguments, config_dir=None) == expected
    for others in (["seed=1,2", "run=x"], [*arguments, "hydra/sweeper=search"]):
        assert with_constants_swept(others, config_dir=None) == others
