"""What a config may build, and how it is told that it may not."""

import copy
import functools
import logging
import logging.config
import operator
import os
import pickle
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from capsexp.cli import main as cli
from capsexp.config.build import build, build_components, resolve
from capsexp.config.compose import compose, conf_dir, to_plain
from capsexp.errors import UserError
from capsexp.schedule import Linear, Warmup

NARROW = "torch.nn.modules.module.torch"
HANDLER = "distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler"


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path):
    """Is created by whatever of the hostile nodes runs."""
    return tmp_path / "it_ran"


@pytest.fixture
def hostile(tmp_path, marker):
    """The arguments with which each of runner's hostile targets would create the marker."""
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "hubconf.py").write_text(f"import os\nos.mkdir({str(marker)!r})\ndef network():\n    return 1\n")
    (tmp_path / "payload.pt").write_bytes(pickle.dumps(Payload(marker)))
    loaded = {"repo_or_dir": str(hub), "model": "network", "source": "local", "trust_repo": True}
    handled = {"entrypoint": "touch", "args": [str(marker)], "env": {}, "stdout": None, "stderr": None}
    handled |= {"local_rank_id": 0, "numa_options": None}
    return {
        "torch.os.getpid": {},
        "torch.os.system": {"command": f"touch {marker}"},
        "torch.builtins.eval": {"_args_": [f"open({str(marker)!r}, 'w')"]},
        "torch.serialization.pickle.loads": {"_args_": ["cos\nsystem\n(S'true'\ntR."]},
        "torch.hub.load": loaded,
        "torch.load": {"f": str(tmp_path / "payload.pt"), "weights_only": False},
        "torch.utils.cpp_extension.load_inline": {"name": "x", "cpp_sources": "int x;", "functions": []},
        f"torch.{HANDLER}": handled,
        f"{NARROW}.hub.load": loaded,
        f"{NARROW}.{HANDLER}": handled,
    }


HOSTILE = (
    "torch.os.getpid",
    "torch.os.system",
    "torch.builtins.eval",
    "torch.serialization.pickle.loads",
    "torch.hub.load",
    "torch.load",
    "torch.utils.cpp_extension.load_inline",
    f"torch.{HANDLER}",
    f"{NARROW}.hub.load",
    f"{NARROW}.{HANDLER}",
)


@functools.cache
def quickstart():
    return to_plain(compose("train", [], config_dir=None))


def composed(*changes):
    """The quickstart's config with keys set (`key=value`) or taken out (`~key`), whatever Hydra would say."""
    settings = copy.deepcopy(quickstart())
    settings["model"]["routing"] = settings["routing"]  # one node, as ${routing} makes it
    for change in changes:
        key, _, text = change.lstrip("~").partition("=")
        *folders, leaf = key.split(".")
        node = functools.reduce(operator.getitem, folders, settings)
        if change.startswith("~"):
            del node[leaf]
        else:
            node[leaf] = yaml.safe_load(text)
    return settings


def problems(settings, plugins=()):
    """What `components` has to say, which must be something."""
    with pytest.raises(UserError) as caught:
        build_components(settings, plugins=list(plugins))
    return list(caught.value.problems)


@pytest.fixture
def capsexp(monkeypatch, capsys, tmp_path):
    """Run the command line in this process; returns exit code, stdout, stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["capsexp", *map(str, words)])
        monkeypatch.setenv("CAPSEXP_OUTPUTS", str(tmp_path / "outputs"))
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        try:
            code = cli.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    root = logging.getLogger()
    before = list(root.handlers)
    yield call
    for handler in set(root.handlers) - set(before):
        root.removeHandler(handler)
        handler.close()


@pytest.fixture
def stored_run(tmp_path):
    """Make a run directory of a config, as somebody might send one; returns its path."""

    def make(**changes):
        settings = OmegaConf.to_container(compose("train", [], config_dir=None), resolve=False)
        del settings["hydra"]
        path = tmp_path / "sent"
        (path / ".hydra").mkdir(parents=True)
        OmegaConf.save(OmegaConf.create(settings | changes), path / ".hydra" / "config.yaml")
        return path

    return make


@pytest.fixture
def mischief(tmp_path, monkeypatch, marker):
    """A package that creates the marker when it is imported."""
    (tmp_path / "packages" / "mischief").mkdir(parents=True)
    text = f"import os\nos.mkdir({str(marker)!r})\nclass Thing:\n    pass\n"
    (tmp_path / "packages" / "mischief" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    yield "mischief"
    sys.modules.pop("mischief", None)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A user's own package."""
    (tmp_path / "packages").mkdir(exist_ok=True)
    text = """
        import os
        from capsexp.loss.margin import Margin

        class Loss(Margin):
            pass

        def loss(**keywords):
            return Margin(**keywords)

        def no_annotations(a, b):
            return a, b
    """
    (tmp_path / "packages" / "mine.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    yield "mine"
    sys.modules.pop("mine", None)


# What a config may name


@pytest.mark.parametrize("target", [name for name in HOSTILE if name.endswith((".load", ".system", HANDLER))])
def test_the_hostile_arguments_do_create_the_marker_when_called(target, hostile, marker):
    arguments = hostile[target]
    if target.endswith("hub.load"):
        torch.hub.load(**arguments)
    elif target.endswith("SubprocessHandler"):
        SubprocessHandler(**arguments | {"args": tuple(arguments["args"])}).proc.wait()
    elif target == "torch.os.system":
        os.system(arguments["command"])
    else:
        with pytest.raises(RuntimeError, match="Invalid magic number"):  # by then it has run
            torch.load(**arguments)
    assert marker.exists()


def at_top(settings, node):
    settings["loss"] = node
    return "loss"


def under_a_key_of_its_own(settings, node):
    settings["extra"] = {"a": node}
    return "extra.a"


def in_a_dict(settings, node):
    settings["loss"]["reconstruction_weight"] = node
    return "loss.reconstruction_weight"


def in_a_list(settings, node):
    settings["model"]["decoder"]["hidden"] = [8, node]
    return "model.decoder.hidden.1"


def in_a_schedule_in_a_schedule(settings, node):
    settings["optimizer"]["lr"] = {"_target_": "capsexp.schedule.Warmup", "steps": 1, "then": node}
    return "optimizer.lr.then"


PLACES = (at_top, under_a_key_of_its_own, in_a_dict, in_a_list, in_a_schedule_in_a_schedule)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("target", HOSTILE)
def test_a_hostile_target_is_refused_wherever_it_stands(target, place, hostile, marker):
    settings = composed()
    at = place(settings, {"_target_": target, **hostile[target]})
    told = [line for line in problems(settings) if f"{at}._target_: '{target}' may not be built" in line]
    assert len(told) == 1
    assert not marker.exists()


@pytest.mark.parametrize("target", HOSTILE)
def test_building_a_hostile_node_by_itself_is_refused(target, hostile, marker):
    with pytest.raises(UserError, match=f"'{re.escape(target)}' may not be built from a config"):
        build({"_target_": target, **hostile[target]}, at="x")
    with pytest.raises(UserError, match=f"'{re.escape(target)}' may not be built from a config"):
        build([{"a": [{"_target_": target, "_partial_": True, **hostile[target]}]}], at="x")
    assert not marker.exists()


@pytest.mark.parametrize("target", HOSTILE)
def test_a_hostile_target_in_a_stored_config_is_refused(target, hostile, marker, stored_run, capsexp):
    run = stored_run(loss={"_target_": target, **hostile[target]})
    code, _, error = capsexp("eval", f"run={run}")
    assert code == 2
    assert f"loss._target_: '{target}' may not be built from a config" in error
    assert not marker.exists()


def test_predict_refuses_it_too(hostile, marker, stored_run, capsexp):
    run = stored_run(loss={"_target_": "torch.hub.load", **hostile["torch.hub.load"]})
    code, _, error = capsexp("predict", f"run={run}", "x.png")
    assert code == 2
    assert "loss._target_: 'torch.hub.load' may not be built from a config" in error
    assert not marker.exists()


@pytest.mark.parametrize("node", ["model", "dataset"])
def test_a_hostile_target_deep_in_a_stored_config_is_refused(node, hostile, marker, stored_run, capsexp):
    target = f"{NARROW}.hub.load"
    run = stored_run()
    path = run / ".hydra" / "config.yaml"
    settings = OmegaConf.load(path)
    settings[node]["deep"] = [{"er": {"_target_": target, **hostile[target]}}]
    OmegaConf.save(settings, path)
    code, _, error = capsexp("eval", f"run={run}")
    assert code == 2
    assert f"{node}.deep.0.er._target_: '{target}' may not be built" in error
    assert not marker.exists()


def opening(marker):
    return {
        "version": 1,
        "handlers": {"x": {"class": "logging.FileHandler", "filename": str(marker)}},
        "root": {"handlers": ["x"]},
    }


def test_such_a_logging_setting_would_create_the_marker(marker):
    logging.config.dictConfig(opening(marker) | {"incremental": False, "disable_existing_loggers": False})
    logging.getLogger().handlers.pop().close()
    assert marker.exists()


@pytest.mark.parametrize(
    ("hidden", "flags"),
    [
        ({"callbacks": {"x": {"_target_": "mischief.Thing"}}}, []),
        ({"callbacks": {"x": {"_target_": "mischief.Thing"}}}, ["--cfg", "job"]),
        ({"launcher": {"_target_": "mischief.Thing"}, "sweeper": {"_target_": "mischief.Thing"}}, []),
        ("logging", []),
    ],
    ids=["callbacks", "callbacks and --cfg", "launcher", "logging"],
)
@pytest.mark.parametrize("way", ["hydra", "defaults", "defaults of a group"])
def test_a_stored_config_cannot_set_anything_of_hydra(
    hidden, way, flags, mischief, marker, stored_run, capsexp
):
    hidden = {"job_logging": opening(marker)} if hidden == "logging" else hidden
    moved = ["_self_", {"/experiment@_global_.hydra": "stored"}]
    if way == "hydra":
        run = stored_run(hydra=hidden)
    elif way == "defaults":
        run = stored_run(experiment=hidden, defaults=moved)
    else:
        loss = {"defaults": moved, "_target_": "capsexp.loss.cross_entropy.CrossEntropy"}
        run = stored_run(experiment=hidden, loss=loss | {"weight_decay": 0.0, "reconstruction_weight": 0.1})
    code, _, error = capsexp("eval", f"run={run}", *flags)
    assert not marker.exists()
    if flags:
        assert code in (0, None)
    else:
        assert code == 2
        assert "may not be built" in error or "there is no such file" in error


def test_plugins_named_by_a_stored_config_do_not_count(mischief, marker, stored_run, capsexp):
    run = stored_run(plugins=[mischief], loss={"_target_": "mischief.Thing"})
    code, _, error = capsexp("eval", f"run={run}")
    assert code == 2
    assert "'mischief.Thing' may not be built from a config" in error
    assert not marker.exists()


def test_plugins_named_by_a_users_own_config_do_not_count(mischief, marker, tmp_path, capsexp):
    (tmp_path / "conf").mkdir()
    text = f"defaults: [train, _self_]\nplugins: [{mischief}]\nloss: {{_target_: mischief.Thing}}\n"
    (tmp_path / "conf" / "own.yaml").write_text(text)
    code, _, error = capsexp("train", "-cd", tmp_path / "conf", "-cn", "own")
    assert code == 2
    assert "'mischief.Thing' may not be built from a config" in error
    assert not marker.exists()


def test_no_module_outside_the_allowed_packages_is_imported(mischief, marker):
    for target in ("mischief.Thing", "mischief", "torch.nn.mischief.Thing", "capsexp.model.mischief.Thing"):
        with pytest.raises(UserError, match=r"may not be built from a config|^no '"):
            resolve(target)
    with pytest.raises(UserError, match="may not be built"):
        resolve("mischief.Thing", plugins=["mischie", "mischief.Thing", "chief"])
    assert not marker.exists()


@pytest.mark.parametrize(
    "target",
    [
        "capsexp.data.download.fetch",
        "capsexp.cli.main.os.system",
        "capsexp.training.record.Record",
        "capsexp.training.checkpoint.load",
        "capsexp.training.run_dir.RunDir",
        "capsexp.config.build.build",
        "capsexp.model",
        "capsexp",
        "torch.nn",
        "os.system",
        "x",
        ".",
    ],
)
def test_the_rest_of_capsexp_may_not_be_built(target):
    with pytest.raises(UserError, match=f"'{target}' may not be built from a config: allowed are"):
        resolve(target)


@pytest.mark.parametrize(
    "target",
    [
        "capsexp.schedule.as_schedule",
        "capsexp.training.device.tune_allocator",
        "capsexp.dataset.image_folder.decode",
        "capsexp.loss.margin.margin_loss",
        "torch.nn.functional.relu",
        "torch.nn.init.zeros_",
        "torchvision.models.resnet18",
        "capsexp.dataset.digits.Digits.read",
        "capsexp.schedule.math.exp",
        "capsexp.training.trainer.torch.hub.load",
        "capsexp.schedule.math",
    ],
)
def test_functions_and_modules_may_not_be_built(target):
    with pytest.raises(
        UserError, match=f"'{target}' may not be built from a config: it is .*, which is no class"
    ):
        resolve(target)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("capsexp.dataset.image_folder.Path", "pathlib.Path"),
        ("capsexp.training.device.ctypes.CDLL", "ctypes.CDLL"),
        (
            "capsexp.training.device.torch.package.PackageImporter",
            "torch.package.package_importer.PackageImporter",
        ),
        ("torch.nn.Parameter", "torch.nn.parameter.Parameter"),
        (f"{NARROW}.utils.data.DataLoader", "torch.utils.data.dataloader.DataLoader"),
    ],
)
def test_a_class_is_judged_by_its_real_name(target, name):
    with pytest.raises(
        UserError, match=f"'{re.escape(target)}' may not be built from a config: it is {name},"
    ):
        resolve(target)


def test_an_alias_of_an_allowed_class_is_that_class():
    assert resolve(f"{NARROW}.nn.Linear") is torch.nn.Linear
    assert resolve("capsexp.layer.decoder.nn.Linear") is torch.nn.Linear


def test_modules_and_optimisers_of_torch_are_built():
    linear = build({"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 2}, at="x")
    assert isinstance(linear, torch.nn.Linear)
    assert linear.weight.shape == (2, 3)
    make = build({"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.5}, at="x")
    assert isinstance(make, functools.partial)
    assert isinstance(optimizer := make(linear.parameters()), torch.optim.SGD)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("capsexp.routing.dynamic.DynamicRoutin", "no '.*': capsexp.routing.dynamic has no 'DynamicRoutin'"),
        ("capsexp.routing.dynamc.DynamicRouting", "capsexp.routing has no 'dynamc': did you mean 'dynamic'"),
        ("torch.nn.Liner", "torch.nn has no 'Liner': did you mean 'Linear'"),
        ("torch.nn.", "torch.nn has no ''"),
        ("torch.nn..Linear", "torch.nn has no ''"),
        (f"{NARROW}.float32.x", "dtype has no 'x'"),
        ("torch.nn.modules.module.Module.__doc__.x", "str has no 'x'"),
    ],
)
def test_a_target_that_is_not_there_is_told_with_the_nearest_name(target, message):
    with pytest.raises(UserError, match=message):
        resolve(target)


@pytest.mark.parametrize("target", [5, None, True, ["torch.nn.Linear"], {"_target_": "torch.nn.Linear"}])
def test_a_target_that_is_no_name_is_refused(target):
    settings = composed()
    settings["loss"]["_target_"] = target
    assert any("loss._target_:" in line and "may not be built" in line for line in problems(settings))


def test_a_failing_import_inside_an_allowed_module_is_a_bug_and_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        resolve("mine.Thing", plugins=["mine"])


# Plugins


@pytest.mark.parametrize("name", ["Loss", "loss"])
def test_a_plugin_of_the_command_line_may_be_built(name, mine):
    settings = composed()
    settings["loss"]["_target_"] = f"mine.{name}"
    assert f"loss._target_: 'mine.{name}' may not be built" in problems(settings)[0]
    assert build_components(settings, plugins=[mine]).loss.present == 0.9


def test_the_command_line_hands_its_plugins_on(mine, capsexp):
    words = ["loss._target_=mine.Loss", "loss.absent=2"]
    assert "'mine.Loss' may not be built" in capsexp("train", *words)[2]
    assert "absent and present must be" in capsexp("train", *words, "plugins=[mine]")[2]


def test_a_plugin_opens_no_way_to_what_it_imports(mine):
    with pytest.raises(
        UserError, match=r"'mine.os.system' may not be built from a config: it is posix.system"
    ):
        resolve("mine.os.system", plugins=[mine])
    assert resolve("mine.Margin", plugins=[mine]).__module__ == "capsexp.loss.margin"


def test_a_plugin_without_annotations_takes_any_value_but_no_unknown_key(mine):
    settings = composed()
    settings["extra"] = {"_target_": "mine.no_annotations", "a": "x", "b": [None], "c": 1}
    assert problems(settings, [mine]) == ["extra.c: no_annotations takes no 'c'; there is a, b"]


# Keys and values


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.presnt=1"], "loss.presnt: Margin takes no 'presnt': did you mean 'present'?"),
        (["loss._args_=[1]"], "loss._args_: Margin takes no '_args_'"),
        (["dataset.preprocess.shft=1"], "dataset.preprocess.shft: Preprocess takes no 'shft'"),
        (["model.decoder.widths=[1]"], "model.decoder.widths: Decoder takes no 'widths'"),
        (["routing.iteration=1"], "routing.iteration: DynamicRouting takes no 'iteration'"),
        (["optimizer.beta=1"], "optimizer.beta: Adam takes no 'beta': did you mean 'betas'?"),
        (["~loss.present"], "loss.present: Margin needs a value for it"),
        (["~trainer.max_epochs"], "trainer.max_epochs: Trainer needs a value for it"),
        (["~routing.iterations"], "routing: DynamicRouting: missing a required argument: 'iterations'"),
        (["~model.decoder.hidden"], "model.decoder: Decoder: missing a required argument: 'hidden'"),
        (["~optimizer.lr"], "optimizer.lr: must be a number or a schedule, got None"),
        (["~optimizer.lr.every"], "optimizer.lr.every: Exponential needs a value for it"),
        (["~routing._partial_"], "routing.in_caps: DynamicRouting needs a value for it"),
        (["~optimizer._partial_"], "optimizer._partial_: must be true for this group"),
        (["loss._partial_=true"], "loss._partial_: must be false for this group"),
        (["~loss"], "loss: nothing is chosen; choose with loss=OPTION"),
        (["~dataset"], "dataset: nothing is chosen; choose with dataset=OPTION"),
        (["~model"], "model: nothing is chosen; choose with model=OPTION"),
        (["~loss._target_"], "loss: nothing is chosen; choose with loss=OPTION"),
        (["model.image_shape=[1,8,8]"], "model.image_shape: CapsNet takes no 'image_shape'"),
        (["model.classes=10"], "model.classes: CapsNet takes no 'classes'"),
        (["optimizer.params=[1]"], "optimizer.params: Adam takes no 'params'"),
        (["routing.in_caps=5"], "routing: DynamicRouting: multiple values for argument 'in_caps'"),
        (["model.decoder.classes=5"], "model.decoder: Decoder: multiple values for argument 'classes'"),
        (["~model.routing"], "routing: the chosen model has no routing; leave it out"),
        (["seed=-1"], "seed: must be an integer >= 0, got -1"),
        (["seed=1.5"], "seed: must be an integer >= 0, got 1.5"),
        (["seed=true"], "seed: must be an integer >= 0, got True"),
        (["~seed"], "seed: must be an integer >= 0, got None"),
    ],
)
def test_a_key_that_does_not_fit_is_told_by_its_name(overrides, message):
    told = problems(composed(*overrides))
    assert any(line.startswith(message) for line in told), told


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("routing.iterations=three", "routing.iterations: must be int, got 'three'"),
        ("routing.iterations=3.0", "routing.iterations: must be int, got 3.0"),
        ("routing.iterations=true", "routing.iterations: must be int, got True"),
        ("routing.iterations=null", "routing.iterations: must be int, got None"),
        ("routing.bias=1", "routing.bias: must be bool, got 1"),
        ("loss.present=high", "loss.present: must be int or float, got 'high'"),
        ("loss.present=false", "loss.present: must be int or float, got False"),
        ("loss.present=[0.9]", "loss.present: must be int or float, got [0.9]"),
        (
            "loss.reconstruction_weight=abc",
            "loss.reconstruction_weight: must be a node with a _target_ or int",
        ),
        (
            "loss.reconstruction_weight=null",
            "loss.reconstruction_weight: must be a node with a _target_ or int",
        ),
        ("trainer.grad_clip=off", "trainer.grad_clip: must be "),
        ("trainer.max_steps=1.5", "trainer.max_steps: must be int or null, got 1.5"),
        ("trainer.precision=half", "trainer.precision: must be 'float32' or 'bfloat16', got 'half'"),
        ("trainer.test=first", "trainer.test: must be 'best' or 'last' or 'none', got 'first'"),
        ("trainer.compile=null", "trainer.compile: must be bool, got None"),
        ("device.name=gpu", "device.name: must be 'auto' or 'cpu' or 'cuda' or 'mps', got 'gpu'"),
        ("model.conv_channels=64.5", "model.conv_channels: must be int, got 64.5"),
        ("model.padding=3", "model.padding: must be str, got 3"),
        ("model.decoder.hidden=8", "model.decoder.hidden: must be a list of int, got 8"),
        ("model.decoder.hidden=[8,a]", "model.decoder.hidden: must be a list of int, got [8, 'a']"),
        ("model.decoder.hidden=[null]", "model.decoder.hidden: must be a list of int, got [None]"),
        ("model.decoder=8", "model.decoder: must be a node with a _target_ or null, got 8"),
        ("model.routing=dynamic", "model.routing: must be a node with a _target_, got 'dynamic'"),
        ("model.routing=null", "model.routing: must be a node with a _target_, got None"),
        ("dataset.preprocess=null", "dataset.preprocess: must be a node with a _target_, got None"),
        ("dataset.preprocess.crop=a", "dataset.preprocess.crop: must be int or null, got 'a'"),
        ("optimizer.betas=[a,b]", "optimizer.betas: must be a list of float or a node with a _target_, got"),
        ("optimizer.betas=0.9", "optimizer.betas: must be a list of float"),
        ("optimizer.lr=fast", "optimizer.lr: must be a number or a schedule, got 'fast'"),
        ("optimizer.lr=true", "optimizer.lr: must be a number or a schedule, got True"),
        ("optimizer.lr.start=a", "optimizer.lr.start: must be "),
    ],
)
def test_a_value_of_the_wrong_type_is_told_by_its_key(override, message):
    told = problems(composed(override))
    assert any(line.startswith(message) for line in told), told


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("routing.iterations=0", "routing: iterations must be >= 1, got 0"),
        ("model.padding=wide", "model: padding must be "),
        ("loss.present=2", "loss: absent and present must be 0 <= absent < present <= 1, got 0.1 and 2"),
        ("loss.reconstruction_weight=.nan", "loss: value must be finite, got nan"),
        ("loss.reconstruction_weight=-1", "loss: reconstruction_weight must be >= 0, got -1"),
        ("optimizer.lr=.nan", "optimizer.lr: value must be finite, got nan"),
        ("optimizer.lr=-0.1", "optimizer: Invalid learning rate: -0.1"),
        ("optimizer.lr.start=-0.1", "optimizer.lr: start must be >= minimum"),
        ("optimizer.lr.decay=2", "optimizer.lr: decay must be in (0, 1], got 2"),
        ("optimizer.betas=[2,0.9]", "optimizer: Invalid beta parameter at index 0: 2"),
        ("device.threads=0", "device: threads must be >= 1, got 0"),
        ("dataset.preprocess.crop=9", "dataset: crop "),
        ("dataset.validation=-1", "dataset: validation "),
    ],
)
def test_a_constructors_complaint_begins_with_the_key(override, message):
    told = problems(composed(override))
    assert len(told) == 1
    assert told[0].startswith(message), told


def test_every_problem_is_told_at_once():
    overrides = ["seed=-1", "loss.present=2", "trainer.max_epochs=0", "dataset.x=1", "optimizer.eps=a"]
    told = problems(composed(*overrides, "routing.iterations=a", "model.y=1", "device.threads=0"))
    keys = [line.partition(":")[0] for line in told]
    assert sorted(keys) == sorted(
        ["seed", "loss", "trainer", "dataset.x", "optimizer.eps", "routing.iterations", "model.y", "device"]
    )


def test_a_wrong_key_of_the_routing_is_told_once_and_not_again_as_the_models():
    assert problems(composed("routing.iterations=a")) == ["routing.iterations: must be int, got 'a'"]


def test_a_model_may_have_a_routing_of_its_own():
    settings = composed()
    settings["model"]["routing"] = settings["routing"] | {"iterations": 0}
    assert problems(settings) == ["model.routing: iterations must be >= 1, got 0"]
    own = {"_target_": "capsexp.routing.uniform.UniformRouting", "_partial_": True, "bias": True}
    settings["model"]["routing"] = own
    routing = build_components(settings, plugins=[]).new_model().class_caps.routing
    assert type(routing).__name__ == "UniformRouting"


# Building


def test_nested_parts_are_built_first_and_dicts_and_lists_kept():
    then = {"_target_": "capsexp.schedule.Linear", "start": 1.0, "end": 0.0, "steps": 10}
    node = {"a": [{"_target_": "capsexp.schedule.Warmup", "steps": 5, "then": then}, "b", None]}
    built = build(node, at="x")
    assert isinstance(built["a"][0], Warmup)
    assert isinstance(built["a"][0].then, Linear)
    assert built["a"][1:] == ["b", None]


def test_partial_leaves_the_call_to_whoever_completes_it():
    make = build({"_target_": "capsexp.schedule.Linear", "_partial_": True, "start": 1.0}, at="x")
    assert make(end=0.0, steps=4).end == 0.0
    with pytest.raises(UserError, match="x: steps must be an integer >= 1"):
        make(end=0.0, steps=0)
    with pytest.raises(UserError, match="x: Linear: missing a required argument: 'end'"):
        make(steps=4)
    whole = build(
        {"_target_": "capsexp.schedule.Linear", "_partial_": False, "start": 1.0, "end": 0.0, "steps": 1},
        at="x",
    )
    assert isinstance(whole, Linear)


def test_run_time_arguments_join_those_of_the_config():
    linear = build({"_target_": "torch.nn.Linear", "in_features": 3}, at="x", out_features=2)
    assert linear.out_features == 2


def test_the_parts_are_those_of_the_config():
    components = build_components(
        composed("seed=7", "optimizer._target_=torch.optim.AdamW", "optimizer.eps=1.0e-4"), plugins=[]
    )
    assert components.seed == 7
    assert components.dataset.image_shape == (1, 8, 8)
    optimizer = components.new_optimizer([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["eps"] == 1e-4
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_checking_leaves_the_random_state_and_builds_nothing_but_on_meta():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    components = build_components(composed(), plugins=[])
    assert torch.equal(torch.get_rng_state(), before)
    assert {one.device.type for one in components.new_model().parameters()} == {"cpu"}
    assert Path(conf_dir()).is_dir()
