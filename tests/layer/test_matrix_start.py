"""The starts of transformation matrices, and votes with a bias."""

import math

import pytest
import torch

from capsexp.capsules import Capsules
from capsexp.layer.dense_caps import DenseCaps
from capsexp.layer.matrix_caps import ConvCaps
from capsexp.layer.matrix_start import start_matrices
from capsexp.ops.receptive_fields import Grid
from capsexp.routing.em import em_routing

SIZES = {"matrices": 40, "types": 30, "side": 4, "pose_dim": 16, "places": 40, "window": 5}


def start(initialisation, **options):
    torch.manual_seed(0)
    return start_matrices(initialisation, **{**SIZES, "init_identity": 1.0, "init_noise": 0.03, **options})


class ByEM(torch.nn.Module):
    def __init__(self, in_caps, out_caps, pose_dim, fields=None):
        super().__init__()
        self.fields = fields

    def forward(self, votes, activations):
        return em_routing(votes, activations, fields=self.fields)


@pytest.mark.parametrize(
    ("initialisation", "deviation"), [("normal", 1 / 4), ("fan", math.sqrt(30 / (4 * 40)))]
)
def test_normal_starts_have_the_deviation_that_they_promise(initialisation, deviation):
    # 19,200 numbers: the deviation is off by 0.5 % (one sigma); 3 % is six.
    assert start(initialisation).std().item() == pytest.approx(deviation, rel=0.03)


def test_xavier_is_uniform_up_to_its_bound():
    bound = math.sqrt(6 / (16 * (40 + 5 * 30)))
    weight = start("xavier")
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.99 * bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


def test_orthogonal_matrices_have_the_same_volume():
    weight = start("orthogonal")
    torch.testing.assert_close(
        weight @ weight.transpose(2, 3), torch.eye(4).expand_as(weight), atol=1e-5, rtol=0
    )


def test_the_bias_is_added_to_every_vote():
    torch.manual_seed(0)
    layer = ConvCaps(Grid(4, 4), 3, types=2, routing=ByEM, vote_bias=True)
    poses = torch.randn(2, 4 * 4 * 3, 16)
    before = layer.votes(poses)
    layer.bias.data.normal_()
    torch.testing.assert_close(layer.votes(poses), before + layer.bias)


@pytest.mark.parametrize("shared", [False, True])
def test_dense_capsules_vote_with_their_own_or_with_shared_matrices(shared):
    torch.manual_seed(0)
    layer = DenseCaps(
        5, 3, routing=ByEM, shared_transformations=shared, initialisation="normal", vote_bias=True
    )
    layer.bias.data.normal_()
    assert layer.weight.shape == (1 if shared else 5, 3, 4, 4)
    poses = torch.randn(2, 5, 16)
    expected = torch.einsum("bicn,ijnm->bijcm", poses.view(2, 5, 4, 4), layer.weight.expand(5, -1, -1, -1))
    torch.testing.assert_close(layer.votes(poses), expected.flatten(3) + layer.bias, atol=1e-5, rtol=1e-5)
    assert layer(Capsules(poses, torch.rand(2, 5))).poses.shape == (2, 3, 16)
