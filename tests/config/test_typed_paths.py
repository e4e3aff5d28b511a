"""Paths in overrides are read as typed, or the message shows the quoting that works."""

import os
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from capsexp.config.compose import searching
from capsexp.config.overrides import parse, parse_all
from capsexp.config.typed_paths import quoted, with_typed_path
from capsexp.errors import UserError

STRANGE = (
    *(
        "a b",
        "ü/ß",
        "a[b]",
        "a{b}",
        "{a}",
        "a#b",
        "#a",
        "a,b",
        "a=b",
        "a=b=c",
        "$x",
        "a$b",
        "a:b",
        "a;b",
        "a(b)",
    ),
    *(
        '"a',
        "it's",
        'a "b"',
        "a&b|c",
        "a!b*c?",
        "a\\b",
        "日本",
        "a%b@c",
        "-a",
        "+a",
        "C:\\data",
        "a'b\"c",
        "./[a]",
    ),
)


def value_of(override):
    """What Hydra and OmegaConf read."""
    value = OverridesParser.create().parse_override(override).value()
    return OmegaConf.to_container(OmegaConf.create({"key": value}), resolve=True)["key"]


@pytest.mark.parametrize("path", STRANGE)
@pytest.mark.parametrize(
    "key", ["run", "dataset.path", "data_root", "output_root", "+dataset.root", "growth"]
)
def test_a_path_is_read_as_typed(key, path):
    assert value_of(with_typed_path(f"{key}={path}", sweep=False)) == path


@pytest.mark.parametrize("path", [*STRANGE, "${x}", "a/${b}/c"])
def test_a_quoted_path_is_read_as_it_is(path):
    assert value_of(f"key={quoted(path)}") == path


@pytest.mark.parametrize("typed", ["~/a b", "~/flowers", "'~/a'", '"~/a"', "~"])
def test_a_tilde_is_the_home_directory(typed, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    read = value_of(with_typed_path(f"dataset.path={typed}", sweep=False))
    assert read == os.path.expanduser(typed.strip("'\""))


def test_what_is_quoted_or_an_interpolation_keeps_its_meaning():
    for text in (
        "run='a b'",
        'run="a#b"',
        "run=outputs/${seed}",
        "run=null",
        "run=5",
        "run=[a]",
        "run=",
        "model=a#b",
    ):
        assert with_typed_path(text, sweep=False) == text


def test_a_comma_separates_paths_in_a_sweep_and_in_a_list(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = OverridesParser.create()
    swept = parser.parse_override(with_typed_path("dataset.path=~/a#1,b c,'d,e'", sweep=True))
    assert [str(item.text) for item in swept.value().list if hasattr(item, "text")] == ["/home/me/a#1", "d,e"]
    assert with_typed_path("dataset.path=choice(a,b)", sweep=True) == "dataset.path=choice(a,b)"
    assert value_of(with_typed_path("study.others=[~/a,b c#,'d']", sweep=False)) == [
        "/home/me/a",
        "b c#",
        "d",
    ]


@pytest.mark.parametrize("text", ["~x", "a;b", "it's", "a#b", 'a"b', "[a", "{a}", "a=b", "a(b)"])
def test_the_quoting_in_a_message_works(text):
    with searching(None):
        _, (line,) = parse_all([f"model.padding={text}"])
    (shown,) = shlex.split(line.partition("as a text it is written ")[2])
    assert value_of(shown) == text


def test_a_folder_of_configs_may_begin_with_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for typed in (["-cd", "~/mine"], ["--config-dir=~/mine"]):
        options, flags, _ = parse(["seed=1", *typed])
        assert options.config_dir == "/home/me/mine"
        assert "~" not in "".join(flags)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["-cp", "/tmp"], "-cp is switched off"),
        (["-s"], "-s"),
        (["-sc"], "-sc follows capsexp itself"),
        (["-p", "model"], "-p and --resolve are for --cfg"),
        (["--conf", "x"], "unrecognized arguments: --conf"),
        (["-cd"], "argument --config-dir/-cd: expected one argument"),
    ],
)
def test_an_option_that_does_nothing_here_is_refused(arguments, line):
    with pytest.raises(UserError, match=line):
        parse(["seed=1", *arguments])
