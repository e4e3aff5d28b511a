"""conf/: one YAML for each module, and every option passes the checks."""

import inspect
from pathlib import Path

import pytest
import torch
import yaml

import capsexp
from capsexp.config import compose as compose_module
from capsexp.config.build import RUN_TIME, build_checked, build_components
from capsexp.config.compose import compose, conf_dir, to_plain
from capsexp.config.targets import resolve
from capsexp.errors import UserError
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


def bases(path):
    """The YAML's own stem and those that it extends."""
    yield path.stem
    for default in yaml.safe_load(path.read_text()).get("defaults", []):
        if isinstance(default, str) and default != "_self_":
            yield from bases(path.with_name(f"{default}.yaml"))


def merged(path):
    """The keys of a YAML and of those that it extends."""
    node = yaml.safe_load(path.read_text())
    keys = {key: value for key, value in node.items() if key != "defaults"}
    for default in node.get("defaults", []):
        if isinstance(default, str) and default != "_self_":
            keys = merged(path.with_name(f"{default}.yaml")) | keys
        elif isinstance(default, dict):
            ((where, option),) = default.items()
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
    if path.parent.name == "model":
        assert node.pop("init_from") is None  # of the run, not of the network
    assert set(node) <= set(parameters) - run_time
    if target.__module__.startswith("capsexp."):
        needed = {key for key, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
        assert needed <= set(node)
        assert partial or set(parameters) == set(node) | run_time
        assert all(parameters[key].default is inspect.Parameter.empty for key in node)


def is_table(path):
    return "table" in yaml.safe_load(path.read_text())


# A table is the sweep over others: see test_recipes.
@pytest.mark.parametrize(
    "path", [recipe for recipe in yamls("experiment") if not is_table(recipe)], ids=named
)
def test_each_experiment_composes_and_builds(path, tmp_path):
    components = build_components(composed(f"experiment={path.stem}", f"data_root={tmp_path}"), plugins=[])
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in components.new_model().parameters()) > 10_000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", yamls("study"), ids=named)
def test_every_study_passes_the_checks_and_a_wrong_key_is_reported(path):
    node = merged(path)
    assert build_checked(node, at="study", plugins=[])
    with pytest.raises(UserError, match=r"^study: unknown key 'foo'|study\.foo"):
        build_checked({**node, "foo": 1}, at="study", plugins=[])


# A study is no part of a run: it is chosen when there is one.
@pytest.mark.parametrize(
    "group", [*(group for group in ONE_TO_ONE if group != "study"), "optimizer", "trainer", "device"]
)
def test_every_option_passes_the_checks(group, tmp_path):
    for path in yamls(group):
        overrides = [f"{group}={path.stem}", f"data_root={tmp_path}"]
        overrides += ["dataset=affnist"] if group == "model" else []  # large enough for every network
        if path.stem == "image_folder":
            continue  # needs images: see its own test
        if path.stem in ("cuda", "mps") and not available()[path.stem]:
            with pytest.raises(UserError, match=f"^device: no {path.stem} device here; available: .*cpu"):
                build_components(composed(*overrides), plugins=[])
        elif group == "routing":
            assert build_components(composed(*overrides), plugins=[]).new_model().class_caps.routing
        else:
            assert build_components(composed(*overrides), plugins=[])


def test_experiment_quickstart_is_what_train_alone_does():
    assert composed("experiment=quickstart") == composed()


def test_the_cnn_beside_the_capsules_has_their_budget():
    capsules, cnn = (
        composed("experiment=hinton2018_smallnorb_laptop"),
        composed("experiment=hinton2018_smallnorb_laptop_baseline"),
    )
    assert cnn["trainer"] == capsules["trainer"]
    assert cnn["dataset"] == capsules["dataset"]
    for optimizer in (cnn["optimizer"], capsules["optimizer"]):
        del optimizer["lr"]["then"]["start"]  # chosen for each network
    assert cnn["optimizer"] == capsules["optimizer"]


def test_conf_of_a_checkout_is_the_checkouts_own():
    assert Path(__file__).resolve().parents[2] / "conf" == CONF


def test_without_conf_the_installation_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(compose_module, "__file__", str(tmp_path / "capsexp" / "config" / "compose.py"))
    with pytest.raises(FileNotFoundError, match=r"conf/train.yaml is neither in .* nor beside it"):
        conf_dir()


def test_conf_inside_the_package_comes_before_conf_beside_it(tmp_path, monkeypatch):
    for folder in ("capsexp/conf", "conf"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "train.yaml").touch()
    monkeypatch.setattr(compose_module, "__file__", str(tmp_path / "capsexp" / "config" / "compose.py"))
    assert conf_dir() == str(tmp_path / "capsexp" / "conf")
