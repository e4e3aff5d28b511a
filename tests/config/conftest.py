"""Configs of the quickstart with changes that Hydra would refuse, and packages outside capsexp."""

import copy
import functools
import operator
import sys
import textwrap

import pytest
import yaml
from omegaconf import OmegaConf

from capsexp.config.build import build_components
from capsexp.config.compose import compose, to_plain
from capsexp.errors import UserError


@functools.cache
def quickstart():
    return to_plain(compose("train", [], config_dir=None))


@pytest.fixture
def edited():
    """The quickstart's config with keys set (`key=value`) or removed (`~key`), whatever Hydra would say."""

    def edit(*changes):
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

    return edit


@pytest.fixture
def problems():
    """The problems that `build_components` reports; there must be some."""

    def report(settings, plugins=()):
        with pytest.raises(UserError) as caught:
            build_components(settings, plugins=list(plugins))
        return list(caught.value.problems)

    return report


@pytest.fixture
def marker(tmp_path):
    """A path that hostile nodes create when they run."""
    return tmp_path / "it_ran"


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


@pytest.fixture
def saved_run(tmp_path):
    """Write a run directory with a config, as somebody might send one; return its path."""

    def write(**changes):
        settings = OmegaConf.to_container(compose("train", [], config_dir=None), resolve=False)
        del settings["hydra"]
        path = tmp_path / "sent"
        (path / ".hydra").mkdir(parents=True)
        OmegaConf.save(OmegaConf.create(settings | changes), path / ".hydra" / "config.yaml")
        return path

    return write


@pytest.fixture
def own(tmp_path):
    """Write a YAML into a folder of a user's own configs; return the folder."""

    def write(name, text):
        path = tmp_path / "own" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(tmp_path / "own")

    return write
