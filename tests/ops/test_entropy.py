import math

import pytest
import torch

from capsexp.ops.entropy import coupling_entropy
from capsexp.ops.receptive_fields import Grid, gather_windows, receptive_fields, scatter_sum
from capsexp.routing.dynamic import dynamic_routing
from capsexp.routing.em import em_routing


def test_undecided_is_1_and_decided_is_0():
    even = torch.full((2, 3, 4), 0.25)
    one_hot = torch.eye(4)[:3].expand(2, 3, 4)
    assert coupling_entropy(even).item() == pytest.approx(1.0)
    assert coupling_entropy(one_hot).item() == 0.0


def test_it_is_the_mean_over_children_in_units_of_log_parents():
    coupling = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]])
    assert coupling_entropy(coupling).item() == pytest.approx(0.5 * math.log(2) / math.log(3))


@pytest.mark.parametrize("total", [1e-30, 0.3, 1.0, 7.0])
def test_only_the_shares_of_a_childs_coefficients_count_not_their_sum(total):
    torch.manual_seed(0)
    coupling = torch.rand(2, 5, 4, dtype=torch.float64).softmax(2)
    torch.testing.assert_close(coupling_entropy(total * coupling), coupling_entropy(coupling))


def test_children_without_coefficients_are_left_out():
    coupling = torch.tensor([[[0.5, 0.5], [0.0, 0.0]]])
    assert coupling_entropy(coupling).item() == pytest.approx(1.0)
    assert coupling_entropy(torch.zeros(1, 3, 2)).item() == 0.0
    fields = receptive_fields(Grid(4, 4), 1, (2, 2), 2)
    windows = torch.full((1, *fields.children.shape, 2), 0.5)
    windows[:, 0] = 0
    assert coupling_entropy(windows, fields).item() == pytest.approx(1.0)


@pytest.mark.parametrize("parents", [2, 5, 10])
def test_equal_couplings_of_leaky_routing_are_undecided(parents):
    leaky = dynamic_routing(torch.zeros(1, 7, parents, 4), iterations=1, leaky=True)
    assert coupling_entropy(leaky.coupling).item() == pytest.approx(1.0)


@pytest.mark.parametrize("normalisation", ["paper", "types", "official_v1"])
@pytest.mark.parametrize("dense", [True, False])
def test_equal_couplings_of_em_routing_are_undecided_for_each_normalisation(normalisation, dense):
    fields = None if dense else receptive_fields(Grid(4, 4), 2, (3, 3), 1)
    places = (1, 32) if fields is None else fields.children.shape
    votes, activations = torch.zeros(1, *places, 3, 4), torch.ones(1, 32)
    routed = em_routing(
        votes.squeeze(1) if dense else votes, activations, fields=fields, normalisation=normalisation
    )
    assert 0.9 < coupling_entropy(routed.coupling, fields).item() < 1 + 1e-5


def test_a_single_parent_leaves_nothing_to_decide():
    assert coupling_entropy(torch.ones(2, 3, 1)).item() == 0.0


def test_windows_count_each_child_over_all_its_positions():
    fields = receptive_fields(Grid(5, 5), 2, (3, 3), 2)
    torch.manual_seed(0)
    shares = torch.rand(2, *fields.children.shape, 3, dtype=torch.float64)
    mass = gather_windows(scatter_sum(shares.sum(-1), fields), fields)
    coupling = shares / mass[..., None]
    expected = []
    for image in range(2):
        for child in range(fields.in_caps):
            own = coupling[image, fields.children == child].flatten()
            expected.append((-(own * own.log()).sum() / math.log(len(own))).item())
    assert coupling_entropy(coupling, fields).item() == pytest.approx(sum(expected) / len(expected))
    # A child whose coefficients add up to the number of types is as decided as one whose add up to 1.
    torch.testing.assert_close(coupling_entropy(3 * coupling, fields), coupling_entropy(coupling, fields))


def test_windows_without_any_choice_leave_nothing_to_decide():
    fields = receptive_fields(Grid(4, 4), 1, (2, 2), 2)
    assert coupling_entropy(torch.ones(1, *fields.children.shape, 1), fields).item() == 0.0
    assert coupling_entropy(torch.zeros(1, *fields.children.shape, 2), fields).isfinite()
