"""Values that no run can mean, for every key of the config."""

import random
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from capsexp.config.compose import compose, to_plain

MODELS = ("dynamic_routing_small", "em_routing", "cnn_sabour")  # that fit the digits
TEXTS = {"run", "output_root", "data_root"}  # any text is a path
SIGNED = {"beta_u", "beta_a"}  # logits
OPEN = {"plugins", "paper", "_partial_"}  # of any content; the last is no setting


def leaves(node: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of a plain config with their values."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, f"{at}.{key}" if at else key)
    else:
        yield at, node


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# By kind: the override of a key, and the values of the config for which it is a mistake. For other values it
# can have a meaning: a weight of 0, a text that is a number, a rate of 1e30.
KINDS = {
    "nan": ("{}=.nan", lambda value: not isinstance(value, str)),
    "inf": ("{}=.inf", lambda value: not isinstance(value, str)),
    "negative": ("{}=-1", lambda value: isinstance(value, int | float)),
    "zero": ("{}=0", lambda value: is_count(value) and value > 1),
    "huge": ("{}=1e30", lambda value: isinstance(value, bool) or is_count(value)),
    "wrong type": ("{}=none-such", lambda value: True),
    "list": ("{}=[[1]]", lambda value: True),
    "dict": ("{}={{a:1}}", lambda value: True),
    "empty": ("{}=", lambda value: not isinstance(value, type(None))),
    "unknown": ("{}_x=1", lambda value: True),
}


def bad_overrides() -> list[tuple[str, str]]:
    """Return all bad overrides, each with its model."""
    return [
        (model, text.format(key))
        for model in MODELS
        for key, value in leaves(to_plain(compose("train", [f"model={model}"], config_dir=None)))
        if (name := key.rpartition(".")[2]) not in OPEN
        for kind, (text, is_mistake) in KINDS.items()
        if is_mistake(value) and not (name in SIGNED and kind == "negative")
        if name not in TEXTS or kind in ("list", "unknown")
    ]


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.soak)])
def test_a_bad_value_is_refused_in_one_line_before_a_directory_is_made(
    count, capsexp, tmp_path, monkeypatch, tiny_overrides
):
    monkeypatch.chdir(tmp_path)
    # A run that starts all the same is short.
    common = [text for text in tiny_overrides if not text.startswith("model.")]
    wrong = []
    for model, override in random.Random(0).sample(bad_overrides(), count):
        code, _, errors = capsexp("train", f"model={model}", *common, override)
        refused = (code, errors.count("\n"), errors[:9]) == (2, 1, "capsexp: ")
        if not refused or any(tmp_path.iterdir()):
            wrong.append((model, override, code, errors))
            shutil.rmtree(tmp_path / "outputs", ignore_errors=True)
    assert wrong == []
