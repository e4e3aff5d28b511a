"""The public names: what `import capsexp` offers to a notebook."""

import ast
import functools
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fork_server import NO_FORK

import capsexp
from capsexp.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(capsexp.__file__)
SIZES = {"in_caps": 8, "out_caps": 5, "pose_dim": 16}
MNIST = {"image_shape": (1, 28, 28), "classes": 10}


def names_for_type_checkers():
    """The names that the `if TYPE_CHECKING:` block of the package imports or assigns."""
    tree = ast.parse(PACKAGE.read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assigned = [node.targets[0].id for node in block.body if isinstance(node, ast.Assign)]
    return imported + assigned


def test_the_public_names_are_sorted_and_the_same_for_users_and_for_type_checkers():
    assert capsexp.__all__ == sorted(capsexp.__all__)
    assert sorted(names_for_type_checkers()) == capsexp.__all__
    assert set(capsexp.__all__) <= set(dir(capsexp))


@pytest.mark.parametrize("name", capsexp.__all__)
def test_every_public_name_exists_and_has_a_docstring(name):
    assert inspect.getdoc(getattr(capsexp, name))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'capsexp' has no attribute 'em_ruoting'"):
        capsexp.em_ruoting  # noqa: B018


def test_the_api_page_documents_exactly_the_public_names():
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    documented = set(re.findall(r"^::: capsexp\.(\w+)$|^### capsexp\.(\w+)$", page, re.MULTILINE))
    documented = {name for pair in documented for name in pair if name}
    assert documented == set(capsexp.__all__)


@pytest.mark.parametrize("code", ["import capsexp", "from capsexp.cli import main; main()"])
def test_the_package_and_the_help_of_the_command_start_without_torch(code):
    code = f"import sys; sys.argv = ['capsexp', '--help']; {code}; print('torch' in sys.modules)"
    fresh = os.environ | {NO_FORK: "1"}
    done = subprocess.run([sys.executable, "-c", code], env=fresh, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_type_checkers_see_the_annotations():
    assert PACKAGE.with_name("py.typed").is_file()


# make


def test_make_takes_its_values_from_the_yaml_and_from_the_call():
    routing = capsexp.make("routing/em", **SIZES, iterations=2)
    assert (routing.iterations, routing.options.variance_floor) == (2, 0.0005)


def test_make_fills_a_network_with_its_own_routing():
    net = capsexp.make("model/em_routing", **MNIST)
    assert type(net.class_caps.routing).__name__ == "EMRouting"
    assert net(torch.zeros(2, 1, 28, 28)).scores.shape == (2, 10)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"routing": {"iterations": 1}},
            "DynamicRouting(in_caps=1568, out_caps=10, pose_dim=16, iterations=1)",
        ),
        ({"routing": "uniform"}, "UniformRouting(in_caps=1568, out_caps=10, pose_dim=16)"),
        ({"primary_types": 2}, "DynamicRouting(in_caps=392, out_caps=10, pose_dim=16, iterations=3)"),
        ({"routing": functools.partial(torch.nn.Bilinear)}, "Bilinear(in1_features=1568, "),
    ],
)
def test_make_changes_nested_keys_chooses_options_and_takes_objects(changes, expected):
    net = capsexp.make("model/dynamic_routing_small", **MNIST, **changes)
    assert repr(net.class_caps.routing).startswith(expected)


def test_a_routing_without_sizes_is_a_factory_for_a_layer():
    layer = capsexp.ClassCaps(8, 4, 5, 16, routing=capsexp.make("routing/em", iterations=2))
    assert repr(layer.routing) == "EMRouting(in_caps=8, out_caps=5, pose_dim=16, iterations=2)"
    routed = layer(capsexp.Capsules(torch.randn(3, 8, 4), torch.rand(3, 8)))
    assert routed.poses.shape == (3, 5, 16)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("routing/emm", {}, r"^no 'routing/emm' in conf/: did you mean 'routing/em'\?$"),
        ("em", {}, r"^no 'em' in conf/; a name has the form GROUP/OPTION, such as routing/em$"),
        ("../x", {}, r"^no '\.\./x' in conf/; a name has the form"),
        (
            "routing/em",
            {"in_caps": 8},
            r"^routing/em\.out_caps: EMRouting needs a value\nrouting/em\.pose",
        ),
        ("routing/em", {**SIZES, "iteration": 2}, r"takes no 'iteration': did you mean 'iterations'\?$"),
        ("routing/em", {**SIZES, "iterations": 0}, r"^routing/em: iterations must be >= 1, got 0$"),
        ("routing/em", {**SIZES, "iterations": "a"}, r"^routing/em\.iterations: must be int, got 'a'$"),
        ("routing/em", {**SIZES, "normalisation": "all"}, r"^routing/em\.normalisation: must be 'paper' or "),
        ("dataset/image_folder", {}, r"^dataset/image_folder\.path has no default value: pass path=\.\.\.$"),
        (
            "model/em_routing",
            {**MNIST, "routing": "emm"},
            r"^routing=emm: no such option: did you mean 'em'\?$",
        ),
        (
            "model/em_routing",
            {**MNIST, "routing": {"itrations": 2}},
            r"routing\.itrations: EMRouting takes no",
        ),
    ],
)
def test_what_cannot_be_made_is_one_line_for_each_problem(name, changes, message):
    with pytest.raises(UserError, match=message):
        capsexp.make(name, **changes)


def test_a_finished_routing_is_refused_where_a_network_builds_its_own():
    with pytest.raises(
        UserError, match=r"^model/em_routing\.routing: expected a factory, .*got a finished EMR"
    ):
        capsexp.make("model/em_routing", **MNIST, routing=capsexp.make("routing/em", **SIZES))


# functions


def test_the_functions_take_one_line_and_the_papers_values():
    votes = torch.randn(2, 8, 5, 16)
    assert capsexp.em_routing(votes, torch.rand(2, 8)).poses.shape == (2, 5, 16)
    assert capsexp.dynamic_routing(votes).activations.shape == (2, 5)
    lengths = capsexp.squash(torch.randn(4, 10, 16)).norm(dim=2)
    labels = torch.tensor([0, 1, 2, 3])
    assert capsexp.margin_loss(lengths, labels).shape == capsexp.spread_loss(lengths, labels).shape == ()


WRONG_CALLS = {
    "em_routing(rand(2, 8, 5, 16), rand(2, 7))": "activations must have shape [B, I] = [2, 8], got [2, 7]",
    "em_routing(rand(5, 6), rand(2, 8))": "votes must have shape [B, I, J, D] or [B, P, K, J, D], got [5, 6]",
    "dynamic_routing(rand(8, 5, 16))": "votes must have shape [B, I, J, D], got [8, 5, 16]",
    "dynamic_routing(rand(2, 8, 5, 16), iterations=0)": "iterations must be >= 1, got 0",
    "margin_loss(rand(2, 5), tensor([0, 5]))": "labels must be in 0 ... 4, got 0 ... 5",
    "spread_loss(rand(2, 5), tensor([0.0, 1.0]))": "labels must be torch.int64, got torch.float32",
    "spread_loss(rand(2, 5), tensor([0, 1, 2]))": "labels must have shape [2], got [3]",
    "spread_loss(rand(2, 5), tensor([0, 1]), margin=0)": "margin must be in (0, 1], got 0",
}


@pytest.fixture(scope="module")
def messages():
    """What each wrong call raises, in a process without jaxtyping's checks, as users have it."""
    code = f"""
import json
import os
from torch import rand, tensor
from capsexp import *
messages = {{}}
for call in {list(WRONG_CALLS)!r}:
    try:
        eval(call)
    except ValueError as error:
        messages[call] = str(error)
print(json.dumps(messages))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("call", WRONG_CALLS)
def test_a_wrong_shape_or_value_is_one_clear_line(call, messages):
    assert messages[call] == WRONG_CALLS[call]


def test_a_plain_loop_needs_two_documented_calls():
    net = capsexp.make(
        "model/em_routing",
        **MNIST,
        conv_channels=8,
        conv_types=[4, 4],
        routing={
            "inverse_temperature_ramp": {
                "_target_": "capsexp.schedule.Linear",
                "start": 1,
                "end": 3,
                "steps": 1.0,
            }
        },
    )
    net.calibrate(torch.rand(8, 1, 28, 28))
    assert 0.2 < net(torch.rand(8, 1, 28, 28)).layers["conv_caps_1"].activations.mean() < 0.8
    before = capsexp.advance(net, capsexp.Step(0, 10))
    after = capsexp.advance(net, capsexp.Step(10, 10))
    assert before.keys() == after.keys() != set()
    assert all(after[name] == pytest.approx(3 * before[name]) for name in before)
