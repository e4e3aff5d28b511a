"""docs/reference/config.md is generated from conf/ and up to date."""

import importlib.util
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "make_config_reference.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_config_reference", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def option_of(script, folder, text):
    (folder / "option.yaml").write_text(text)
    return script.read_option(folder / "option.yaml", "group")


def test_the_page_is_up_to_date(script):
    page = script.PAGE.read_text(encoding="utf-8")
    assert page == script.page(), f"{script.PAGE.name} is out of date: run `{script.COMMAND}`"


def test_every_option_has_a_section(script):
    page = script.PAGE.read_text(encoding="utf-8")
    for path in (ROOT / "conf").glob("*/**/*.yaml"):
        group = path.parent.relative_to(ROOT / "conf").as_posix()
        assert f"\n### {group}={path.stem}\n" in page


def test_every_key_of_a_plain_option_is_listed(script):
    path = ROOT / "conf" / "trainer" / "default.yaml"
    keys = {entry.key for entry in script.read_option(path, "trainer").entries}
    assert keys == yaml.safe_load(path.read_text()).keys() - {"_target_"}


def test_comments_on_the_line_and_above_it_describe_a_key(script, tmp_path):
    head = "# The option.\n# Two lines.\n_target_: a.B\n"
    keys = "one: 1 # first\n# above\n# it\ntwo: [1, 2] # second\nthree: x\n"
    option = option_of(script, tmp_path, head + keys)
    assert (option.description, option.target) == ("The option. Two lines.", "a.B")
    assert option.entries == [("one", "1", "first"), ("two", "[1, 2]", "above it second"), ("three", "x", "")]


def test_nested_keys_have_dotted_names_and_a_schedule_shows_its_class(script, tmp_path):
    text = "rate: # falls\n  _target_: s.Linear\n  start: 1 # at first\nplain:\n  key: null\n"
    option = option_of(script, tmp_path, text)
    assert option.entries == [
        ("rate", "s.Linear", "falls"),
        ("rate.start", "1", "at first"),
        ("plain.key", "null", ""),
    ]


def test_a_number_sign_in_a_value_is_no_comment(script, tmp_path):
    option = option_of(script, tmp_path, "key: 'a # b' # c\n")
    assert option.entries == [("key", "'a # b'", "c")]


def test_defaults_are_listed(script, tmp_path):
    entries = ("base", "_self_", "override /loss@_global_.loss: spread", "/dataset@source: mnist")
    option = option_of(script, tmp_path, "\n  - ".join(["defaults:", *entries]) + "\n")
    assert option.defaults == [
        "everything of `group/base`",
        "`loss=spread`",
        "[dataset/mnist](#datasetmnist) as `source`",
    ]


def test_comments_are_no_markup(script):
    assert script._escaped("a * b <c> [d] `e*` f_g _h") == r"a \* b &lt;c&gt; \[d\] `e*` f_g \_h"
