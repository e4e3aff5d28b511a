"""YAML files of a user's own config directory: what is wrong with them is one line with the file."""

import re

import pytest

from capsexp.config.compose import compose, to_plain
from capsexp.errors import UserError

HEADER = "# @package _global_\n"


@pytest.fixture
def problem(tmp_path):
    """The line about a recipe `own.yaml` with this content."""

    def report(content):
        (tmp_path / "experiment").mkdir()
        (tmp_path / "experiment" / "own.yaml").write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
        with pytest.raises(UserError) as caught:
            to_plain(compose("train", ["experiment=own"], config_dir=str(tmp_path)))
        (line,) = caught.value.problems
        assert "\n" not in line
        return line.replace(str(tmp_path / "experiment"), "")

    return report


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (HEADER + "trainer:\n\tmax_steps: 1\n", "/own.yaml, line 3: .*; indent with spaces, not with a tab"),
        (HEADER + "seed: 1\nseed: 2\n", "/own.yaml, line 3: 'seed' is there twice"),
        (
            HEADER.encode() + b"# Gr\xf6\xdfe\nseed: 1\n",
            "/own.yaml, line 2: is not UTF-8 .byte 0xf6.; save",
        ),
        (HEADER.encode("utf-16"), "/own.yaml, line 1: is not UTF-8"),
        ("- a\n- b\n", "/own.yaml, line 1: must hold settings, KEY: VALUE, got a list"),
        (HEADER + "hello\n", "/own.yaml, line 2: must hold settings, KEY: VALUE, got a single value"),
        ("", "/own.yaml: holds no settings"),
        (HEADER, "/own.yaml: holds no settings"),
        (HEADER + "<<: 5\nseed: 1\n", "/own.yaml, line 2: << needs a group of keys"),
        (HEADER + "x: &a [*a]\n", "/own.yaml, line 2: a value contains itself"),
        (HEADER + "x: *b\n", "/own.yaml, line 2: found undefined alias"),
        (HEADER + "seed: [1\n", "/own.yaml, line 3: while parsing a flow sequence"),
        (HEADER + "1: x\n", "/own.yaml, line 2: a key must be a word, got 1"),
        (HEADER + "? [a]\n: x\n", "/own.yaml, line 2: a key must be a word, got a list"),
        (
            HEADER + "seed: !!python/object:os.system x\n",
            "/own.yaml, line 2: could not determine a constructor",
        ),
        (HEADER + "seed: 1\n---\nseed: 2\n", "/own.yaml, line 3: expected a single document"),
        (HEADER + "seed: ${nope\n", "/own.yaml, line 2: "),
        (HEADER + "seed: ${nope}\n", "seed: Interpolation key 'nope' not found"),
        (HEADER + "model.class_dim: 1\n", "/own.yaml: write model: and below it, indented, class_dim:"),
        (
            HEADER + "trainr:\n  max_steps: 1\n",
            "experiment=own: unknown key 'trainr': did you mean 'trainer'",
        ),
        (HEADER + "table: 5\n", "table: must be a list of recipes, got 5"),
        (
            "# @package _globl_\nseed: 1\n",
            "/own.yaml, line 1: a recipe begins with the line '# @package _global_'",
        ),
        ("seed: 1\n", "/own.yaml, line 1: a recipe begins with the line"),
        ("# @package\nseed: 1\n", "/own.yaml, line 1: Expected header format"),
        (HEADER + "defaults: trainer\nseed: 1\n", "Invalid defaults list in 'experiment/own'"),
        (HEADER + "defaults: [5]\n", "Unsupported type in defaults"),
        (HEADER + "defaults:\n  - override /modl: x\n", "In 'experiment/own': Could not override 'modl'"),
        (HEADER + "defaults:\n  - /experiment: own\n", "a defaults list names its own config"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_one_line(content, line, problem):
    reported = problem(content)
    assert re.match(line, reported), reported


def test_a_bomb_of_aliases_is_not_expanded(problem):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "more than 10000 values" in problem(HEADER + "\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "content", ["\ufeff" + HEADER + "seed: 3\n", HEADER.replace("\n", "\r\n") + "seed: 3\r\n"]
)
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(content, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_bytes(content.encode())
    assert compose("train", ["experiment=own"], config_dir=str(tmp_path)).seed == 3
