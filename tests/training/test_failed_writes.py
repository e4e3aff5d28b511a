"""A disk that is full, a place that can only be read, and what is no file where a run writes."""

import json

import pytest
from full_disk import largest_file

from capsexp.errors import RunStopped, UserError
from capsexp.training import checkpoint

LINE = (
    "the checkpoint of step {} is kept: make room, or fix what is named, and run the same command to resume"
)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_run_that_ends_on_a_full_disk_resumes_bit_for_bit(
    share, tmp_path, kill_at, train_tiny, whole_run, assert_same_run
):
    kill_at(5, tmp_path)
    size = next((tmp_path / "checkpoints").glob("step-*.pt")).stat().st_size
    with largest_file(int(share * size)), pytest.raises(RunStopped) as caught:
        train_tiny(tmp_path)
    assert caught.value.exit_code == 1
    (line,) = caught.value.problems
    assert line.startswith(f"cannot write into {tmp_path}/")
    assert ": File too large" in line
    assert line.endswith(LINE.format(5))
    assert not list(tmp_path.rglob("*.tmp"))
    train_tiny(tmp_path)
    assert_same_run(tmp_path, whole_run())


def test_a_full_disk_before_the_first_checkpoint_is_told_too(tmp_path, train_tiny):
    with (
        largest_file(8000),
        pytest.raises(RunStopped, match=r"File too large .*; there is no checkpoint yet: make"),
    ):
        train_tiny(tmp_path)


def spoil(path):
    """Put a folder or a file where a run writes the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("") if path.name in ("tb", "figures") else path.mkdir()


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "status.json", "env.json", "tb", "figures", "figures/reconstruction.png"]
)
def test_what_is_no_file_or_no_folder_ends_a_run_in_one_line(name, tmp_path, train_tiny):
    spoil(tmp_path / name)
    with pytest.raises(UserError, match=f"^cannot write into {tmp_path / name}: .*(directory|folder)"):
        train_tiny(tmp_path)


@pytest.mark.parametrize("name", ["step-00000002.pt", "step-00000002.json", "last.pt"])
def test_a_checkpoint_that_cannot_get_its_name_ends_a_run_in_one_line(name, tmp_path, kill_at, train_tiny):
    kill_at(0, tmp_path)
    path = tmp_path / "checkpoints" / name
    path.mkdir(parents=True)
    line = f"^cannot write into {path.with_suffix('.pt')}: Is a directory; "
    with pytest.raises(RunStopped, match=line):
        train_tiny(tmp_path)


@pytest.fixture
def run(tmp_path, capsexp, tiny_overrides, monkeypatch):
    """A run in the working directory that the command line has trained."""
    monkeypatch.chdir(tmp_path)
    capsexp("train", "run=run", *tiny_overrides, "trainer.max_steps=4")
    return tmp_path / "run"


@pytest.fixture
def train_on(capsexp, tiny_overrides):
    """`train_on(OVERRIDES)`: the command that continues the run."""
    return lambda *more: capsexp(
        "train", "run=run", *tiny_overrides, "trainer.max_steps=6", "resume=force", *more
    )


def test_the_log_is_refused_by_name_and_not_by_a_traceback(run, train_on):
    (run / "train.log").unlink()
    (run / "train.log").mkdir()
    code, _, error = train_on()
    assert code == 1
    assert error.startswith(
        f"capsexp: cannot write into {run}/train.log: Is a directory; the checkpoint of step 4"
    )
    assert error.count("\n") == 1


def test_a_log_that_is_a_link_is_not_opened(run, train_on):
    (run.parent / "victim").write_text("precious")
    (run / "train.log").unlink()
    (run / "train.log").symlink_to("../victim")
    code, _, error = train_on()
    assert (code, error.count("\n")) == (2, 1)
    assert "run/train.log: it is a link to ../victim" in error
    assert (run.parent / "victim").read_text() == "precious"


def test_another_network_is_refused_before_its_config_replaces_that_of_the_run(run, train_on, capsexp):
    before = (run / "resolved_config.yaml").read_bytes(), (run / ".hydra" / "config.yaml").read_bytes()
    code, _, error = train_on("model.conv_channels=9")
    assert (code, error.count("\n")) == (2, 1)
    assert "the checkpoint of step 4 are of another network: size mismatch for " in error
    assert before == (
        (run / "resolved_config.yaml").read_bytes(),
        (run / ".hydra" / "config.yaml").read_bytes(),
    )
    code, _, error = train_on("optimizer=sgd")
    assert (code, error.count("\n")) == (2, 1)
    assert "the optimizer state in the checkpoint of step 4 does not fit SGD: it has 'betas'" in error
    assert capsexp("eval", "run=run")[0] == 0
    assert train_on()[0] == 0


def test_an_evaluation_that_cannot_be_stored_is_printed_with_one_notice(run, capsexp):
    (run / "evaluations.jsonl").mkdir()
    code, out, error = capsexp("eval", "run=run")
    assert code == 0
    assert "accuracy" in out
    assert error == "capsexp: not stored: cannot write into run/evaluations.jsonl: Is a directory\n"


def test_an_evaluation_is_not_appended_through_a_link(run, capsexp):
    (run.parent / "victim").write_text("precious")
    (run / "evaluations.jsonl").symlink_to("../victim")
    code, out, error = capsexp("eval", "run=run")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert (run.parent / "victim").read_text() == "precious"


@pytest.mark.parametrize("name", ["figures", "studies", "tb"])
def test_a_study_refuses_a_folder_that_is_a_link_before_the_work(name, run, capsexp):
    (run.parent / "elsewhere").mkdir()
    if (run / name).exists():
        (run / name).rename(run / "old")
    (run / name).symlink_to("../elsewhere")
    code, out, error = capsexp("analyze", "study=reconstructions", "run=run", "limit=5")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"capsexp: cannot write into run/{name}: it is a link to ../elsewhere")
    assert list((run.parent / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    "command", [["eval"], ["analyze", "study=reconstructions", "limit=5"], ["predict", "x.png"]]
)
def test_weights_that_are_not_finite_are_refused(command, run, capsexp):
    from PIL import Image

    Image.new("L", (8, 8)).save(run.parent / "x.png")
    path = checkpoint.list_saved(run / "checkpoints")[-1]
    saved = checkpoint.load(path)
    next(iter(saved["model"].values())).fill_(float("nan"))
    saved.pop("schema")
    checkpoint.save(path.parent, saved, step=4)
    code, out, error = capsexp(*command, "run=run")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"capsexp: {path}: refused, its weights 'prim")
    assert error.endswith("are not finite (NaN or infinite)\n")


def test_a_run_that_is_removed_while_it_trains_ends_in_one_line(
    tmp_path, monkeypatch, capsexp, tiny_overrides
):
    import shutil

    from capsexp.training import train

    monkeypatch.chdir(tmp_path)
    real = train.accumulate_gradients

    def remove(model, loss, batch, position, settings, **options):
        if position.number == 3:
            shutil.rmtree("run")
        return real(model, loss, batch, position, settings, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, "accumulate_gradients", remove)
        code, _, error = capsexp("train", "run=run", *tiny_overrides)
    line = f"capsexp: {tmp_path}/run was removed or replaced while this run trained in it: stopped\n"
    assert (code, error) == (1, line)
    assert not (tmp_path / "run").exists()
    code, _, error = capsexp("train", "run=run", *tiny_overrides)
    assert (code, error) == (0, "")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["resumes"] == []
