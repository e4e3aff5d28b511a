"""Calls that only print: help, the version, a config, completion."""

import re
import sys

import pytest
from fork_server import NO_FORK

from capsexp.cli import entry as cli


def test_without_a_command_and_with_help_the_commands_are_listed(capsexp):
    code, out, error = capsexp()
    assert (code, error) == (0, "")
    for name, command in cli.COMMANDS.items():
        assert f"  {name:8} {command.summary}\n" in out
    assert capsexp("--help") == capsexp("-h") == (0, out, "")


def test_version(capsexp):
    code, out, _ = capsexp("--version")
    assert code == 0
    assert re.fullmatch(r"capsexp \d+\.\d+\.\d+\S*\n", out)


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_has_help(command, capsexp, no_runs):
    code, out, error = capsexp(command, "--help")
    assert (code, error) == (0, "")
    assert f"usage: capsexp {command} " in out
    assert cli.COMMANDS[command].summary[1:] in out


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_the_help_ends_with_an_example(command, capsexp):
    assert capsexp(command, "--help")[1].endswith(f"example: {cli.COMMANDS[command].example}\n")


def test_the_help_names_every_setting_that_a_command_adds_to_a_run(capsexp):
    for command, settings in {
        "eval": ["run", "split", "weights"],
        "predict": ["run", "top", "reconstructions", "weights"],
        "analyze": ["study", "run", "limit", "weights"],
    }.items():
        assert {*settings} <= {*cli.COMMANDS[command].settings}


def test_the_help_lists_studies_and_datasets(capsexp):
    assert "\nstudy: attacks, equivariance, " in capsexp("analyze", "--help")[1]
    assert "\ndataset: affnist, cifar10, " in capsexp("data", "-h")[1]


@pytest.mark.parametrize("arguments", [["--help"], ["eval", "--help"], ["bench", "-h"]])
def test_help_needs_neither_torch_nor_hydra(arguments, tmp_path, shell):
    code = "import sys; from capsexp.cli import main; main(); print({'torch', 'hydra'} & {*sys.modules})"
    done = shell(*arguments, cwd=tmp_path, start=(sys.executable, "-c", code), **{NO_FORK: "1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\nset()\n")


def test_hydras_own_help(capsexp, no_runs):
    code, out, _ = capsexp("train", "--hydra-help")
    assert code == 0
    assert "--multirun" in out


def test_cfg_shows_the_config_without_torch_and_without_a_run(tmp_path, shell):
    code = "import sys; from capsexp.cli import main; code = main()\n"
    code += "print(code, 'torch' in sys.modules, file=sys.stderr)"
    start = (sys.executable, "-c", code)
    done = shell("train", "--cfg", "job", "routing.iterations=5", cwd=tmp_path, start=start, **{NO_FORK: "1"})
    assert (done.returncode, done.stderr) == (0, "0 False\n")
    assert "\nseed: 0\n" in done.stdout
    assert "  iterations: 5\n" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_script_and_the_module_are_the_same_command(script, tmp_path, shell):
    show = ("train", "--cfg", "job", "-p", "loss", "loss.present=0.8")
    module = shell(*show, cwd=tmp_path, **{NO_FORK: "1"})
    assert (module.returncode, module.stderr) == (0, "")
    assert module.stdout.splitlines()[:3] == [
        "# @package loss",
        "_target_: capsexp.loss.margin.Margin",
        "present: 0.8",
    ]
    done = shell(*show, start=script, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, module.stdout, "")


def test_cfg_of_one_package(capsexp, no_runs):
    code, out, _ = capsexp("train", "--cfg", "job", "-p", "model")
    assert code == 0
    assert out.startswith("# @package model\n_target_: capsexp.model.dynamic_routing.CapsNet\n")
    assert "seed" not in out


def test_info_names_the_folders_that_are_searched(capsexp, no_runs, tmp_path):
    (tmp_path / "mine").mkdir()
    code, out, _ = capsexp("train", "--info", "searchpath", "-cd", tmp_path / "mine")
    assert code == 0
    assert str(tmp_path / "mine") in out
    assert "/conf" in out


def test_a_users_own_folder_adds_a_model_and_a_root(capsexp, no_runs, tmp_path):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    text = "defaults: [dynamic_routing_small, _self_]\nclass_dim: 4\n"
    (tmp_path / "mine" / "model" / "thin.yaml").write_text(text)
    (tmp_path / "mine" / "own.yaml").write_text("defaults: [train, _self_]\nseed: 7\n")
    show = ("--cfg", "job", "-cd", tmp_path / "mine")
    assert "class_dim: 4\n" in capsexp("train", *show, "-p", "model", "model=thin")[1]
    assert "seed: 7\n" in capsexp("train", *show, "-cn", "own")[1]


@pytest.mark.parametrize(
    ("line", "answers"),
    [
        ("capsexp tr", {"train"}),
        ("capsexp ", set(cli.COMMANDS)),
        ("capsexp d", {"data", "doctor"}),
        (
            "capsexp train model=",
            {"model=cnn_sabour", "model=dynamic_routing", "model=dynamic_routing_small"},
        ),
        ("capsexp train routing.it", {"routing.iterations="}),
        ("capsexp train -m experiment=quick", {"experiment=quickstart"}),
        ("capsexp train -m experiment=sabour2017_t", {"experiment=sabour2017_table1"}),
        ("capsexp train -m experiment=sabour2017_table1 trainer.max_s", {"trainer.max_steps="}),
        ("capsexp bench device=c", {"device=cpu", "device=cuda"}),
    ],
)
def test_completion(line, answers, capsexp):
    code, out, _ = capsexp("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert code == 0
    assert answers <= set(out.split())
    assert all(option.startswith(line.rpartition(" ")[2]) for option in out.split())


def test_completion_of_a_groups_keys_and_of_all_experiments(capsexp):
    _, keys, _ = capsexp("-sc", "query=bash", COMP_LINE="capsexp train routing.", COMP_POINT="22")
    assert {"routing.iterations=", "routing.prior=", "routing.leaky="} <= set(keys.split())
    line = "capsexp train -m experiment="
    _, names, _ = capsexp("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert len(names.split()) >= 9
