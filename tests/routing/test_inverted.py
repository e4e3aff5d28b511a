import pytest
import torch
import torch.nn.functional as F
from wave_numbers import wave

from capsexp.ops.receptive_fields import Grid, receptive_fields
from capsexp.routing.inverted import InvertedRouting, inverted_routing

VOTES = wave((6, 3, 4))[None]
FIELDS = receptive_fields(Grid(4, 3), 2, (2, 2), 1)
SMALL = receptive_fields(Grid(2, 3), 1, (2, 2), 1)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("iterations", "expected"),
    [
        (1, [-0.3054269734, 1.6917591494, -0.8974105962, -0.4889215797]),
        (2, [-0.3507554830, 1.7057288151, -0.8346840242, -0.5202893079]),
    ],
)
def test_the_example_has_the_values_computed_elsewhere(iterations, expected):
    poses = inverted_routing(VOTES, iterations=iterations).poses
    assert poses[0, 0].tolist() == pytest.approx(expected, abs=1e-10)
    module = InvertedRouting(6, 3, 4, iterations=iterations).double()
    torch.testing.assert_close(module(VOTES, torch.ones(1, 6)).poses, poses)


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("fields", [None, FIELDS], ids=["dense", "windows"])
def test_poses_have_mean_0_and_variance_1_at_the_start(iterations, fields):
    votes = random(2, 7, 3, 16) if fields is None else random(2, *FIELDS.children.shape, 3, 16)
    routed = InvertedRouting(7, 3, 16, fields, iterations=iterations).double()(votes, torch.ones(2, 24))
    torch.testing.assert_close(routed.poses.mean(2), torch.zeros_like(routed.poses[..., 0]))
    variance = routed.poses.var(2, correction=0)
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-3, atol=0)


def test_one_iteration_is_uniform_voting_and_a_normalization():
    votes, gain, bias = random(2, 7, 3, 16), random(16, seed=1), random(16, seed=2)
    expected = F.layer_norm(votes.mean(1) * 7 / 3, (16,), gain, bias)
    routed = inverted_routing(votes, iterations=1, gain=gain, bias=bias)
    torch.testing.assert_close(routed.poses, expected)
    assert (routed.coupling == 1 / 3).all()


@pytest.mark.parametrize("iterations", [1, 3])
def test_each_window_is_dense_routing(iterations):
    votes = random(2, *FIELDS.children.shape, 3, 4)
    routed = inverted_routing(votes, iterations=iterations, fields=FIELDS)
    assert routed.fields is FIELDS
    assert routed.scores is None
    assert (routed.activations == 1).all()
    for position in range(len(FIELDS.children)):
        alone = inverted_routing(votes[:, position], iterations=iterations)
        torch.testing.assert_close(routed.poses.unflatten(1, (-1, 3))[:, position], alone.poses)
        torch.testing.assert_close(routed.coupling[:, position], alone.coupling)


def test_shares_sum_to_1_over_the_types_of_each_position():
    coupling = inverted_routing(random(2, *FIELDS.children.shape, 3, 4), iterations=3, fields=FIELDS).coupling
    torch.testing.assert_close(coupling.sum(3), torch.ones_like(coupling[..., 0]))


def test_permuting_the_children_is_invisible():
    votes, order = random(2, 7, 3, 4), torch.randperm(7)
    before, after = (inverted_routing(tensor, iterations=3) for tensor in (votes, votes[:, order]))
    torch.testing.assert_close(after.poses, before.poses)
    torch.testing.assert_close(after.coupling, before.coupling[:, order])


def test_steps_make_the_iterations():
    routing, votes = InvertedRouting(7, 3, 4, iterations=3).double(), random(2, 7, 3, 4)
    torch.nn.init.normal_(routing.gain)
    torch.nn.init.normal_(routing.bias)
    states = routing.trace(votes, torch.ones(2, 7), iterations=4)
    assert len(states) == 4
    before = None
    for state in states:
        now = routing.step(votes, before)
        torch.testing.assert_close(now.poses, state.poses)
        before = now.poses
    torch.testing.assert_close(routing(votes, torch.ones(2, 7)).poses, states[2].poses)


def test_scores_are_one_map_for_all_parents():
    routing, votes = InvertedRouting(7, 3, 4, iterations=2).double(), random(2, 7, 3, 4)
    routed = routing(votes, torch.ones(2, 7))
    scores = routed.poses @ routing.score_weight + routing.score_bias
    torch.testing.assert_close(routed.scores, scores)
    torch.testing.assert_close(routed.activations, scores.sigmoid())
    assert sum(parameter.numel() for parameter in routing.parameters()) == 2 * 4 + 4 + 1
    windows = InvertedRouting(24, 3, 4, FIELDS, iterations=2)
    assert sum(parameter.numel() for parameter in windows.parameters()) == 2 * 4


@pytest.mark.parametrize("fields", [None, SMALL], ids=["dense", "windows"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_gradients_pass_gradcheck(iterations, fields):
    votes = random(2, 5, 3, 4) if fields is None else random(1, *fields.children.shape, 3, 4)
    leaves = [votes.requires_grad_(), random(4, seed=1).requires_grad_(), random(4, seed=2).requires_grad_()]

    def route(votes, gain, bias):
        routed = inverted_routing(votes, iterations=iterations, gain=gain, bias=bias, fields=fields)
        return routed.poses, *([routed.coupling] if iterations > 1 else [])

    assert torch.autograd.gradcheck(route, leaves)


def test_half_precision_is_routed_in_float32():
    votes = random(2, 7, 3, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        routed = inverted_routing(votes, iterations=2)
    torch.testing.assert_close(
        routed.poses, inverted_routing(votes.float(), iterations=2).poses, rtol=0, atol=0
    )


@pytest.mark.usefixtures("no_type_checks")
def test_wrong_arguments_are_one_line():
    with pytest.raises(ValueError, match=r"^iterations must be >= 1, got 0$"):
        inverted_routing(VOTES, iterations=0)
    with pytest.raises(ValueError, match=r"^iterations must be >= 1, got 0$"):
        InvertedRouting(6, 3, 4, iterations=0)
    with pytest.raises(ValueError, match=r"^votes must have \[P, K\] = \[6, 8\] from fields, got \[6\]$"):
        inverted_routing(VOTES, iterations=1, fields=FIELDS)
