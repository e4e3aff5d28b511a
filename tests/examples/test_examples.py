"""The examples run as they are, on the digits that need no download."""

import importlib.util
import itertools
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOK = EXAMPLES / "notebooks" / "capsules_from_scratch.ipynb"


def test_a_plain_loop_learns_the_digits(capsys):
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / "mnist_in_plain_pytorch.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    # Seeds 0 to 9 give 86 to 91 % after one epoch.
    assert example.main("digits", 1) > 0.75
    assert capsys.readouterr().out.startswith("epoch 1: test accuracy ")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own packages
def test_the_notebook_runs_and_was_committed_with_its_outputs(monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="Jupyter is not installed")
    nbclient = pytest.importorskip("nbclient", reason="Jupyter is not installed")
    committed = nbformat.read(NOTEBOOK, as_version=4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    executed = nbclient.NotebookClient(nbformat.read(NOTEBOOK, as_version=4), timeout=600).execute()
    for before, after in zip(committed.cells, executed.cells, strict=True):
        assert kinds(before) == kinds(after)


def kinds(cell):
    """What a cell shows: text or a figure, in order. Jupyter may divide printed text into several outputs."""
    outputs = (tuple(sorted(output.get("data", [output.get("name")]))) for output in cell.get("outputs", []))
    return [kind for kind, _ in itertools.groupby(outputs)]
