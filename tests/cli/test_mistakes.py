"""A user's mistakes: one line each on stderr, exit code 2, no run. A bug keeps its traceback."""

import json
import os
import re

import pytest

from capsexp.cli import entry as cli

SWITCHED_OFF = "-cp is switched off: capsexp has its own conf/; -cd DIR adds a folder of your own to it"
TOO_LARGE = "dataset: validation must leave an image to train on, got 5000 of 1438"
BEFORE = "for a folder of that name write ./ before it"


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["trian"], ["unknown command 'trian': did you mean 'train'?"]),
        (["xyzzy"], [f"unknown command 'xyzzy'; choose from {', '.join(sorted(cli.COMMANDS))}"]),
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
            ["train", "-cp", "own"],
            ["-cp is switched off: capsexp has its own conf/; -cd DIR adds a folder of your own to it"],
        ),
        (
            ["train", "--experimental-rerun", "x.pickle"],
            ["--experimental-rerun is switched off: it loads a pickle; use run=DIR"],
        ),
        *(
            (
                [*arguments, "experiment=sabour2017_table1"],
                [
                    "experiment=sabour2017_table1 is a table of 8 recipes: `capsexp train -m` trains them "
                    "all, experiment=sabour2017_mnist_baseline is the first of them"
                ],
            )
            for arguments in (["train"], ["train", "--cfg", "job"], ["bench"])
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
            ["run: a sweep names the directories of its runs; use hydra.sweep.dir=DIR instead"],
        ),
        (["bench", "modle=x"], ["unknown key 'modle': did you mean 'model'?"]),
        (["eval"], ["capsexp eval needs a run: capsexp eval run=DIR"]),
        (["train", "--foo"], ["unrecognized arguments: --foo (--hydra-help lists the options)"]),
        (["predict", "x.png"], ["capsexp predict needs a run: capsexp predict run=DIR"]),
        (
            ["eval", "run=nothing"],
            ["nothing is not a run directory: there is no nothing/.hydra/config.yaml"],
        ),
        (
            ["predict", "run=nothing", "x.png"],
            ["nothing is not a run directory: there is no nothing/.hydra/config.yaml"],
        ),
        (["eval", "run=é"], ["é is not a run directory: there is no é/.hydra/config.yaml"]),
        (
            ["train", "model.padding=é"],
            [
                "cannot read 'model.padding=é': token recognition error at: 'é'; as a text it is written "
                "'model.padding=\"é\"'"
            ],
        ),
        (
            ["train", "modle=x", "seed=-1", "trainer.max_epochs=0", "trainer.log_every=x", "run="],
            [
                "unknown key 'modle': did you mean 'model'?",
                "run: must not be empty",
                "trainer.log_every: must be int, got 'x'",
                "seed: must be an integer >= 0, got -1",
                "trainer: max_epochs must be >= 1, got 0",
            ],
        ),
        (
            ["train", "loss=spread", "loss.margin.end=5", "dataset=image_folder", "dataset.pth=x"],
            [
                "unknown key 'dataset.pth': did you mean 'dataset.path'?",
                "dataset.path has no value yet: set dataset.path=…",
                "loss: margin must be in (0, 1], got 1.025 at step 184549376 of 1073741824",
            ],
        ),
        (["train", "-cp", "/tmp"], [SWITCHED_OFF]),
        (["train", "dataset.validation=5000"], [TOO_LARGE]),
        (["data", "list", "data_root=5"], [f"data_root: must be a path, got 5; {BEFORE}"]),
        (["doctor", "data_root=[1]"], [f"data_root: must be a path, got [1]; {BEFORE}"]),
        (["eval", "run=5"], [f"run: must be a path, got 5; {BEFORE}"]),
        (["data", "lst"], ["unknown command 'data lst': did you mean 'list'?"]),
        (["data", "verify", "digts"], ["unknown dataset 'digts': did you mean 'digits'?"]),
        (["doctor", "data_rot=x"], ["unknown key 'data_rot': did you mean 'data_root'?"]),
    ],
    ids=lambda texts: " ".join(texts) if "capsexp" not in texts else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, lines, capsexp, no_runs):
    assert capsexp(*arguments) == (2, "", "".join(f"capsexp: {line}\n" for line in lines))


def test_data_prepare_needs_names(capsexp):
    code, _, error = capsexp("data", "prepare")
    assert code == 2
    assert "capsexp data prepare needs names: affnist, cifar10, digits, " in error


def test_a_mistake_in_a_process_of_its_own_has_no_traceback(tmp_path, script, shell):
    done = shell("train", "modle=x", "model=y", start=script, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert [line.partition(": ")[0] for line in done.stderr.splitlines()] == ["capsexp", "capsexp"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"a: [1", b"\x80", b"- 1\n"], ids=["yaml", "bytes", "list"])
def test_a_saved_config_that_cannot_be_read_is_reported(content, capsexp, tmp_path):
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / ".hydra" / "config.yaml").write_bytes(content)
    code, _, error = capsexp("eval", f"run={tmp_path / 'run'}")
    assert code == 2
    assert re.match(r"capsexp: \S+config.yaml cannot be read: ", error)
    assert error.count("\n") == 1


def test_a_saved_config_without_its_groups_is_reported(capsexp, tmp_path):
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / ".hydra" / "config.yaml").write_text("a: 1\n")
    code, _, error = capsexp("eval", f"run={tmp_path / 'run'}")
    assert code == 2
    assert "capsexp: dataset: nothing is chosen; choose with dataset=OPTION\n" in error


BUG = """
from capsexp.loss.margin import Margin

class Loss(Margin):
    def __call__(self, output, batch, step):
        raise KeyError("a bug")
"""


def test_a_bug_keeps_its_traceback_and_its_run_says_failed(tmp_path, shell):
    (tmp_path / "buggy.py").write_text(BUG)
    arguments = ("train", "trainer=smoke", "plugins=[buggy]", "loss._target_=buggy.Loss", "run=run")
    paths = [str(tmp_path), os.environ["PYTHONPATH"]]
    done = shell(*arguments, cwd=tmp_path, PYTHONPATH=os.pathsep.join(paths))
    assert done.returncode == 1
    assert "Traceback (most recent call last):" in done.stderr
    assert 'buggy.py", line 6, in __call__' in done.stderr
    assert done.stderr.endswith("KeyError: 'a bug'\n")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["status"], status["error"], status["exit_code"]) == ("failed", "KeyError: 'a bug'", 1)
