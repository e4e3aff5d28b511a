import pytest

from capsexp.compare.columns import distinct_keys, frozen, resolve, setting_columns, short_titles, text
from capsexp.compare.runs import read
from capsexp.config.compose import compose, to_plain
from capsexp.config.settings import GROUPS
from capsexp.errors import Notes, UserError


@pytest.fixture
def run(write_run):
    """A run as it is read back; each call another one."""
    count = iter(range(100))
    return lambda *settings, **told: read(write_run(f"run{next(count)}", *settings, **told), Notes())


def titles(*runs, **options):
    return [column.title for column in setting_columns(runs, **options)]


def test_only_settings_that_differ_are_columns(run):
    assert titles(run(), run()) == []
    assert titles(run(), run({"seed": 1, "routing.iterations": 5})) == ["iterations", "seed"]
    assert titles(run({"run": "a"}), run({"run": "b", "device.name": "cuda"})) == []


def test_a_repeated_part_is_shown_once_unless_it_differs(run):
    runs = [run(), run({"routing.iterations": 5})]
    assert "model.routing.iterations" not in distinct_keys(runs)
    own = {"conv_channels": 8, "decoder": None, "routing": {"iterations": 9, "bias": False}}
    shown = ["routing.iterations", "hidden", "model.routing.iterations", "decoder"]
    assert titles(*runs, run({"model": own})) == shown


def test_equal_numbers_and_equal_lists_do_not_differ(run):
    assert titles(run({"model.conv_channels": 8}), run({"model.conv_channels": 8.0})) == []
    assert titles(run(), run({"model.decoder.hidden": [8, 9]})) == ["hidden"]
    assert frozen([{"a": [1]}]) == frozen([{"a": [1.0]}])


def test_titles_are_the_shortest_end_that_says_which_setting_is_meant():
    assert short_titles(["seed", "optimizer.weight_decay", "loss.weight_decay", "optimizer.lr.start"]) == {
        "seed": "seed",
        "optimizer.weight_decay": "optimizer.weight_decay",
        "loss.weight_decay": "loss.weight_decay",
        "optimizer.lr.start": "start",
    }
    # The names of figures and groups are taken.
    assert short_titles(["trainer.test", "x.model"]) == {"trainer.test": "trainer.test", "x.model": "x.model"}
    assert short_titles(["a.lr.start", "b.start"]) == {"a.lr.start": "lr.start", "b.start": "b.start"}


def test_where_the_choice_differs_it_stands_for_the_settings_that_come_with_it(run):
    """With the configs that users have: forty keys and more differ."""
    runs = []
    for model in ("em_routing", "dynamic_routing_small", "cnn_sabour"):
        composed = compose("train", [f"model={model}"], config_dir=None)
        choices = {group: composed.hydra.runtime.choices.get(group) for group in GROUPS}
        told = {group: choice for group, choice in choices.items() if choice}
        runs.append(run(config=to_plain(composed), choices=told))
    assert titles(*runs) == ["model", "routing", "loss", "optimizer"]


def test_settings_that_differ_within_a_choice_are_columns_too(run):
    a, b = ({"choices": {"model": name}} for name in "ab")
    of_b = {"conv_channels": 4, "layers": 3}
    assert titles(run(**a), run({"model": of_b}, **b)) == ["model"]
    assert titles(run(**a), run({"model": of_b}, **b), run({"model": {**of_b, "layers": 5}}, **b)) == [
        "model",
        "layers",
    ]


def test_what_was_typed_is_a_column_even_where_the_choice_would_explain_it(run, write_run):
    a, b = ({"choices": {"model": name}} for name in "ab")
    path = write_run("typed", {"model.conv_channels": 4}, **b)
    (path / "command.txt").write_text("capsexp train model=b 'model.conv_channels=4'")
    assert titles(run(**a), read(path, Notes())) == ["model", "conv_channels"]


def test_a_setting_that_a_version_did_not_know_is_no_difference(run):
    old, new = {"version": "0.0"}, {"loss.margin": 0.2}
    assert titles(run(**old), run(new)) == []
    assert titles(run(**old), run(new), run({"loss.margin": 0.3})) == ["margin"]
    # Of the same version one of the two was set up otherwise.
    assert titles(run(), run(new)) == ["margin"]


def test_a_run_whose_config_cannot_be_read_makes_no_column(run):
    assert titles(run(), run(config={})) == []


def test_a_group_without_choice_in_one_run_is_a_column(run):
    with_recipe = {"choices": {"model": "small", "dataset": "digits", "experiment": "quickstart"}}
    assert titles(run(), run(**with_recipe)) == ["experiment"]
    assert titles(run(choices={}), run(**with_recipe)) == []  # that run's status.json is damaged


def test_what_means_are_formed_over_is_no_column(run):
    runs = [run({"seed": seed, "optimizer.lr.start": seed / 10}) for seed in (1, 2)]
    assert titles(*runs, without=["seed"]) == ["start"]
    assert titles(*runs, without=["seed", "optimizer"]) == []


def test_names_resolve_to_the_only_setting_that_ends_so():
    offered = ["seed", "optimizer.weight_decay", "loss.weight_decay", "routing.iterations"]
    assert resolve("iterations", offered) == resolve("routing.iterations", offered) == "routing.iterations"
    assert resolve("model.routing.iterations", offered, among=["model.routing.iterations"])
    with pytest.raises(
        UserError, match=r"'weight_decay' may be optimizer\.weight_decay or loss\.weight_decay"
    ):
        resolve("weight_decay", offered)
    with pytest.raises(UserError, match=r"unknown key 'iteratons': did you mean 'routing\.iterations'"):
        resolve("iteratons", offered)


@pytest.mark.parametrize(
    ("value", "words"), [(None, "null"), (True, "true"), (1e-6, "1e-06"), ([1, "a"], '[1, "a"]'), ("x", "x")]
)
def test_settings_are_written_as_they_are_typed(value, words):
    assert text(value) == words
