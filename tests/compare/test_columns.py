import pytest

from capsexp.compare.columns import (
    as_override,
    distinct_keys,
    full_key,
    hashable,
    setting_columns,
    short_titles,
)
from capsexp.compare.runs import read
from capsexp.config.compose import compose, to_plain
from capsexp.config.settings import GROUPS
from capsexp.errors import Notes, UserError


@pytest.fixture
def run(write_run):
    """Write a run and read it back; each call makes another run."""
    count = iter(range(100))
    return lambda *settings, **files: read(write_run(f"run{next(count)}", *settings, **files), Notes())


def titles(*runs, **options):
    return [column.title for column in setting_columns(runs, **options)]


def test_only_settings_that_differ_are_columns(run):
    assert titles(run(), run()) == []
    assert titles(run(), run({"seed": 1, "routing.iterations": 5})) == ["iterations", "seed"]
    assert titles(run({"run": "a"}), run({"run": "b", "device.name": "cuda"})) == []


def test_a_copied_setting_is_shown_once_unless_it_differs(run):
    runs = [run(), run({"routing.iterations": 5})]
    assert "model.routing.iterations" not in distinct_keys(runs)
    own = {"conv_channels": 8, "decoder": None, "routing": {"iterations": 9, "bias": False}}
    shown = ["routing.iterations", "hidden", "model.routing.iterations", "decoder"]
    assert titles(*runs, run({"model": own})) == shown


def test_equal_numbers_and_equal_lists_do_not_differ(run):
    assert titles(run({"model.conv_channels": 8}), run({"model.conv_channels": 8.0})) == []
    assert titles(run(), run({"model.decoder.hidden": [8, 9]})) == ["hidden"]
    assert hashable([{"a": [1]}]) == hashable([{"a": [1.0]}])


def test_titles_are_the_shortest_unique_suffixes():
    assert short_titles(["seed", "optimizer.weight_decay", "loss.weight_decay", "optimizer.lr.start"]) == {
        "seed": "seed",
        "optimizer.weight_decay": "optimizer.weight_decay",
        "loss.weight_decay": "loss.weight_decay",
        "optimizer.lr.start": "start",
    }
    # The names of metrics and groups are taken.
    assert short_titles(["trainer.test", "x.model"]) == {"trainer.test": "trainer.test", "x.model": "x.model"}
    assert short_titles(["a.lr.start", "b.start"]) == {"a.lr.start": "lr.start", "b.start": "b.start"}


def test_a_differing_choice_hides_the_settings_that_come_with_it(run):
    """Use real configs, in which more than forty settings differ."""
    runs = []
    for model in ("em_routing", "dynamic_routing_small", "cnn_sabour"):
        composed = compose("train", [f"model={model}"], config_dir=None)
        choices = {group: composed.hydra.runtime.choices.get(group) for group in GROUPS}
        chosen = {group: choice for group, choice in choices.items() if choice}
        runs.append(run(config=to_plain(composed), choices=chosen))
    assert titles(*runs) == ["model", "routing", "loss", "optimizer"]


def test_settings_that_differ_within_a_choice_are_columns_too(run):
    a, b = ({"choices": {"model": name}} for name in "ab")
    of_b = {"conv_channels": 4, "layers": 3}
    assert titles(run(**a), run({"model": of_b}, **b)) == ["model"]
    assert titles(run(**a), run({"model": of_b}, **b), run({"model": {**of_b, "layers": 5}}, **b)) == [
        "model",
        "layers",
    ]


def test_a_typed_setting_is_a_column_even_if_the_choice_explains_it(run, write_run):
    a, b = ({"choices": {"model": name}} for name in "ab")
    path = write_run("typed", {"model.conv_channels": 4}, **b)
    (path / "command.txt").write_text("capsexp train model=b 'model.conv_channels=4'")
    assert titles(run(**a), read(path, Notes())) == ["model", "conv_channels"]


def test_a_setting_that_a_version_lacks_is_no_difference(run):
    old, new = {"version": "0.0"}, {"loss.margin": 0.2}
    assert titles(run(**old), run(new)) == []
    assert titles(run(**old), run(new), run({"loss.margin": 0.3})) == ["margin"]
    # With equal versions, a missing setting is a difference.
    assert titles(run(), run(new)) == ["margin"]


def test_a_run_whose_config_cannot_be_read_makes_no_column(run):
    assert titles(run(), run(config={})) == []


def test_a_group_without_a_choice_in_one_run_is_a_column(run):
    with_recipe = {"choices": {"model": "small", "dataset": "digits", "experiment": "quickstart"}}
    assert titles(run(), run(**with_recipe)) == ["experiment"]
    assert titles(run(choices={}), run(**with_recipe)) == []  # the status.json of the first run is damaged


def test_averaged_settings_are_no_columns(run):
    runs = [run({"seed": seed, "optimizer.lr.start": seed / 10}) for seed in (1, 2)]
    assert titles(*runs, without=["seed"]) == ["start"]
    assert titles(*runs, without=["seed", "optimizer"]) == []


def test_a_unique_suffix_names_a_setting():
    keys = ["seed", "optimizer.weight_decay", "loss.weight_decay", "routing.iterations"]
    assert full_key("iterations", keys) == full_key("routing.iterations", keys) == "routing.iterations"
    assert full_key("model.routing.iterations", keys, unlisted=["model.routing.iterations"])
    with pytest.raises(
        UserError, match=r"'weight_decay' is ambiguous: write optimizer\.weight_decay or loss\.weight_decay"
    ):
        full_key("weight_decay", keys)
    with pytest.raises(UserError, match=r"unknown key 'iteratons': did you mean 'routing\.iterations'"):
        full_key("iteratons", keys)


@pytest.mark.parametrize(
    ("value", "string"), [(None, "null"), (True, "true"), (1e-6, "1e-06"), ([1, "a"], '[1, "a"]'), ("x", "x")]
)
def test_settings_are_written_as_overrides(value, string):
    assert as_override(value) == string
