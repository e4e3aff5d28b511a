"""Runs that are killed, and their comparison with runs that are not."""

import pytest
import torch

from capsexp.training import checkpoint


class StopAt(Exception):  # noqa: N818
    """Ends a run as a kill would: no handler saves anything."""


def compare(a, b, at="state"):
    assert type(a) is type(b), at
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            compare(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), at
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            compare(x, y, f"{at}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), at
    else:
        assert a == b, at


def load_last(path):
    return checkpoint.load(path / "checkpoints" / "last.pt")


@pytest.fixture
def final_state():
    """`final_state(RUN)`: the last checkpoint of a run."""
    return load_last


@pytest.fixture
def assert_same_run():
    """`assert_same_run(RUN, OTHER)`: weights, optimizer, random state and metrics.jsonl, bit for bit.

    The seconds of training differ, unless a test sets the clock: then they are compared with `seconds=True`.
    """

    def check(path, other, *, seconds=False):
        assert (path / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
        states = [load_last(run) for run in (path, other)]
        if seconds:
            assert (path / "timing.jsonl").read_bytes() == (other / "timing.jsonl").read_bytes()
        else:
            states = [{**state, "seconds": 0.0} for state in states]
        compare(*states)

    return check


@pytest.fixture
def stop_at():
    """The exception with which tests end a run."""
    return StopAt


@pytest.fixture
def kill_at(monkeypatch, train_tiny):
    """`kill_at(STEP, RUN, *OVERRIDES)`: train a run that dies before optimizer step STEP + 1."""
    from capsexp.training import train

    real = train.accumulate_gradients

    def kill(step, path, *overrides, run=train_tiny):
        def dying(model, loss, batch, position, settings, **options):
            if position.number == step:
                raise StopAt
            return real(model, loss, batch, position, settings, **options)

        with monkeypatch.context() as patch:
            patch.setattr(train, "accumulate_gradients", dying)
            with pytest.raises(StopAt):
                run(path, *overrides)

    return kill


@pytest.fixture(scope="session")
def whole_runs(tmp_path_factory):
    """Uninterrupted runs by their overrides."""
    return {}, tmp_path_factory


@pytest.fixture
def whole_run(whole_runs, train_tiny):
    """`whole_run(*OVERRIDES)`: an uninterrupted run, trained once for all tests."""
    runs, folders = whole_runs

    def get(*overrides):
        if overrides not in runs:
            path = folders.mktemp("whole") / "run"
            train_tiny(path, *overrides)
            runs[overrides] = path
        return runs[overrides]

    return get
