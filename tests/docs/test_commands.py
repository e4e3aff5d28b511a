"""The commands and the Python of README.md and docs/*.md work as written.

Blocks of `bash` run in the order of the page, in a copy of the checkout in which `make demo` has been run.
A block below a line that is only a path and a colon is a file; the test writes it there. The other Python
blocks of a page form one program, which runs at the end. To keep training short, in the copy
`trainer.max_epochs` is 1 and `trainer.limit_train_batches` is 5.

A block below a line `<!-- not run: REASON -->` does not run; its training commands are composed instead.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import fork_server
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REASONS = {
    "as in README.md",
    "downloads files",
    "installs packages",
    "needs MNIST",
    "needs an extra",
    "needs smallNORB",
    "needs your images",
    "opens a server",
    "takes hours",
    "takes minutes",
}
FENCE = re.compile(r"```(\w+)")
FILE = re.compile(r"`([\w./]+\.\w+)`:")
NOT_RUN = re.compile(r"<!-- not run: (.*) -->")


class Block(NamedTuple):
    """A fenced block of code."""

    line: int
    language: str
    file: str | None
    text: str
    reason: str | None


def blocks(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        if fence := FENCE.fullmatch(lines[number]):
            end = lines.index("```", number)
            above = next(line for line in reversed(lines[:number]) if line)
            file, reason = FILE.fullmatch(above), NOT_RUN.fullmatch(above)
            text = "\n".join(lines[number + 1 : end]) + "\n"
            yield Block(number + 1, fence[1], file and file[1], text, reason and reason[1])
            number = end
        number += 1


def commands(text):
    """The argument lists of a block of shell."""
    for line in text.replace("\\\n", " ").splitlines():
        if arguments := shlex.split(line, comments=True):
            yield arguments


def page_name(path):
    return path.relative_to(ROOT).as_posix()


RUN = [path for path in PAGES if any(block.reason is None for block in blocks(path))]
COMPOSED = [
    pytest.param(arguments[2:], id=f"{page_name(path)}:{block.line}:{place}")
    for path in PAGES
    for block in blocks(path)
    if block.language == "bash" and block.reason
    for place, arguments in enumerate(commands(block.text))
    if arguments[:2] == ["capsexp", "train"]
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Environment variables under which `capsexp` is this checkout's."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "capsexp").write_text(fork_server.script())
    (folder / "capsexp").chmod(0o755)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("CAPSEXP_")}
    return inherited | {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "110",
    }


def run(command, where, environment, place):
    variables = environment | {"PYTHONPATH": str(where)}
    done = subprocess.run(command, cwd=where, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{place}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, environment):
    """A copy of the checkout with the run of `make demo`; training takes one epoch."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("capsexp", "conf", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    trainer = folder / "conf" / "trainer" / "default.yaml"
    text = trainer.read_text(encoding="utf-8")
    for key, value in (("max_epochs", 1), ("limit_train_batches", 5)):
        text, count = re.subn(rf"(?m)^{key}: \w+", f"{key}: {value}", text)
        assert count == 1
    trainer.write_text(text, encoding="utf-8")
    run(["capsexp", "train", "run=outputs/demo"], folder, environment, "make demo")
    return folder


def test_every_reason_for_not_running_is_a_known_one():
    assert {block.reason for path in PAGES for block in blocks(path)} - {None} <= REASONS


@pytest.mark.slow
@pytest.mark.parametrize("path", RUN, ids=page_name)
def test_commands_work_as_written(path, checkout, environment, tmp_path):
    where = tmp_path / "checkout"
    shutil.copytree(checkout, where, symlinks=True)
    program = ""
    for block in blocks(path):
        place = f"{page_name(path)}:{block.line}"
        if block.file:
            (where / block.file).parent.mkdir(parents=True, exist_ok=True)
            (where / block.file).write_text(block.text)
        elif block.reason is None and block.language == "bash":
            run(["bash", "-euo", "pipefail", "-c", block.text], where, environment, place)
        elif block.reason is None and block.language == "python":
            program += block.text
    if program:
        run(["python", "-c", program], where, environment, f"Python blocks of {page_name(path)}")


def first_value(override):
    """Return an override as text; of several values to sweep over, the first."""
    if not override.is_sweep_override():
        return override.input_line
    value = override.value()
    first = value.include[0] if isinstance(value, Glob) else next(override.sweep_string_iterator())
    return f"{override.get_key_element()}={first}"


@pytest.mark.parametrize("arguments", COMPOSED)
def test_training_commands_that_are_not_run_compose(arguments):
    # capsexp itself expands a tilde; Hydra's grammar has none.
    texts = [text.replace("=~/", "=home/") for text in arguments if "=" in text]
    overrides = [first_value(override) for override in OverridesParser.create().parse_overrides(texts)]
    chosen = [text for text in overrides if not text.startswith("hydra.")]
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        assert compose("train", overrides=chosen).trainer.batch_size >= 1
