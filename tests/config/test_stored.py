"""A stranger's config is plain data: no interpolation in it runs a resolver."""

import json

import pytest
from omegaconf import OmegaConf

from capsexp.config.saved import load_saved_config
from capsexp.config.stored import literal, without_resolvers

SECRET = "s3cret"
HOSTILE = [
    "${oc.env:SECRET}",
    "${ oc.env : SECRET }",
    r"\${oc.env:SECRET}",
    r"\\${oc.env:SECRET}",
    r"\\\${oc.env:SECRET}",
    "$${oc.env:SECRET}",
    "$${a}{oc.env:SECRET}",
    "text ${oc.env:SECRET} and ${a}",
    "${${resolver}:SECRET}",
    "${oc.${part}:SECRET}",
    "${oc.env:${name}}",
    "${oc.env:CAPSEXP_DATA,${oc.env:SECRET}}",
    r"${oc.env:CAPSEXP_DATA,\${oc.env:SECRET}}",
    "${oc.decode:'${oc.env:SECRET}'}",
    "${oc.create:{a: '${oc.env:SECRET}'}}",
    "${oc.dict.values:a}",
    "${hydra:job.name}",
    "${now:%Y}",
    "${unknown:1}",
    "${a",
    "${",
]
OTHERS = {"a": 1, "resolver": "oc.env", "part": "env", "name": "SECRET"}


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)
    monkeypatch.delenv("CAPSEXP_DATA", raising=False)


def value_of(composed, resolved):
    config = without_resolvers({**OTHERS, "key": composed}, resolved)
    return OmegaConf.to_container(OmegaConf.create(config), resolve=True)["key"]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("nest", [lambda text: text, lambda text: [text], lambda text: {"b": [{"c": text}]}])
def test_no_resolver_runs(text, nest):
    assert SECRET not in json.dumps(value_of(nest(text), {}))
    assert SECRET not in json.dumps(value_of(nest(text), {"key": nest(text)}))


def test_a_value_that_needs_a_resolver_comes_from_the_resolved_config():
    assert value_of("${oc.env:SCRATCH}/data", {"key": "/scratch/data"}) == "/scratch/data"
    assert value_of(["${oc.env:N}", 2], {"key": [1, 2]}) == [1, 2]
    assert value_of("${oc.env:N}", {"key": {"a": "${b"}}) == {"a": "${b"}


def test_references_follow_the_keys_that_they_name():
    assert value_of("${a}", {"key": 7}) == 1
    assert value_of("${.a}-${a}", {}) == "1-1"


def test_the_folders_of_this_machine_replace_those_of_the_machine_of_the_run(monkeypatch):
    text = "${oc.env:CAPSEXP_DATA,'~/.cache/capsexp'}"
    assert value_of(text, {"key": "/there"}) == "~/.cache/capsexp"
    monkeypatch.setenv("CAPSEXP_DATA", "/here")
    assert value_of(text, {"key": "/there"}) == "/here"


@pytest.mark.parametrize("text", ["${a}", r"\${a}", r"\\${a}", r"x\y", "$", "${", "a${b}c${d}"])
def test_a_literal_is_read_as_it_is(text):
    config = OmegaConf.create({"key": literal(text), "a": 1, "b": 1, "d": 1})
    assert OmegaConf.to_container(config, resolve=True)["key"] == text


def test_a_stored_config_gives_away_no_variable(tmp_path):
    (tmp_path / ".hydra").mkdir()
    text = "seed: 0\nnote: '${oc.env:SECRET}'\nmodel:\n  name: '${oc.env:SECRET}'\n"
    (tmp_path / ".hydra" / "config.yaml").write_text(text)
    assert SECRET not in json.dumps(load_saved_config(tmp_path))
