import pytest
import torch
from torch import nn

from capsexp.layer.resnet import ResNetTrunk
from capsexp.ops.receptive_fields import Grid

RESNET_20 = {
    "stem": 16,
    "channels": [16, 32, 64],
    "blocks": [3, 3, 3],
    "strides": [1, 2, 2],
    "block": "residual",
    "shortcut": "pad",
    "norm": "batch",
}
SMALL = {**RESNET_20, "stem": 4, "channels": [4, 6], "blocks": [1, 2], "strides": [1, 2]}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_resnet_20_has_its_parameters():
    # 272,474 of He et al.'s 0.27 M for CIFAR-10, less the last layer's 650 and the 1x1 shortcuts' 2,752
    assert count(ResNetTrunk(3, **RESNET_20)) == 269_072
    assert count(ResNetTrunk(3, **{**RESNET_20, "shortcut": "convolution"})) == 269_072 + 2_752


@pytest.mark.parametrize("size", [(32, 32), (9, 5), (1, 1)])
@pytest.mark.parametrize("changes", [{}, {"shortcut": "convolution"}, {"block": "plain"}])
def test_features_have_the_announced_grid(size, changes):
    trunk = ResNetTrunk(3, **{**SMALL, **changes})
    grid = trunk.grid(Grid(*size))
    features = trunk(torch.rand(2, 3, *size))
    assert features.shape == (2, trunk.out_channels, grid.rows, grid.columns)
    assert (features >= 0).all()


def test_a_position_of_the_grid_lies_where_its_receptive_field_has_its_center():
    trunk = ResNetTrunk(1, **{**RESNET_20, "block": "plain", "norm": "group", "blocks": [1, 1, 1]}).double()
    for layer in [trunk.stem, *trunk.blocks]:
        nn.init.ones_(layer.conv.weight)
    images = torch.rand(1, 1, 33, 33, dtype=torch.float64, requires_grad=True)
    maps = images
    for layer in [trunk.stem, *trunk.blocks]:
        maps = layer.conv(maps)  # without norm and ReLU, which do not move anything
    maps[0, 0, 4, 3].backward()
    weight = images.grad[0, 0]
    rows = (weight.sum(1) * torch.arange(33)).sum() / weight.sum()
    columns = (weight.sum(0) * torch.arange(33)).sum() / weight.sum()
    center = trunk.grid(Grid(33, 33)).centres().view(9, 9, 2)[4, 3]
    assert center.tolist() == pytest.approx([rows.item(), columns.item()])


def test_a_residual_block_adds_to_its_shortcut():
    trunk = ResNetTrunk(3, **SMALL).double().eval()
    for block in trunk.blocks:
        nn.init.zeros_(block.second.norm.weight)
    images = torch.rand(2, 3, 8, 8).double()
    kept = trunk.stem(images).relu()[:, :, ::2, ::2]
    features = trunk(images)
    torch.testing.assert_close(features[:, 1:5], kept)
    assert not features[:, [0, 5]].any()


def test_an_image_alone_gives_what_it_gives_in_a_batch_with_group_norms():
    trunk, images = ResNetTrunk(3, **{**SMALL, "norm": "group"}).double(), torch.rand(3, 3, 8, 8).double()
    batch = trunk(images)
    torch.testing.assert_close(trunk(images[1:2])[0], batch[1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"blocks": [1]}, "channels, blocks and strides must have one number per stage, got 2, 1 and 2"),
        ({"stem": 8}, r"stem and channels must not shrink with shortcut pad, got \[8, 4, 6\]"),
        ({"strides": [1, 0]}, r"strides must be a list of numbers >= 1, got \[1, 0\]"),
        ({"block": "dense"}, "block must be one of residual, plain, got dense"),
        ({"shortcut": "none"}, "shortcut must be one of pad, convolution, got none"),
        ({"norm": "none"}, "norm must be one of batch, group, got none"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_wrong_settings_are_one_line(wrong, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        ResNetTrunk(3, **{**SMALL, **wrong})
