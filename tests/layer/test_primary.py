import pytest
import torch
import torch.nn.functional as F
from torch import nn

from capsexp.layer.primary import PrimaryCaps
from capsexp.ops.receptive_fields import Grid
from capsexp.ops.squash import squash

SMALL = {"types": 4, "dim": 3, "kernel": 3, "stride": 2, "padding": "valid", "scale": 1.0}


def test_changing_the_bias_of_one_channel_changes_36_capsules_of_one_type():
    primary = PrimaryCaps(2, types=32, dim=8, kernel=9, stride=2, padding="valid", scale=1.0)
    features = torch.randn(1, 2, 20, 20)
    before = primary(features).poses
    with torch.no_grad():
        primary.conv.bias[8 * 5 + 3] += 1
    changed = (primary(features).poses != before).any(2)[0].nonzero().squeeze(1)
    assert before.shape == (1, 1152, 8)
    assert changed.tolist() == list(range(5, 1152, 32))


def test_capsules_come_in_the_order_row_column_type():
    primary = PrimaryCaps(2, **SMALL)
    features = torch.randn(2, 2, 7, 9)
    channels = primary.conv(features)  # [B, types * dim, 3, 4]
    poses = primary(features).poses.reshape(2, 3, 4, 4, 3)
    for row, column, kind in [(0, 0, 0), (2, 1, 3), (1, 3, 2)]:
        expected = squash(channels[:, 3 * kind : 3 * kind + 3, row, column])
        torch.testing.assert_close(poses[:, row, column, kind], expected)


def test_channels_last_memory_gives_the_same_capsules_without_a_copy():
    primary = PrimaryCaps(2, **SMALL)
    features = torch.randn(2, 2, 7, 7)
    expected = primary(features).poses
    last = primary.to(memory_format=torch.channels_last)(features.to(memory_format=torch.channels_last)).poses
    torch.testing.assert_close(last, expected)


def test_activations_are_the_lengths_of_squashed_poses():
    poses, activations = PrimaryCaps(2, **SMALL)(torch.randn(2, 2, 7, 7))
    torch.testing.assert_close(activations, poses.norm(dim=2))
    assert (activations < 1).all()


def test_scale_acts_on_the_convolution_before_its_bias():
    primary = PrimaryCaps(2, **{**SMALL, "scale": 1 / 32})
    nn.init.constant_(primary.conv.bias, 0.1)
    features = torch.randn(2, 2, 7, 7)
    channels = F.conv2d(features, primary.conv.weight, stride=2) / 32 + 0.1
    torch.testing.assert_close(
        primary(features).poses, squash(channels.permute(0, 2, 3, 1).reshape(2, 36, 3))
    )


@pytest.mark.parametrize(("size", "kernel", "centre"), [(8, 3, 0), (7, 3, 1), (24, 9, 3), (23, 9, 4)])
def test_same_padding_puts_the_odd_pixel_at_the_end(size, kernel, centre):
    primary = PrimaryCaps(1, types=1, dim=1, kernel=kernel, stride=2, padding="same", scale=1.0)
    with torch.no_grad():
        primary.conv.bias.zero_()
        primary.conv.weight.zero_()
        primary.conv.weight[0, 0, centre, centre] = 1  # picks the first pixel, then every other one
    features = torch.rand(1, 1, size, size)
    expected = features[0, 0, ::2, ::2]
    assert primary.grid(Grid(size, size))[:2] == expected.shape
    torch.testing.assert_close(primary(features).poses.flatten(), squash(expected.reshape(-1, 1)).flatten())


def test_silent_features_give_finite_gradients():
    primary = PrimaryCaps(2, **SMALL)
    nn.init.zeros_(primary.conv.bias)
    poses, activations = primary(torch.zeros(2, 2, 7, 7))
    (poses.sum() + activations.sum()).backward()
    assert not poses.any()
    assert primary.conv.weight.grad.isfinite().all()


def test_autocast_squashes_in_float32():
    with torch.autocast("cpu", torch.bfloat16):
        capsules = PrimaryCaps(2, **SMALL)(torch.randn(2, 2, 7, 7))
    assert {tensor.dtype for tensor in capsules} == {torch.float32}


def test_a_size_below_1_is_refused():
    with pytest.raises(ValueError, match=r"^types must be >= 1, got 0$"):
        PrimaryCaps(4, types=0)


@pytest.mark.usefixtures("no_type_checks")
def test_unknown_padding_is_refused():
    with pytest.raises(ValueError, match="padding must be one of valid, same, got full"):
        PrimaryCaps(2, **{**SMALL, "padding": "full"})
