"""What several test files need: tiny runs through the same path that the command line takes."""

import contextlib
import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server
import jaxtyping
import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

# Tests are many small operations: with more threads they wait for each other, most of all on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"

from capsexp.cli import entry as cli
from capsexp.cli import jobs
from capsexp.config.build import build_components
from capsexp.config.components import Components
from capsexp.config.compose import compose, to_plain
from capsexp.config.settings import GROUPS, with_setting
from capsexp.training.run_dir import RunDir

fork_server.install()
# Processes that tests start import the tree under test, not the installed package.
ROOT = str(Path(__file__).resolve().parents[1])
OTHERS = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", ROOT)]
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *OTHERS])

# Small enough for a second, large enough for every part: several steps an epoch, a smaller last batch.
TINY = (
    "device=cpu",
    "device.allocator=default",
    "device.threads=1",
    "model.conv_channels=8",
    "model.primary_types=2",
    "model.decoder.hidden=[8,8]",
    "trainer.batch_size=100",
    "trainer.limit_train_batches=5",
    "trainer.limit_eval_batches=1",
    "trainer.max_epochs=3",
    "trainer.log_every=1",
    "trainer.save_every=2",
)


def composed(*overrides: str) -> dict[str, Any]:
    """The plain config of `capsexp train`, tiny unless overridden."""
    return to_plain(compose("train", [*TINY, *overrides], config_dir=None))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with slow tests first, so that no worker gets one when the others have finished."""
    long_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long_files)


@pytest.fixture(autouse=True)
def no_stored_options():
    """What a test stores as a run's config is gone after it."""
    yield
    for group in GROUPS:
        ConfigStore.instance().repo.get(group, {}).pop("stored.yaml", None)


@pytest.fixture
def no_type_checks():
    """Call annotated functions as users do: without jaxtyping's checks of the arguments."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def tiny_overrides() -> tuple[str, ...]:
    return TINY


@pytest.fixture
def tiny_config() -> Callable[..., dict[str, Any]]:
    return composed


@pytest.fixture
def em_config() -> Callable[..., dict[str, Any]]:
    """The plain config of a run with EM routing, of embedded digits unless overridden."""
    always = ("model=em_routing", "device=cpu", "device.allocator=default", "device.threads=1")
    return lambda *overrides: to_plain(compose("train", [*always, *overrides], config_dir=None))


@pytest.fixture
def tiny_components() -> Callable[..., Components]:
    return lambda *overrides: build_components(composed(*overrides), plugins=[])


@pytest.fixture
def train_tiny() -> Callable[..., dict[str, float]]:
    """Train a tiny run in a directory; more overrides may follow."""

    def run(path: Path, *overrides: str) -> dict[str, float]:
        from capsexp.training.train import train

        settings = composed(*overrides)
        directory = RunDir(path)
        with directory.locked():
            directory.check_config(settings, resume=settings["resume"], command=["capsexp", "train"])
            with directory.track_status({}):
                return train(build_components(settings, plugins=[]), directory, settings)

    return run


@pytest.fixture
def metrics_of() -> Callable[[Path], list[dict[str, Any]]]:
    return lambda path: [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def capsexp(monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: `capsexp("train", "seed=1", COLUMNS="200")`.

    Keywords are environment variables. Returns exit code, stdout, stderr.
    """

    def call(*arguments: object, **variables: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["capsexp", *map(str, arguments)])
        monkeypatch.setattr(jobs, "_argv", tuple(sys.argv))
        folders = {"CAPSEXP_OUTPUTS": str(tmp_path / "outputs"), "CAPSEXP_DATA": str(tmp_path / "data")}
        for name, value in {**folders, "HYDRA_FULL_ERROR": "1", **variables}.items():
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


@contextlib.contextmanager
def serve(logdir, *options):
    """The server, and a function that gets JSON from it."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", "0", *options]
    log_file = logdir.parent / f"{logdir.name}.log"
    with open(log_file, "w") as log:
        server = subprocess.Popen(command, stderr=log, stdout=log)
    try:
        text = poll(log_file.read_text, lambda text: "http://" in text)
        address = re.search(r"http://\S+/", text)[0]

        def get(path, body=None):
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.loads(answer.read())

        yield get
    finally:
        server.terminate()
        server.wait()


def poll(get_value, accept, *, seconds=600):
    """Poll: other processes work in their own time, on a busy machine in ten times that of a quiet one."""
    deadline = time.monotonic() + seconds
    while not accept(value := get_value()):
        assert time.monotonic() < deadline, f"never came: {str(value)[:500]}"
        time.sleep(0.1)
    return value


@pytest.fixture
def tensorboard():
    """`with tensorboard(LOGDIR, *OPTIONS) as get: get("data/runs")`."""
    return serve


@pytest.fixture
def until():
    """`until(get_value, accept)` waits for a value that is accepted."""
    return poll


# For runs that are written instead of trained: a few settings, and a part that repeats within another.
SETTINGS = {
    "run": "here",
    "device": {"name": "cpu"},
    "dataset": {"_target_": "capsexp.dataset.digits.Digits", "validation": 0.1},
    "routing": {"iterations": 3, "bias": False},
    "optimizer": {"lr": {"start": 0.001}, "weight_decay": 0.0},
    "loss": {"weight_decay": 0.0},
    "model": {"conv_channels": 8, "decoder": {"hidden": [8, 8]}, "routing": {"iterations": 3, "bias": False}},
    "trainer": {"test": "best"},
    "seed": 0,
}


@pytest.fixture
def write_run(tmp_path) -> Callable[..., Path]:
    """Write a run's files: `write_run("a", {"seed": 1}, validation=[0.5, 0.6], test=0.6)`."""

    def write(name: str, settings: dict[str, Any] | None = None, **fields: Any) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True, exist_ok=True)
        config = fields.pop("config", SETTINGS)
        for key, value in (settings or {}).items():
            config = with_setting(config, key, value)
        validation, test = fields.pop("validation", []), fields.pop("test", None)
        lines = [
            {"step": 10 * number, "epoch": number, "train/loss": 1 / number, "train/accuracy": 0.5}
            for number in range(1, 4)
        ]
        lines += [
            {"step": 10 * number, "epoch": number, "validation/accuracy": value}
            for number, value in enumerate(validation, 1)
        ]
        version = fields.pop("version", importlib.metadata.version("capsexp"))
        status = {"status": "completed", "started": 1e9, "heartbeat": 1e9 + 60, "seconds": 60.0}
        status |= {"step": 30, "total": 30, "choices": {"model": "small", "dataset": "digits"}}
        if validation:
            status["best"] = {"accuracy": max(validation), "step": 10}
        if test is not None:
            status["results"] = {"test/accuracy": test}
        (path / "status.json").write_text(json.dumps(status | fields))
        (path / "resolved_config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (path / "env.json").write_text(json.dumps({"versions": {"capsexp": version}}))
        return path

    return write
