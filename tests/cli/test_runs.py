"""`capsexp train` and `capsexp eval` from end to end, on the embedded digits."""

import json
import re

import pytest
import torch

from capsexp.config.naming import job_name
from capsexp.training.run_dir import RunDir


def test_training_ends_well_and_says_where_it_is(trained, home):
    assert (trained.returncode, trained.stderr) == (0, "")
    assert "CapsNet with " in trained.stdout
    assert "test/accuracy" in trained.stdout
    assert trained.stdout.endswith(f"run: {home / 'run'}\ncurves: tensorboard --logdir {home / 'run'}\n")


def test_a_run_directory_has_the_documented_files(trained, home):
    run = home / "run"
    names = {path.relative_to(run).parts[0] for path in run.iterdir()} - {"dirty.patch"}
    expected = (
        ".hydra resolved_config.yaml command.txt env.json status.json metrics.jsonl train.log tb checkpoints"
    )
    errors = {"test_errors.json", "validation_errors.json"}
    assert names == {*expected.split(), *errors, "data.json", "figures", "run.lock", "timing.jsonl"}
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
    assert len(list((run / "tb").glob("events.out.tfevents.*"))) == 3  # begin, metrics, end
    assert "validation/accuracy" in (run / "train.log").read_text()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 2, 2]
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["step"], status["exit_code"]) == ("completed", 2, 0)
    assert status["caveats"] == []
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
        f"capsexp: {at_home / 'run'} holds a run with another config: "
        "choose another run=DIR, or pass resume=force\n"
    )
    assert {path: path.read_bytes() for path in before} == before


def table_metrics(text):
    return {name: float(value) for name, value in re.findall(r"│ ([\w/]+) +│ ([\d.e-]+) +│", text)}


def test_eval_repeats_the_metrics_of_training(at_home, capsexp):
    code, out, error = capsexp("eval", "run=run", "weights=last")
    assert (code, error) == (0, "")
    results = json.loads((at_home / "run" / "status.json").read_text())["results"]
    printed = table_metrics(out)
    assert printed["accuracy"] == pytest.approx(results["test/accuracy"], rel=1e-4)
    assert printed["loss"] == pytest.approx(results["test/loss"], rel=1e-4)


def test_eval_takes_overrides(at_home, capsexp):
    plain = table_metrics(capsexp("eval", "run=run")[1])
    arguments = ("routing.iterations=5", "dataset.preprocess.shift=1", "trainer.limit_eval_batches=null")
    code, out, _ = capsexp("eval", "run=run", "split=validation", *arguments)
    assert code == 0
    assert "validation, 144 images" in out
    assert table_metrics(out)["coupling_entropy/class_caps"] != plain["coupling_entropy/class_caps"]
    last = json.loads((at_home / "run" / "evaluations.jsonl").read_text().splitlines()[-1])
    assert (last["split"], last["config"]["routing"]["iterations"]) == ("validation", 5)
    assert last["config"]["model"]["routing"]["iterations"] == 5


def test_eval_accepts_the_old_name_of_split(at_home, capsexp):
    code, out, _ = capsexp("eval", "run=run", "part=validation")
    assert code == 0
    assert "validation, " in out
    last = json.loads((at_home / "run" / "evaluations.jsonl").read_text().splitlines()[-1])
    assert (last["split"], last["config"]["split"]) == ("validation", "validation")
    assert "part" not in last["config"]


@pytest.mark.parametrize("command", ["eval", "predict", "analyze"])
def test_cfg_shows_the_config_of_a_run(command, at_home, capsexp):
    study = ["study=routing"] if command == "analyze" else []
    code, out, error = capsexp(command, "run=run", *study, "seed=9", "--cfg", "job")
    assert (code, error) == (0, "")
    assert "\nseed: 9\n" in out
    assert "weights: best\n" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["split=tset"], "split: must be 'test', 'familiar', 'validation' or 'train', got 'tset'"),
        (["weights=bst"], "weights: must be best, last or the step of a checkpoint, got 'bst'"),
        (["weights=7"], "capsexp: no checkpoint at step 7; available: 2"),
        (["model.class_dim=8"], "the weights in run are of another network: "),
        (["routing.iteration=5"], "unknown key 'routing.iteration': did you mean 'routing.iterations'?"),
        (["routing.iterations=1,2"], "several values make a sweep"),
    ],
)
def test_eval_reports_what_does_not_fit_the_run(arguments, message, at_home, capsexp):
    code, _, error = capsexp("eval", "run=run", *arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_every_run_without_a_name_gets_a_directory_of_its_own(capsexp, tmp_path):
    arguments = (
        "train",
        "loss.present=0.8",
        "trainer=smoke",
        "trainer.limit_train_batches=1",
        "trainer.test=none",
    )
    for _ in range(2):
        assert capsexp(*arguments)[0] == 0
    runs = list((tmp_path / "outputs" / "dynamic_routing_small-digits").iterdir())
    assert len(runs) == 2
    assert all("-loss.present-0.8-" in run.name for run in runs)
    assert capsexp(*arguments, "experiment=quickstart")[0] == 0
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


def test_missing_data_are_reported_before_a_run_directory_is_made(tmp_path, capsexp):
    code, _, error = capsexp(
        "train",
        "dataset=mnist",
        "model=dynamic_routing",
        f"data_root={tmp_path}",
        f"output_root={tmp_path / 'out'}",
    )
    assert code == 2
    assert "dataset mnist is not complete under" in error
    assert not (tmp_path / "out").exists()


def test_another_launcher_uses_the_same_directories_and_skips_what_is_complete(capsexp, tmp_path):
    small = ["trainer=smoke", "trainer.limit_train_batches=1", "trainer.test=none", "hydra/launcher=basic"]
    arguments = ["train", "routing.iterations=1,2", "-m", *small, f"hydra.sweep.dir={tmp_path}/sweep"]
    code, out, error = capsexp(*arguments)
    assert (code, error) == (0, "")
    assert "job 0: " in out
    runs = sorted((tmp_path / "sweep").glob("*/tb"))
    for iterations, run in enumerate((tb.parent for tb in runs), start=1):
        overrides = (run / ".hydra" / "overrides.yaml").read_text()
        assert f"routing.iterations={iterations}" in overrides
        assert run.name == job_name(RunDir(run).overrides())
        assert RunDir(run).status()["status"] == "completed"
    assert len(runs) == len(json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]) == 2
    code, out, error = capsexp(*arguments)
    assert (code, error) == (0, "")
    assert out.count(" is complete: ") == 2


def test_a_job_that_fails_makes_the_sweep_fail_whatever_the_launcher(capsexp, tmp_path):
    small = ["trainer=smoke", "trainer.limit_train_batches=1", "hydra/launcher=basic"]
    arguments = ["train", "-m", "seed=0,1", *small, f"hydra.sweep.dir={tmp_path}/sweep"]
    assert capsexp(*arguments)[0] == 0
    damaged = tmp_path / "sweep" / job_name(["seed=0", *small[:2]])
    for checkpoint in (damaged / "checkpoints").glob("*.pt"):
        checkpoint.write_bytes(b"")
    (damaged / "status.json").write_text('{"status": "interrupted"}')
    code, out, error = capsexp(*arguments)
    assert code == 1
    assert "no usable checkpoint is left in" in error
    assert re.search(r"seed=0 +│ failed", out)
    assert re.search(r"seed=1 +│ finished", out)


def test_a_wrong_value_in_a_sweep_is_reported_before_any_job_runs(capsexp, no_runs):
    code, out, error = capsexp("train", "-m", "routing.iterations=1,2,0", "trainer=smoke")
    assert (code, out) == (2, "")
    assert error == "capsexp: routing: iterations must be >= 1, got 0\n"
