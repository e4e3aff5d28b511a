"""What a network costs: counted products agree with a calculation by hand."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import capsexp
from capsexp.training import costs
from capsexp.training.costs import Multiplications, in_words, network_costs


def count(action):
    with torch.no_grad(), Multiplications() as counter:
        action()
    assert not counter.unknown
    return counter.total


def test_convolutions_and_matrix_products():
    image = torch.rand(2, 3, 8, 8)
    assert count(lambda: nn.Conv2d(3, 5, 3)(image)) == 2 * 6 * 6 * 5 * 3 * 3 * 3
    assert count(lambda: nn.Linear(7, 4)(torch.rand(3, 7))) == 3 * 7 * 4
    assert count(lambda: torch.einsum("bij,bjk->bik", torch.rand(2, 3, 4), torch.rand(2, 4, 5))) == 120


def test_elements_of_products_quotients_and_squares_but_not_of_sums():
    x = torch.rand(3, 4)
    assert count(lambda: x * x) == count(lambda: x / x) == count(lambda: x.square()) == 12
    assert count(lambda: (x + x).exp().sum().sqrt()) == 0
    assert count(lambda: nn.BatchNorm2d(2).eval()(torch.rand(1, 2, 3, 3))) == 18


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=em_routing", "dataset=mnist"),
        ("model=em_routing", "dataset=mnist", "routing.iterations=1"),
        ("model=em_routing", "dataset=mnist", "model.pose=vector"),
        ("model=vb", "dataset=mnist"),
        ("model=vb", "dataset=mnist", "routing.iterations=1"),
        ("model=em_routing", "dataset=mnist", "routing=heinsen"),
        ("model=em_routing", "dataset=mnist", "routing=heinsen", "routing.iterations=1"),
        ("model=dynamic_routing_small",),
        ("model=dynamic_routing_small", "routing.iterations=1"),
    ],
)
def test_a_fused_operator_counts_what_the_reference_does(tiny_components, em_config, overrides):
    from capsexp.config.build import build_components

    def products(implementation):
        config = em_config(*overrides, f"routing.implementation={implementation}")
        return network_costs(build_components(config, plugins=[]))["multiplications"]

    assert products("fused") == pytest.approx(products("reference"), rel=0.01)


def test_every_operator_has_a_formula():
    sources = Path(capsexp.__file__).parent.rglob("*.py")
    names = {name for file in sources for name in re.findall(r'custom_op\(\s*"([\w:]+)"', file.read_text())}
    assert {name for name in names if not name.endswith("_backward")} == set(costs.FORMULAS)


def test_products_with_the_zeros_of_block_diagonal_matrices_are_left_out(tiny_components, em_config):
    from capsexp.ops.votes import window_votes

    poses, weight = torch.rand(2, 3, 5, 16), torch.rand(5, 7, 4, 4)
    assert count(lambda: window_votes(poses, weight)) == 2 * 3 * 5 * 7 * 16 * 4
    vectors = torch.rand(5, 7, 16, 16)
    assert count(lambda: window_votes(poses, vectors)) == 2 * 3 * 5 * 7 * 16 * 16


def test_an_operator_without_a_formula_leaves_the_count_unknown(em_config, monkeypatch):
    from capsexp.config.build import build_components

    components = build_components(em_config("dataset=mnist", "routing.implementation=fused"), plugins=[])
    monkeypatch.delitem(costs.FORMULAS, "capsexp::em_routing")
    assert network_costs(components)["multiplications"] is None


def test_counting_draws_no_random_numbers(tiny_components):
    components = tiny_components()
    before = torch.get_rng_state()
    network_costs(components)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_says_what_its_network_costs(tmp_path, train_tiny, capsys):
    train_tiny(tmp_path, "trainer.max_steps=2")
    noted = json.loads((tmp_path / "status.json").read_text())["costs"]
    assert noted["multiplications"] > noted["parameters"] > 1000
    assert noted["peak_memory"] > 10 * 2**20
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("CapsNet with "))
    parameters, products = f"{noted['parameters']:,}", in_words(noted["multiplications"])
    assert line == f"CapsNet with {parameters} parameters and {products} multiplications per image; 2 steps"


def test_the_peak_is_that_of_all_attempts(tmp_path, train_tiny, kill_at, monkeypatch):
    monkeypatch.setattr(costs, "peak_resident", lambda: 5000)
    train_tiny(tmp_path, "trainer.max_steps=2")
    status = json.loads((tmp_path / "status.json").read_text())
    monkeypatch.setattr(costs, "peak_resident", lambda: 4000)
    train_tiny(tmp_path, "trainer.max_steps=3", "resume=force")
    assert status["costs"] == json.loads((tmp_path / "status.json").read_text())["costs"]


@pytest.mark.parametrize(
    ("number", "words"),
    [(12, "12"), (1234, "1.23 thousand"), (22_136_718, "22.1 million"), (203_215_200, "203 million")],
)
def test_large_numbers_in_words(number, words):
    assert in_words(number) == words
