"""Which objects a config may name as `_target_`, and how others are refused."""

import functools
import logging
import logging.config
import os
import pickle
import re

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from capsexp.config.build import build, build_components
from capsexp.config.targets import resolve
from capsexp.errors import UserError

NARROW = "torch.nn.modules.module.torch"
HANDLER = "distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler"


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def hostile(tmp_path, marker):
    """The arguments with which each hostile target would create the marker."""
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
def test_a_hostile_target_is_refused_in_every_place(target, place, hostile, marker, edited, problems):
    settings = edited()
    at = place(settings, {"_target_": target, **hostile[target]})
    reported = [line for line in problems(settings) if f"{at}._target_: '{target}' may not be built" in line]
    assert len(reported) == 1
    assert not marker.exists()


@pytest.mark.parametrize("target", HOSTILE)
def test_building_a_hostile_node_by_itself_is_refused(target, hostile, marker):
    with pytest.raises(UserError, match=f"'{re.escape(target)}' may not be built from a config"):
        build({"_target_": target, **hostile[target]}, at="x")
    with pytest.raises(UserError, match=f"'{re.escape(target)}' may not be built from a config"):
        build([{"a": [{"_target_": target, "_partial_": True, **hostile[target]}]}], at="x")
    assert not marker.exists()


@pytest.mark.parametrize("target", HOSTILE)
def test_a_hostile_target_in_a_saved_config_is_refused(target, hostile, marker, saved_run, capsexp):
    run = saved_run(loss={"_target_": target, **hostile[target]})
    code, _, error = capsexp("eval", f"run={run}")
    assert code == 2
    assert f"loss._target_: '{target}' may not be built from a config" in error
    assert not marker.exists()


def test_predict_refuses_it_too(hostile, marker, saved_run, capsexp):
    run = saved_run(loss={"_target_": "torch.hub.load", **hostile["torch.hub.load"]})
    code, _, error = capsexp("predict", f"run={run}", "x.png")
    assert code == 2
    assert "loss._target_: 'torch.hub.load' may not be built from a config" in error
    assert not marker.exists()


@pytest.mark.parametrize("node", ["model", "dataset"])
def test_a_hostile_target_deep_in_a_saved_config_is_refused(node, hostile, marker, saved_run, capsexp):
    target = f"{NARROW}.hub.load"
    run = saved_run()
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
def test_a_saved_config_cannot_set_anything_of_hydra(
    hidden, way, flags, mischief, marker, saved_run, capsexp
):
    hidden = {"job_logging": opening(marker)} if hidden == "logging" else hidden
    moved = ["_self_", {"/experiment@_global_.hydra": "stored"}]
    if way == "hydra":
        run = saved_run(hydra=hidden)
    elif way == "defaults":
        run = saved_run(experiment=hidden, defaults=moved)
    else:
        loss = {"defaults": moved, "_target_": "capsexp.loss.cross_entropy.CrossEntropy"}
        run = saved_run(experiment=hidden, loss=loss | {"weight_decay": 0.0, "reconstruction_weight": 0.1})
    code, _, error = capsexp("eval", f"run={run}", *flags)
    assert not marker.exists()
    if flags:
        assert code in (0, None)
    else:
        assert code == 2
        assert "may not be built" in error or "no checkpoint best.pt in" in error


def test_plugins_named_by_a_saved_config_do_not_count(mischief, marker, saved_run, capsexp):
    run = saved_run(plugins=[mischief], loss={"_target_": "mischief.Thing"})
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
        "capsexp.cli.entry.os.system",
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
        "capsexp.dataset.image_folder.find_images",
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
        UserError, match=f"'{target}' may not be built from a config: it is .*, which is not a class"
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


def test_modules_and_optimizers_of_torch_are_built():
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
def test_a_target_that_is_not_there_is_reported_with_the_nearest_name(target, message):
    with pytest.raises(UserError, match=message):
        resolve(target)


@pytest.mark.parametrize("target", [5, None, True, ["torch.nn.Linear"], {"_target_": "torch.nn.Linear"}])
def test_a_target_that_is_no_name_is_refused(target, edited, problems):
    settings = edited()
    settings["loss"]["_target_"] = target
    assert any("loss._target_:" in line and "may not be built" in line for line in problems(settings))


def test_a_failing_import_inside_an_allowed_module_is_a_bug_and_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        resolve("mine.Thing", plugins=["mine"])


# Plugins


@pytest.mark.parametrize("name", ["Loss", "loss"])
def test_a_plugin_of_the_command_line_may_be_built(name, mine, edited, problems):
    settings = edited()
    settings["loss"]["_target_"] = f"mine.{name}"
    assert f"loss._target_: 'mine.{name}' may not be built" in problems(settings)[0]
    assert build_components(settings, plugins=[mine]).loss.present == 0.9


def test_the_command_line_passes_its_plugins_on(mine, capsexp):
    arguments = ["loss._target_=mine.Loss", "loss.absent=2"]
    assert "'mine.Loss' may not be built" in capsexp("train", *arguments)[2]
    assert "absent and present must be" in capsexp("train", *arguments, "plugins=[mine]")[2]


def test_a_plugin_opens_no_way_to_what_it_imports(mine):
    with pytest.raises(
        UserError, match=r"'mine.os.system' may not be built from a config: it is posix.system"
    ):
        resolve("mine.os.system", plugins=[mine])
    assert resolve("mine.Margin", plugins=[mine]).__module__ == "capsexp.loss.margin"


def test_a_plugin_without_annotations_takes_any_value_but_no_unknown_key(mine, edited, problems):
    settings = edited()
    settings["extra"] = {"_target_": "mine.no_annotations", "a": "x", "b": [None], "c": 1}
    assert problems(settings, [mine]) == ["extra.c: no_annotations takes no 'c'; choose from a, b"]
