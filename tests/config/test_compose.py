import copy
import functools
import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import capsexp
from capsexp.config import compose as config
from capsexp.config.build import RUN_TIME, build_components, checked_part, resolve
from capsexp.config.compose import (
    HYDRA_1_3,
    compose,
    conf_dir,
    swept_variants,
    to_plain,
    with_constants_swept,
)
from capsexp.config.saved import store_as_primary
from capsexp.errors import UserError, nearest
from capsexp.schedule import Linear, Step, Warmup
from capsexp.training.device import available

CONF = Path(conf_dir())
CODE = Path(inspect.getfile(capsexp)).parent
ONE_TO_ONE = ("model", "routing", "dataset", "loss", "study")


def yamls(*groups):
    return sorted(path for group in groups for path in (CONF / group).rglob("*.yaml"))


def named(path):
    return "/".join(path.relative_to(CONF).with_suffix("").parts)


def composed(*overrides, **keywords):
    return to_plain(compose("train", list(overrides), config_dir=None, **keywords))


@functools.cache
def quickstart():
    return composed()


def problems(*overrides, **keywords):
    with pytest.raises(UserError) as caught:
        composed(*overrides, **keywords)
    return list(caught.value.problems)


@pytest.fixture
def own(tmp_path):
    """Write a YAML into a folder of a user's own configs; returns the folder."""

    def write(name, text):
        path = tmp_path / "own" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(tmp_path / "own")

    return write


# One YAML, one module


def bases(path):
    """The YAML's own stem and those that it extends."""
    yield path.stem
    for one in yaml.safe_load(path.read_text()).get("defaults", []):
        if isinstance(one, str) and one != "_self_":
            yield from bases(path.with_name(f"{one}.yaml"))


def merged(path):
    """The keys of a YAML and of those that it extends."""
    node = yaml.safe_load(path.read_text())
    keys = {key: value for key, value in node.items() if key != "defaults"}
    for one in node.get("defaults", []):
        if isinstance(one, str) and one != "_self_":
            keys = merged(path.with_name(f"{one}.yaml")) | keys
        elif isinstance(one, dict):
            ((where, option),) = one.items()
            group, _, key = where.removeprefix("/").partition("@")
            if not where.startswith("override"):
                keys = {key: merged(CONF / group / f"{option}.yaml")} | keys
    return keys


def test_every_group_has_options_and_every_folder_modules():
    for group in (*ONE_TO_ONE, "optimizer", "device", "trainer", "experiment"):
        assert len(yamls(group)) >= 2
    assert len(yamls(*ONE_TO_ONE)) >= 13


@pytest.mark.parametrize("path", yamls(*ONE_TO_ONE), ids=named)
def test_a_yaml_names_the_module_of_its_own_stem_or_of_one_that_it_extends(path):
    group = path.relative_to(CONF).parts[0]
    module = merged(path)["_target_"].rpartition(".")[0]
    assert module in [f"capsexp.{group}.{stem}" for stem in bases(path)]


@pytest.mark.parametrize("group", ONE_TO_ONE)
def test_each_module_has_its_yaml(group):
    modules = {path.stem for path in (CODE / group).rglob("*.py") if path.stem != "__init__"}
    assert modules
    assert modules <= {path.stem for path in yamls(group)}


@pytest.mark.parametrize("path", yamls(*ONE_TO_ONE, "optimizer", "device", "trainer"), ids=named)
def test_the_keys_of_a_yaml_bind_to_its_targets_signature(path):
    node = merged(path)
    target = resolve(node.pop("_target_"))
    parameters = inspect.signature(target).parameters
    run_time = RUN_TIME.get(path.relative_to(CONF).parts[0], set())
    partial = node.pop("_partial_", False)
    assert set(node) <= set(parameters) - run_time
    if target.__module__.startswith("capsexp."):
        needed = {key for key, one in parameters.items() if one.kind is one.KEYWORD_ONLY}
        assert needed <= set(node)
        assert partial or set(parameters) == set(node) | run_time
        assert all(parameters[key].default is inspect.Parameter.empty for key in node)


def is_table(path):
    return "table" in yaml.safe_load(path.read_text())


# A table is the sweep over others: see test_recipes.
@pytest.mark.parametrize("path", [one for one in yamls("experiment") if not is_table(one)], ids=named)
def test_each_experiment_composes_and_builds(path, tmp_path):
    components = build_components(composed(f"experiment={path.stem}", f"data_root={tmp_path}"), plugins=[])
    with torch.device("meta"):
        assert sum(one.numel() for one in components.new_model().parameters()) > 10_000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", yamls("study"), ids=named)
def test_every_study_passes_the_checks_and_a_wrong_key_is_told(path):
    node = merged(path)
    assert checked_part(node, at="study", plugins=[])
    with pytest.raises(UserError, match=r"^study: unknown key 'foo'|study\.foo"):
        checked_part({**node, "foo": 1}, at="study", plugins=[])


# A study is no part of a run: it is chosen when there is one.
@pytest.mark.parametrize(
    "group", [*(group for group in ONE_TO_ONE if group != "study"), "optimizer", "trainer", "device"]
)
def test_every_option_passes_the_checks(group, tmp_path):
    for path in yamls(group):
        overrides = [f"{group}={path.stem}", f"data_root={tmp_path}"]
        overrides += ["dataset=mnist"] if group == "model" else []  # large enough for every network
        if path.stem == "image_folder":
            continue  # needs pictures: see its own test
        if path.stem in ("cuda", "mps") and not available()[path.stem]:
            with pytest.raises(UserError, match=f"^device: no {path.stem} device here; there is .*cpu"):
                build_components(composed(*overrides), plugins=[])
        elif group == "routing":
            assert build_components(composed(*overrides), plugins=[]).new_model().class_caps.routing
        else:
            assert build_components(composed(*overrides), plugins=[])


def test_experiment_quickstart_is_what_train_alone_does():
    assert composed("experiment=quickstart") == composed()


def test_conf_of_a_checkout_is_the_checkouts_own():
    assert Path(__file__).resolve().parents[2] / "conf" == CONF


def test_without_conf_the_installation_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "__file__", str(tmp_path / "capsexp" / "config" / "compose.py"))
    with pytest.raises(FileNotFoundError, match=r"conf/train.yaml is neither in .* nor beside it"):
        conf_dir()


def test_conf_inside_the_package_comes_before_conf_beside_it(tmp_path, monkeypatch):
    for folder in ("capsexp/conf", "conf"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "train.yaml").touch()
    monkeypatch.setattr(config, "__file__", str(tmp_path / "capsexp" / "config" / "compose.py"))
    assert conf_dir() == str(tmp_path / "capsexp" / "conf")


# Who wins


def test_the_command_line_wins_over_an_experiment_over_a_group():
    assert composed()["loss"]["reconstruction_weight"] == 0.0005
    assert composed("experiment=sabour2017_mnist_official")["loss"]["reconstruction_weight"] == 0.01
    both = composed("experiment=sabour2017_mnist_official", "loss.reconstruction_weight=0.5")
    assert both["loss"]["reconstruction_weight"] == 0.5


def test_a_model_brings_its_loss_and_its_routing():
    baseline = composed("model=cnn_sabour")
    assert baseline["loss"]["_target_"] == "capsexp.loss.cross_entropy.CrossEntropy"
    assert baseline.get("routing") is None
    assert build_components(baseline, plugins=[]).new_model is not None


def test_the_command_line_wins_over_what_a_model_brings():
    assert composed("model=cnn_sabour", "loss=margin")["loss"]["_target_"] == "capsexp.loss.margin.Margin"
    assert composed("loss=margin", "model=cnn_sabour")["loss"]["_target_"] == "capsexp.loss.margin.Margin"
    assert composed("model=cnn_sabour", "optimizer=sgd")["optimizer"]["_target_"] == "torch.optim.SGD"
    uniform = composed("model=dynamic_routing", "routing=uniform")
    assert uniform["model"]["routing"] == uniform["routing"]
    assert uniform["routing"]["_target_"] == "capsexp.routing.uniform.UniformRouting"


MINE = """
defaults:
  - dynamic_routing
  - _self_
  - override /optimizer@_global_.optimizer: sgd
class_dim: 4
"""
RECIPE = """
# @package _global_
defaults:
  - override /model: mine
  - override /loss: cross_entropy
model:
  class_dim: 6
"""


def test_an_experiment_wins_over_what_its_model_brings(own):
    folder = own("model/mine", MINE)
    mine = to_plain(compose("train", ["model=mine"], config_dir=folder))
    assert mine["optimizer"]["_target_"] == "torch.optim.SGD"
    assert mine["loss"]["_target_"] == "capsexp.loss.margin.Margin"
    assert mine["model"]["class_dim"] == 4
    own("experiment/recipe", RECIPE)
    recipe = to_plain(compose("train", ["experiment=recipe"], config_dir=folder))
    assert recipe["loss"]["_target_"] == "capsexp.loss.cross_entropy.CrossEntropy"
    assert recipe["optimizer"]["_target_"] == "torch.optim.SGD"
    assert recipe["model"]["class_dim"] == 6
    last = to_plain(
        compose("train", ["experiment=recipe", "optimizer=adam", "model.class_dim=8"], config_dir=folder)
    )
    assert last["optimizer"]["_target_"] == "torch.optim.Adam"
    assert last["model"]["class_dim"] == 8


def test_a_users_own_root_config_is_found_in_a_users_own_folder(own):
    folder = own("mine", "defaults: [train, _self_]\nseed: 7\n")
    assert to_plain(compose("mine", [], config_dir=folder))["seed"] == 7


def test_a_shipped_option_cannot_be_shadowed(own):
    folder = own("loss/margin", "_target_: mine.Margin\n")
    assert (
        to_plain(compose("train", [], config_dir=folder))["loss"]["_target_"] == "capsexp.loss.margin.Margin"
    )


# Mistakes


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
        ("loss=xyzzy", "loss=xyzzy: no such option; there is cross_entropy, margin"),
        ("experiment=quikstart", "experiment=quikstart: no such option: did you mean 'quickstart'?"),
        ("routing=null", "routing=null: no such option; there is dynamic, em, uniform"),
        (
            "model=3",
            "model=3: no such option; there is cnn_affnist, cnn_hinton, cnn_multimnist, cnn_sabour, "
            "dynamic_routing, dynamic_routing_small, em_routing, em_routing_310k",
        ),
        ("seed", "cannot read 'seed': missing EQUAL at '<EOF>'; an override reads KEY=VALUE"),
        ("=3", "cannot read '=3': no key; an override reads KEY=VALUE"),
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
    if override.startswith("model.routing.") and not HYDRA_1_3:
        pytest.skip("Hydra 1.4 follows the interpolation and sets routing.iterations")
    told = problems(override)
    assert len(told) == 1
    assert told[0].startswith(line)
    assert "\n" not in told[0]


def test_all_wrong_overrides_are_told_at_once():
    told = problems(
        "a=[1", "model=x", "loss=cross_entropi", "modle=y", "seed=1,2", "trainer.max_epoch=3", "seed=4"
    )
    assert [re.split("[ :;]", line, maxsplit=2)[:2] for line in told] == [
        ["cannot", "read"],
        ["seed=1,2", ""],
        ["model=x", ""],
        ["loss=cross_entropi", ""],
        ["unknown", "key"],
        ["unknown", "key"],
    ]


def test_a_key_of_a_chosen_option_is_known_and_of_another_is_not():
    assert composed("routing=uniform", "routing.bias=true")["routing"]["bias"] is True
    told = problems("routing=uniform", "routing.iterations=3", "routing.bias=true")
    assert [line.partition(":")[0] for line in told] == ["unknown key 'routing.iterations'"]


def test_a_mistake_is_told_beside_an_option_of_the_users_own(own):
    folder = own("model/mine", MINE)
    with pytest.raises(UserError) as caught:
        compose("train", ["model=mine", "model.clas_dim=8"], config_dir=folder)
    assert caught.value.problems == ("unknown key 'model.clas_dim': did you mean 'model.class_dim'?",)
    with pytest.raises(UserError, match="model=min: no such option: did you mean 'mine'"):
        compose("train", ["model=min"], config_dir=folder)


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match=r"^-cd .*/nothing: there is no such folder$"):
        compose("train", [], config_dir=str(tmp_path / "nothing"))


def test_a_root_config_that_is_not_there_is_told():
    with pytest.raises(UserError, match="Cannot find primary config 'nope'"):
        compose("nope", [], config_dir=None)


def test_values_that_must_be_set_are_told_by_name():
    assert problems("dataset=image_folder") == ["dataset.path has no value yet: set dataset.path=…"]
    told = problems("dataset=image_folder", "seed=???")
    assert told == [f"{key} has no value yet: set {key}=…" for key in ("dataset.path", "seed")]


def test_an_interpolation_that_leads_nowhere_is_told():
    assert problems("seed=${nope}") == ["Interpolation key 'nope' not found"]


def test_a_new_key_can_be_added_with_a_plus():
    assert composed("+trainer.x=1")["trainer"]["x"] == 1


@pytest.mark.parametrize(
    ("name", "known", "text"),
    [
        ("lernrate", ["learnrate", "seed"], ": did you mean 'learnrate'?"),
        ("lr", ["optimizer.lr", "seed"], ": did you mean 'optimizer.lr'?"),
        ("epz", ["loss.present", "optimizer.epsz"], ": did you mean 'optimizer.epsz'?"),
        ("zzz", ["b", "a"], "; there is a, b"),
        ("zzz", [f"k{number}" for number in range(21)], ""),
    ],
)
def test_the_nearest_name_is_offered_or_all_when_they_are_few(name, known, text):
    assert nearest(name, known) == text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (key, 0, f"{key} must be >= 1, got 0")
        for key in ("max_epochs", "max_steps", "batch_size", "accumulate")
    ]
    + [(key, 0, f"{key} must be >= 1, got 0") for key in ("validate_every", "log_every", "images_every")]
    + [(key, 0, f"{key} must be >= 1, got 0") for key in ("save_every", "keep_every")]
    + [(key, -1, f"{key} must be >= 1, got -1") for key in ("limit_train_batches", "limit_eval_batches")]
    + [("grad_clip", value, f"grad_clip must be > 0, got {value}") for value in (0, -1.5)]
    + [("ema_decay", value, rf"ema_decay must be in \(0, 1\), got {value}") for value in (0.0, 1.0, 1.5)]
    + [("accumulate", 9999, r"accumulate must be <= batch_size \(\d+\), got 9999")],
)
def test_a_setting_of_the_trainer_out_of_range_is_told(key, value, message):
    settings = copy.deepcopy(quickstart())
    settings["trainer"][key] = value
    with pytest.raises(UserError, match=f"^trainer: {message}$"):
        build_components(settings, plugins=[])


# One-liners


def loss_of(*overrides, **keywords):
    keywords.setdefault("config_dir", None)
    return build_components(to_plain(compose("train", list(overrides), **keywords)), plugins=[]).loss


def rate(*overrides):
    return build_components(composed(*overrides), plugins=[]).learning_rate


def test_a_learning_rate_may_be_a_number():
    assert [rate("optimizer.lr=0.01")(Step(number, 10)) for number in (0, 5, 10)] == [0.01] * 3
    assert rate("optimizer.lr=1")(Step(3, 10)) == 1.0


def test_a_learning_rate_may_be_bent_in_one_place():
    assert rate("optimizer.lr.start=0.5")(Step(0, 10)) == 0.5
    assert rate("optimizer=sgd")(Step(0, 10)) == 0.05
    assert rate("optimizer=sgd")(Step(10, 10)) == 0.0


LINEAR = "{_target_: capsexp.schedule.Linear, start: 0.0, end: 0.01, steps: 0.5}"


def test_a_learning_rate_may_get_another_schedule():
    schedule = rate("~optimizer.lr", f"+optimizer.lr={LINEAR}")
    assert isinstance(schedule, Linear)
    assert [schedule(Step(number, 10)) for number in (0, 5)] == [0.0, 0.01]


def test_a_schedule_may_stand_for_a_weight_on_the_command_line():
    weight = loss_of(f"loss.reconstruction_weight={LINEAR}").reconstruction_weight
    assert isinstance(weight, Linear)
    assert weight(Step(50, 100)) == 0.01
    nested = f"{{_target_: capsexp.schedule.Warmup, steps: 10, then: {LINEAR}}}"
    assert isinstance(loss_of(f"loss.reconstruction_weight={nested}").reconstruction_weight.then, Linear)


def test_a_schedule_may_stand_for_a_weight_in_a_users_yaml(own):
    text = "defaults: [margin, _self_]\nreconstruction_weight:\n  _target_: capsexp.schedule.Warmup\n"
    folder = own("loss/ramped", f"{text}  steps: 0.5\n  then: 0.5\n")
    loss = loss_of("loss=ramped", config_dir=folder)
    assert isinstance(loss.reconstruction_weight, Warmup)
    assert loss.reconstruction_weight(Step(99, 100)) == 0.5
    assert loss.present == 0.9


def test_a_mistake_in_a_schedule_is_told_by_its_key():
    with pytest.raises(UserError, match=r"^loss.reconstruction_weight: steps must be an integer >= 1"):
        loss_of(f"loss.reconstruction_weight={LINEAR.replace('0.5', '2.5')}")
    with pytest.raises(UserError, match=r"^loss.reconstruction_weight.begin: Linear takes no 'begin'"):
        loss_of(f"loss.reconstruction_weight={LINEAR.replace('start', 'begin')}")


def test_places_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("CAPSEXP_DATA", "/a/b")
    monkeypatch.setenv("CAPSEXP_OUTPUTS", "/c")
    mnist = composed("dataset=mnist")
    assert (mnist["dataset"]["root"], mnist["output_root"]) == ("/a/b", "/c")
    assert composed("dataset=mnist", "data_root=/x")["dataset"]["root"] == "/x"


# Sweeps


def test_a_sweep_is_checked_once_for_each_value():
    overrides = ["seed=1,2", "model=cnn_sabour", "loss.present=0.8,0.9,1.0", "trainer.max_epochs=range(1,4)"]
    variants = swept_variants(overrides, config_dir=None)
    fixed = ["seed=1", "model=cnn_sabour", "loss.present=0.8", "trainer.max_epochs=1"]
    changes = [[one for one in variant if one not in fixed] for variant in variants]
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
    names = {path.stem for path in yamls("experiment")} | {"recipe"}
    first = compose("train", ["experiment=glob(*)"], config_dir=folder, sweep=True)
    variants = swept_variants(["experiment=glob(*)"], config_dir=folder)
    swept = [first.hydra.runtime.choices.experiment, *(one[0].partition("=")[2] for one in variants)]
    assert sorted(swept) == sorted(names)


def test_nothing_swept_gives_no_variants():
    assert swept_variants(["seed=1", "model.decoder.hidden=[8,8]"], config_dir=None) == []


def test_in_a_sweep_the_first_values_stand():
    assert composed("seed=3,4", "model.decoder.hidden=[4,4],[8,8]", sweep=True)["seed"] == 3
    assert problems("sead=3,4", "loss=margin,mrgin", sweep=True) == [
        "loss=mrgin: no such option: did you mean 'margin'?",
        "unknown key 'sead': did you mean 'seed'?",
    ]


# A run's own config as a root


@pytest.fixture
def stored():
    node = OmegaConf.to_container(compose("train", ["loss.present=0.8"], config_dir=None), resolve=False)
    del node["hydra"]
    return node


def as_root(stored, *overrides):
    store_as_primary(stored, extra={"part": "test"}, name="stored_test")
    return compose("stored_test", list(overrides), config_dir=None)


def test_a_stored_config_comes_back_as_it_was(stored):
    back = to_plain(as_root(stored))
    assert back.pop("part") == "test"
    assert back == composed("loss.present=0.8")


def test_a_stored_config_takes_overrides_and_other_options(stored):
    changed = to_plain(as_root(stored, "routing.iterations=5", "dataset=mnist", "part=train"))
    assert changed["model"]["routing"]["iterations"] == 5
    assert changed["dataset"]["_target_"].endswith("MNIST")
    assert (changed["part"], changed["loss"]["present"]) == ("train", 0.8)


def test_a_wrong_override_of_a_stored_config_is_told(stored):
    with pytest.raises(
        UserError, match=r"unknown key 'routing.iteration': did you mean 'routing.iterations'"
    ):
        as_root(stored, "routing.iteration=5")


def test_a_stored_config_without_a_routing_comes_back():
    node = OmegaConf.to_container(compose("train", ["model=cnn_sabour"], config_dir=None), resolve=False)
    del node["hydra"]
    for change in ({}, {"routing": None}):
        back = to_plain(as_root(node | change))
        assert back["model"]["_target_"] == "capsexp.model.cnn_sabour.CNN"
        assert back.get("routing") is None


def test_what_could_start_code_is_left_out_of_a_stored_config(stored):
    hostile = {"x": {"_target_": "a.b"}}
    moved = {"defaults": ["_self_", {"/loss@_global_.hydra": "stored"}]}
    extra = {
        "hydra": {"callbacks": hostile},
        "defaults": ["a"],
        "plugins": ["os"],
        "experiment": {"callbacks": hostile},
    }
    root = as_root(stored | extra | {"model": stored["model"] | moved})
    assert to_plain(root)["plugins"] == []
    assert root.hydra.callbacks == {}
    assert "defaults" not in root.model
    assert ConfigStore.instance().load("model/stored.yaml").node.get("defaults") is None


@pytest.mark.parametrize("known", [True, False])
def test_a_plugin_that_is_not_installed_is_named_with_its_extra(known, monkeypatch):
    monkeypatch.setattr(config, "EXTRAS", {"nomad": "cluster"} if known else {})
    with pytest.raises(UserError) as told:
        compose("train", ["hydra/launcher=nomad_local"], config_dir=None, sweep=True)
    (line,) = told.value.problems
    assert line.startswith("hydra/launcher=nomad_local: no such option")
    assert line.endswith(": it comes with capsexp's extra [cluster]") == known


def test_constants_beside_a_swept_group_are_choices_of_one_so_that_hydra_asks_for_their_keys_last():
    words = ["experiment=quickstart,sabour2017_mnist", "dataset.root='a, b'", "+new=[1,2]", "~seed", "seed="]
    words += ["hydra.launcher.n_jobs=2", "loss=margin", "dataset.validation_instance=null"]
    expected = [words[0], "dataset.root=choice('a, b')", "+new=choice([1,2])", "~seed", "seed="]
    expected += ["hydra.launcher.n_jobs=2", "loss=choice(margin)"]
    expected += ["++dataset.validation_instance=null"]
    assert with_constants_swept(words, config_dir=None) == expected
    for others in (["seed=1,2", "run=x"], [*words, "hydra/sweeper=search"]):
        assert with_constants_swept(others, config_dir=None) == others
