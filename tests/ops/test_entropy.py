import math

import pytest
import torch

from capsexp.ops.entropy import coupling_entropy


def test_undecided_is_1_and_decided_is_0():
    even = torch.full((2, 3, 4), 0.25)
    one_hot = torch.eye(4)[:3].expand(2, 3, 4)
    assert coupling_entropy(even).item() == pytest.approx(1.0)
    assert coupling_entropy(one_hot).item() == 0.0


def test_it_is_the_mean_over_children_in_units_of_log_parents():
    coupling = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]])
    assert coupling_entropy(coupling).item() == pytest.approx(0.5 * math.log(2) / math.log(3))


def test_a_single_parent_leaves_nothing_to_decide():
    assert coupling_entropy(torch.ones(2, 3, 1)).item() == 0.0
