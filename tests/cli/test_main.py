"""The command line as users have it: in processes of its own where that counts, otherwise in this one."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from capsexp.cli import jobs
from capsexp.cli import main as cli
from capsexp.config.naming import job_name
from capsexp.config.overrides import parse
from capsexp.training.run_dir import RunDir

SCRIPT = str(Path(sys.executable).with_name("capsexp"))
MODULE = (sys.executable, "-m", "capsexp")


def environment(folder, **more):
    return os.environ | {
        "CAPSEXP_OUTPUTS": str(folder / "outputs"),
        "CAPSEXP_DATA": str(folder / "data"),
        **more,
    }


def shell(*words, cwd, start=MODULE, **more):
    """Run a command in a process of its own."""
    return subprocess.run(
        [*start, *map(str, words)],
        cwd=cwd,
        env=environment(cwd, COLUMNS="200", **more),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def capsexp(monkeypatch, capsys, tmp_path):
    """Run the command line in this process; returns exit code, stdout, stderr."""

    def call(*words, **variables):
        monkeypatch.setattr(sys, "argv", ["capsexp", *map(str, words)])
        monkeypatch.setattr(jobs, "_argv", tuple(sys.argv))
        for name, value in {**environment(tmp_path), "HYDRA_FULL_ERROR": "1", **variables}.items():
            monkeypatch.setenv(name, value)
        try:
            code = cli.main()
        except SystemExit as stop:
            code = stop.code
        return code or 0, *capsys.readouterr()

    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield call
    for handler in set(root.handlers) - set(before):  # Hydra's, which hold a file or this test's stdout
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


@pytest.fixture
def no_runs(tmp_path):
    yield
    assert not (tmp_path / "outputs").exists()


# What only shows something


def test_without_a_command_and_with_help_the_commands_are_listed(capsexp):
    code, out, error = capsexp()
    assert (code, error) == (0, "")
    for name, text in cli.COMMANDS.items():
        assert f"  {name:8} {text}\n" in out
    assert capsexp("--help") == capsexp("-h") == (0, out, "")


def test_version(capsexp):
    code, out, _ = capsexp("--version")
    assert code == 0
    assert re.fullmatch(r"capsexp \d+\.\d+\.\d+\S*\n", out)


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_has_help(command, capsexp, no_runs):
    code, out, error = capsexp(command, "--help")
    assert (code, error) == (0, "")
    assert "capsexp train" in out if command in ("train", "bench") else cli.COMMANDS[command] in out


def test_hydras_own_help(capsexp, no_runs):
    code, out, _ = capsexp("train", "--hydra-help")
    assert code == 0
    assert "--multirun" in out


def test_cfg_shows_the_config_without_torch_and_without_a_run(tmp_path):
    code = "import sys; from capsexp.cli import main; print(main(), 'torch' in sys.modules, file=sys.stderr)"
    start = (sys.executable, "-c", code)
    done = shell("train", "--cfg", "job", "routing.iterations=5", cwd=tmp_path, start=start)
    assert (done.returncode, done.stderr) == (0, "0 False\n")
    assert "\nseed: 0\n" in done.stdout
    assert "  iterations: 5\n" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("start", [(SCRIPT,), MODULE], ids=["script", "module"])
def test_the_script_and_the_module_are_the_same_command(start, tmp_path):
    done = shell("train", "--cfg", "job", "-p", "loss", "loss.present=0.8", start=start, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:3] == [
        "# @package loss",
        "_target_: capsexp.loss.margin.Margin",
        "present: 0.8",
    ]


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
    assert all(word.startswith(line.rpartition(" ")[2]) for word in out.split())


def test_completion_of_a_groups_keys_and_of_all_experiments(capsexp):
    _, keys, _ = capsexp("-sc", "query=bash", COMP_LINE="capsexp train routing.", COMP_POINT="22")
    assert {"routing.iterations=", "routing.prior=", "routing.leaky="} <= set(keys.split())
    line = "capsexp train -m experiment="
    _, names, _ = capsexp("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert len(names.split()) >= 9


# A user's mistakes: one line each on stderr, exit code 2, no run


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["trian"], ["unknown command 'trian': did you mean 'train'?"]),
        (["xyzzy"], [f"unknown command 'xyzzy'; there is {', '.join(sorted(cli.COMMANDS))}"]),
        (
            ["train", "trainer.max_epoch=3"],
            ["unknown key 'trainer.max_epoch': did you mean 'trainer.max_epochs'?"],
        ),
        (["train", "modle=cnn_sabour"], ["unknown key 'modle': did you mean 'model'?"]),
        (["train", "model=cnn_sabor"], ["model=cnn_sabor: no such option: did you mean 'cnn_sabour'?"]),
        (["train", "routing.iterations=x"], ["routing.iterations: must be int, got 'x'"]),
        (
            ["train", "routing.iterations=0", "seed=-1"],
            ["seed: must be an integer >= 0, got -1", "routing: iterations must be >= 1, got 0"],
        ),
        (
            ["train", "resume=yes", "seed=-1"],
            ["resume: must be 'auto' or 'force', got 'yes'", "seed: must be an integer >= 0, got -1"],
        ),
        (["train", "dataset=image_folder"], ["dataset.path has no value yet: set dataset.path=…"]),
        (
            ["train", "--experimental-rerun", "x.pickle"],
            ["--experimental-rerun is switched off: it loads a pickle; use run=DIR"],
        ),
        *(
            (
                [*words, "experiment=sabour2017_table1"],
                [
                    "experiment=sabour2017_table1 is a table of 8 recipes: `capsexp train -m` trains them "
                    "all, experiment=sabour2017_mnist_baseline is the first of them"
                ],
            )
            for words in (["train"], ["train", "--cfg", "job"], ["bench"])
        ),
        (["train", "-m", "--cfg", "job"], ["--cfg and --info show one run: leave -m out"]),
        (
            ["train", "-m", "seed=0", "hydra.sweep.dir=/dev/null/x"],
            ["cannot write into /dev/null/x: Not a directory"],
        ),
        (
            ["train", "-m", "seed=0", "hydra/launcher=proces"],
            ["hydra/launcher=proces: no such option: did you mean 'process'?"],
        ),
        (["train", "-m", "seed=0,x"], ["seed: must be an integer >= 0, got 'x'"]),
        (["train", "-m", "routing.iterations=1,2,0"], ["routing: iterations must be >= 1, got 0"]),
        (
            ["train", "-m", "seed=0,1", "run=x"],
            ["run: a sweep makes a directory for each of its runs; choose hydra.sweep.dir=DIR"],
        ),
        (["bench", "modle=x"], ["unknown key 'modle': did you mean 'model'?"]),
        (["eval"], ["capsexp eval needs a run: capsexp eval run=DIR"]),
        (["predict", "x.png"], ["capsexp predict needs a run: capsexp predict run=DIR"]),
        (
            ["eval", "run=nothing"],
            ["nothing is not the directory of a run: there is no nothing/.hydra/config.yaml"],
        ),
        (
            ["predict", "run=nothing", "x.png"],
            ["nothing is not the directory of a run: there is no nothing/.hydra/config.yaml"],
        ),
        (["eval", "run=é"], ["cannot read 'run=é': token recognition error at: 'é'"]),
        (["data", "lst"], ["unknown command 'data lst': did you mean 'list'?"]),
        (["data", "verify", "digts"], ["unknown data set 'digts': did you mean 'digits'?"]),
        (["doctor", "data_rot=x"], ["unknown key 'data_rot': did you mean 'data_root'?"]),
    ],
    ids=lambda one: " ".join(one) if "capsexp" not in one else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(words, lines, capsexp, no_runs):
    assert capsexp(*words) == (2, "", "".join(f"capsexp: {line}\n" for line in lines))


def test_data_prepare_needs_names(capsexp):
    code, _, error = capsexp("data", "prepare")
    assert code == 2
    assert "capsexp data prepare needs names: affnist, cifar10, digits, " in error


def test_a_mistake_in_a_process_of_its_own_has_no_traceback(tmp_path):
    done = shell("train", "modle=x", "model=y", start=(SCRIPT,), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert [line.partition(": ")[0] for line in done.stderr.splitlines()] == ["capsexp", "capsexp"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"a: [1", b"\x80", b"- 1\n"], ids=["yaml", "bytes", "list"])
def test_a_stored_config_that_cannot_be_read_is_told(content, capsexp, tmp_path):
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / ".hydra" / "config.yaml").write_bytes(content)
    code, _, error = capsexp("eval", f"run={tmp_path / 'run'}")
    assert code == 2
    assert re.match(r"capsexp: \S+config.yaml (cannot be read: |holds no config)", error)
    assert error.count("\n") == 1


def test_a_stored_config_without_its_groups_is_told(capsexp, tmp_path):
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / ".hydra" / "config.yaml").write_text("a: 1\n")
    code, _, error = capsexp("eval", f"run={tmp_path / 'run'}")
    assert code == 2
    assert "capsexp: dataset: nothing is chosen; choose with dataset=OPTION\n" in error


# A bug keeps its traceback

BUG = """
from capsexp.loss.margin import Margin

class Loss(Margin):
    def __call__(self, output, batch, step):
        raise KeyError("a bug")
"""


def test_a_bug_keeps_its_traceback_and_its_run_says_failed(tmp_path):
    (tmp_path / "buggy.py").write_text(BUG)
    words = ("train", "trainer=smoke", "plugins=[buggy]", "loss._target_=buggy.Loss", "run=run")
    done = shell(*words, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "Traceback (most recent call last):" in done.stderr
    assert 'buggy.py", line 6, in __call__' in done.stderr
    assert done.stderr.endswith("KeyError: 'a bug'\n")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["status"], status["error"], status["exit_code"]) == ("failed", "KeyError: 'a bug'", 1)


# From end to end, on the embedded digits


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder to work in."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def trained(home):
    """`capsexp train trainer=smoke run=run`, in a process of its own."""
    return shell("train", "trainer=smoke", "run=run", "seed=3", start=(SCRIPT,), cwd=home)


@pytest.fixture
def at_home(trained, home, monkeypatch):
    """Work where the trained run is."""
    monkeypatch.chdir(home)
    return home


def test_training_ends_well_and_says_where_it_is(trained, home):
    assert (trained.returncode, trained.stderr) == (0, "")
    assert "CapsNet with " in trained.stdout
    assert "test/accuracy" in trained.stdout
    assert trained.stdout.endswith(f"run: {home / 'run'}\ncurves: tensorboard --logdir {home / 'run'}\n")


def test_a_run_directory_holds_what_it_promises(trained, home):
    run = home / "run"
    names = {path.relative_to(run).parts[0] for path in run.iterdir()} - {"dirty.patch"}
    promised = (
        ".hydra resolved_config.yaml command.txt env.json status.json metrics.jsonl train.log tb checkpoints"
    )
    assert names == {*promised.split(), "figures", "run.lock"}
    assert {path.name for path in (run / ".hydra").iterdir()} == {
        "config.yaml",
        "overrides.yaml",
        "hydra.yaml",
    }
    assert "routing: ${routing}\n" in (run / ".hydra" / "config.yaml").read_text()
    assert (run / ".hydra" / "overrides.yaml").read_text() == "- trainer=smoke\n- run=run\n- seed=3\n"
    assert "${" not in (run / "resolved_config.yaml").read_text()
    assert (run / "command.txt").read_text() == "capsexp train trainer=smoke run=run seed=3\n"
    checkpoints = {path.name for path in (run / "checkpoints").iterdir()}
    assert checkpoints == {"step-00000002.pt", "step-00000002.json", "last.pt", "best.pt"}
    assert len(list((run / "tb").glob("events.out.tfevents.*"))) == 3  # begin, figures, end
    assert "validation/accuracy" in (run / "train.log").read_text()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 2, 2]
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["step"], status["exit_code"]) == ("completed", 2, 0)
    assert status["results"]["test/accuracy"] == metrics[-1]["test/accuracy"]
    assert json.loads((run / "env.json").read_text())["versions"]["torch"] in torch.__version__


def test_the_same_command_again_says_complete(at_home, capsexp):
    before = (at_home / "run" / "metrics.jsonl").read_bytes()
    code, out, error = capsexp("train", "trainer=smoke", "run=run", "seed=3")
    assert (code, error) == (0, "")
    assert out.startswith(f"{at_home / 'run'} is complete: ")
    assert "test/accuracy" in out
    assert (at_home / "run" / "metrics.jsonl").read_bytes() == before


def test_another_config_is_refused_and_leaves_the_run_as_it_was(at_home, capsexp):
    files = [path for path in (at_home / "run").rglob("*") if path.is_file() and path.suffix != ".log"]
    before = {path: path.read_bytes() for path in files if path.name != "run.lock"}
    code, _, error = capsexp("train", "trainer=smoke", "run=run", "seed=4", "model.class_dim=8")
    assert code == 2
    assert error == (
        "capsexp: model.class_dim: was 16, is 8\ncapsexp: seed: was 3, is 4\n"
        f"capsexp: {at_home / 'run'} holds a run with another config: resume=force takes the new one\n"
    )
    assert {path: path.read_bytes() for path in before} == before


def figures(text):
    return {name: float(value) for name, value in re.findall(r"│ ([\w/]+) +│ ([\d.e-]+) +│", text)}


def test_eval_repeats_the_figures_of_training(at_home, capsexp):
    code, out, error = capsexp("eval", "run=run", "weights=last")
    assert (code, error) == (0, "")
    results = json.loads((at_home / "run" / "status.json").read_text())["results"]
    told = figures(out)
    assert told["accuracy"] == pytest.approx(results["test/accuracy"], rel=1e-4)
    assert told["loss"] == pytest.approx(results["test/loss"], rel=1e-4)


def test_eval_takes_overrides(at_home, capsexp):
    plain = figures(capsexp("eval", "run=run")[1])
    words = ("routing.iterations=5", "dataset.preprocess.shift=1", "trainer.limit_eval_batches=null")
    code, out, _ = capsexp("eval", "run=run", "part=validation", *words)
    assert code == 0
    assert "validation, 144 pictures" in out
    assert figures(out)["coupling_entropy/class_caps"] != plain["coupling_entropy/class_caps"]
    last = json.loads((at_home / "run" / "evaluations.jsonl").read_text().splitlines()[-1])
    assert (last["part"], last["config"]["routing"]["iterations"]) == ("validation", 5)
    assert last["config"]["model"]["routing"]["iterations"] == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["part=tset"], "part: must be 'test', 'familiar', 'validation' or 'train', got 'tset'"),
        (["weights=bst"], r"run/checkpoints/bst.pt: refused, there is no such file"),
        (["weights=7"], r"run/checkpoints/step-00000007.pt: refused, there is no such file"),
        (["model.class_dim=8"], "the weights in run are of another network: "),
        (["routing.iteration=5"], "unknown key 'routing.iteration': did you mean 'routing.iterations'?"),
        (["routing.iterations=1,2"], "several values make a sweep"),
    ],
)
def test_eval_tells_what_does_not_fit_the_run(words, message, at_home, capsexp):
    code, _, error = capsexp("eval", "run=run", *words)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


@pytest.fixture
def pictures(at_home):
    """Two pictures of digits, larger than those that the network knows, one of them in colour."""
    for number in (0, 1):
        pixels = Image.fromarray((load_digits().images[number] * 15.9).astype("uint8"))
        picture = pixels.resize((30, 20)).convert("RGB" if number else "L")
        picture.save(at_home / f"digit {number}.png")
    return ["digit 0.png", "digit 1.png"]


def test_predict_prints_classes_and_writes_reconstructions(pictures, home, capsexp):
    code, out, error = capsexp("predict", "run=run", *pictures, "top=2", COLUMNS="200")
    assert (code, error) == (0, "")
    for name in pictures:
        cells = next(line for line in out.splitlines() if name in line and "│" in line).split("│")
        guesses = [re.fullmatch(r" (\d) (0\.\d{3}|1\.000) +", cell) for cell in cells[2:4]]
        assert float(guesses[0][2]) >= float(guesses[1][2])
        assert guesses[0][1] != guesses[1][1]
        target = home / name.replace(".png", ".reconstruction.png")
        with Image.open(target) as picture:
            assert picture.size == (16, 8)  # as the network saw it, and as it draws it
        assert f"{target.name}: the picture as the network saw it" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "capsexp predict needs pictures: capsexp predict run=DIR FILES…"),
        (["nothing.png"], "nothing.png: there is no such file"),
        (["digit 0.png", "nothing.png"], "nothing.png: there is no such file"),
        (["run/command.txt"], "run/command.txt is damaged and cannot be decoded"),
        (["digit 0.png", "top=0"], "top: must be an integer >= 1, got 0"),
        (["digit 0.png", "topp=1"], "unknown key 'topp': did you mean 'top'?"),
    ],
)
def test_predict_tells_what_it_cannot_use(words, message, pictures, capsexp):
    code, out, error = capsexp("predict", "run=run", *words)
    assert (code, out) == (2, "")
    assert error.startswith(f"capsexp: {message}")
    assert error.count("\n") == 1


def test_predict_without_reconstructions_writes_none(pictures, at_home, capsexp):
    target = at_home / "digit 0.reconstruction.png"
    target.unlink(missing_ok=True)
    code, out, _ = capsexp("predict", "run=run", "digit 0.png", "reconstructions=false")
    assert code == 0
    assert "digit 0.png" in out
    assert not target.exists()


def test_doctor_tells_versions_devices_data_and_compiler(at_home, capsexp):
    code, out, _ = capsexp("doctor", COLUMNS="250")
    assert code == 0
    assert f"torch {torch.__version__.partition('+')[0]}" in out
    assert re.search(r"cuda +│ (no +│ device=cuda is refused|.*device=cuda)", out)
    assert re.search(r"data: digits +│ embedded +│ dataset=digits", out)
    assert re.search(r"data: mnist +│ missing +│ capsexp data prepare mnist", out)
    assert re.search(r"│ compiler +│", out)
    assert re.search(r"│ allocator +│", out)


def test_data_list_and_verify(at_home, capsexp, tmp_path):
    code, out, _ = capsexp("data", COLUMNS="250")
    assert code == 0
    assert re.search(r"digits +│ embedded", out)
    assert re.search(rf"mnist +│ missing +│ 0 +│ {tmp_path / 'data'}", out)
    assert capsexp("data", "verify", "digits")[:2] == (0, "digits: verified (embedded)\n")
    code, out, _ = capsexp("data", "verify", "digits", "mnist", "data_root=elsewhere", COLUMNS="250")
    assert code == 1
    assert "mnist: elsewhere/MNIST/raw/train-images-idx3-ubyte is missing" in out


@pytest.mark.parametrize("place", range(3))
def test_options_may_stand_anywhere_among_overrides(place):
    words = ["a=1,2", "b=3"]
    words[place:place] = ["-m", "-cn", "own"]
    options, flags, overrides = parse(words)
    assert (options.multirun, options.config_name) == (True, "own")
    assert (flags, overrides) == (["-m", "-cn", "own"], ["a=1,2", "b=3"])


def test_another_launcher_uses_the_same_directories_and_skips_what_is_complete(capsexp, tmp_path):
    small = ["trainer=smoke", "trainer.limit_train_batches=1", "trainer.test=none", "hydra/launcher=basic"]
    words = ["train", "routing.iterations=1,2", "-m", *small, f"hydra.sweep.dir={tmp_path}/sweep"]
    code, out, error = capsexp(*words)
    assert (code, error) == (0, "")
    assert "job 0: " in out
    runs = sorted((tmp_path / "sweep").glob("*/tb"))
    for iterations, run in enumerate((tb.parent for tb in runs), start=1):
        overrides = (run / ".hydra" / "overrides.yaml").read_text()
        assert f"routing.iterations={iterations}" in overrides
        assert run.name == job_name(RunDir(run).overrides())
        assert RunDir(run).status()["status"] == "completed"
    assert len(runs) == len(json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]) == 2
    code, out, error = capsexp(*words)
    assert (code, error) == (0, "")
    assert out.count(" is complete: ") == 2


def test_a_job_that_fails_makes_the_sweep_fail_whatever_the_launcher(capsexp, tmp_path):
    small = ["trainer=smoke", "trainer.limit_train_batches=1", "hydra/launcher=basic"]
    words = ["train", "-m", "seed=0,1", *small, f"hydra.sweep.dir={tmp_path}/sweep"]
    (tmp_path / "sweep" / job_name(["seed=0", *small[:2]]) / "checkpoints").mkdir(parents=True)
    broken = tmp_path / "sweep" / job_name(["seed=0", *small[:2]]) / "checkpoints"
    for name in ("step-00000001.pt", "step-00000002.pt"):
        (broken / name).write_bytes(b"")
    (broken / "step-00000002.json").write_text("{}")
    code, out, error = capsexp(*words)
    assert code == 1
    assert "no usable checkpoint is left in" in error
    assert re.search(r"seed=0 +│ failed", out)
    assert re.search(r"seed=1 +│ finished", out)


def test_a_wrong_value_in_a_sweep_is_told_before_any_job_runs(capsexp, no_runs):
    code, out, error = capsexp("train", "-m", "routing.iterations=1,2,0", "trainer=smoke")
    assert (code, out) == (2, "")
    assert error == "capsexp: routing: iterations must be >= 1, got 0\n"


def test_every_run_without_a_name_gets_a_directory_of_its_own(capsexp, tmp_path):
    words = (
        "train",
        "loss.present=0.8",
        "trainer=smoke",
        "trainer.limit_train_batches=1",
        "trainer.test=none",
    )
    for _ in range(2):
        assert capsexp(*words)[0] == 0
    runs = list((tmp_path / "outputs" / "dynamic_routing_small-digits").iterdir())
    assert len(runs) == 2
    assert all("-loss.present-0.8-" in run.name for run in runs)
    assert capsexp(*words, "experiment=quickstart")[0] == 0
    assert len(list((tmp_path / "outputs" / "quickstart").iterdir())) == 1


def test_the_baseline_trains_and_is_evaluated_from_the_command_line(capsexp, tmp_path):
    small = ["model=cnn_sabour", "model.hidden=[8]", "model.conv_channels=[4,4,4]", "trainer=smoke"]
    assert capsexp("train", *small, f"run={tmp_path}/run")[0] == 0
    code, out, _ = capsexp("eval", f"run={tmp_path}/run")
    assert code == 0
    assert "cross_entropy" in out


def test_a_folder_with_any_name_can_hold_runs(capsexp, tmp_path, monkeypatch):
    folder = tmp_path / "a = b, c's é"
    folder.mkdir()
    monkeypatch.chdir(folder)
    small = ["trainer=smoke", "trainer.limit_train_batches=1", "trainer.test=none"]
    code, _, error = capsexp("train", *small, CAPSEXP_OUTPUTS=str(folder / "outputs"))
    assert (code, error) == (0, "")
    assert len(list((folder / "outputs").rglob("status.json"))) == 1


def test_missing_data_are_told_before_a_run_directory_is_made(tmp_path, capsexp):
    code, _, error = capsexp(
        "train",
        "dataset=mnist",
        "model=dynamic_routing",
        f"data_root={tmp_path}",
        f"output_root={tmp_path / 'out'}",
    )
    assert code == 2
    assert "data set mnist is not complete under" in error
    assert not (tmp_path / "out").exists()
