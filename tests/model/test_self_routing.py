import pytest
import torch

from capsexp.capsules import Batch, Capsules, Routed
from capsexp.config.build import build
from capsexp.config.compose import compose, to_plain
from capsexp.errors import UserError
from capsexp.layer.own_pose_caps import OwnPoseCaps
from capsexp.ops.receptive_fields import Grid
from capsexp.routing.self_routing import SelfRouting
from capsexp.schedule import Step

SMALL = [
    "model=self_routing",
    "model.trunk.stem=4",
    "model.trunk.channels=[4,6,8]",
    "model.trunk.blocks=[1,1,1]",
    "model.primary_types=3",
    "model.pose_dim=4",
]
TWO = ["model.conv_types=[5]", "model.conv_kernels=[3]", "model.conv_strides=[2]"]


def composed(*overrides):
    return to_plain(compose("train", list(overrides), config_dir=None))


def network(*overrides, image_shape=(3, 32, 32), classes=10):
    torch.manual_seed(0)
    return build(composed(*overrides)["model"], at="model", image_shape=image_shape, classes=classes)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_papers_networks_have_their_parameters():
    assert count(network("model=self_routing")) == 931_664
    assert count(network("model=self_routing_2")) == 3_187_536
    assert count(network("model=self_routing_norb", image_shape=(1, 32, 32), classes=5)) == 814_960


def test_a_border_of_empty_capsules_has_no_effect_but_on_the_grid():
    bordered, bare = (network(*SMALL, *TWO, f"model.primary_border={border}").eval() for border in (1, 0))
    assert (bordered.grid, bare.grid) == (Grid(4, 4, (0.0, 0.0), 8), Grid(3, 3, (4.0, 4.0), 8))
    images = torch.rand(2, 3, 32, 32)
    primary, inner = (net(images).layers["primary_caps"] for net in (bordered, bare))
    by_position = primary.poses.unflatten(1, (10, 10, 3))
    torch.testing.assert_close(by_position[:, 1:-1, 1:-1].flatten(1, 3), inner.poses)
    assert primary.activations.sum().item() == pytest.approx(inner.activations.sum().item(), rel=1e-5)
    # With stride 1 the windows inside are the same.
    stride_1 = ["model.conv_types=[5]", "model.conv_kernels=[3]", "model.conv_strides=[1]", "model.norm=none"]
    outer, middle = (
        network(*SMALL, *stride_1, f"model.primary_border={border}").eval()(images).layers["conv_caps_1"]
        for border in (1, 0)
    )
    windows = outer.poses.unflatten(1, (8, 8, 5))[:, 1:-1, 1:-1].flatten(1, 3)
    torch.testing.assert_close(windows, middle.poses)


@pytest.mark.parametrize("more", [[], TWO], ids=["SR-1", "SR-2"])
@pytest.mark.parametrize("image_shape", [(3, 32, 32), (1, 28, 28), (2, 9, 5), (1, 1, 1)], ids=str)
def test_class_activations_sum_to_1_for_images_of_any_size(more, image_shape):
    net = network(*SMALL, *more, image_shape=image_shape)
    output = net(torch.rand(2, *image_shape))
    torch.testing.assert_close(output.scores.sum(1), torch.ones(2))
    assert output.probabilities is output.scores
    assert list(output.layers) == ["primary_caps", *(["conv_caps_1"] if more else []), "class_caps"]


def test_network_is_the_papers_wiring():
    net, images = network(*SMALL, *TWO), torch.rand(2, 3, 32, 32)
    output = net.eval()(images)
    primary = net.primary_caps(net.trunk(images))
    middle = net.conv_caps_1(primary)
    poses, _ = net.norms["conv_caps_1"](middle.poses, None)
    routed = net.class_caps(Capsules(poses, middle.activations))
    assert isinstance(output.layers["primary_caps"], Capsules)
    assert isinstance(output.layers["conv_caps_1"], Routed)
    torch.testing.assert_close(output.layers["conv_caps_1"].poses, poses)
    torch.testing.assert_close(output.scores, routed.activations)


def test_class_capsules_have_the_mean_of_the_poses_that_they_get():
    layer = OwnPoseCaps(6, 3, pose_dim=4, routing=SelfRouting)
    torch.nn.init.normal_(layer.routing.map)
    capsules = Capsules(torch.randn(2, 6, 4), torch.rand(2, 6))
    routed = layer(capsules)
    shares = routed.coupling * capsules.activations[..., None]
    expected = torch.einsum("bij,bid->bjd", shares / shares.sum(1, keepdim=True), capsules.poses)
    torch.testing.assert_close(routed.poses, expected)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 6 * 3 * 5


def test_an_image_alone_gives_what_it_gives_in_a_batch_with_group_norms():
    net = network(*SMALL, *TWO, "model.norm=group", "model.trunk.norm=group").double()
    images = torch.rand(3, 3, 32, 32).double()
    torch.testing.assert_close(net(images[1:2]).scores[0], net(images).scores[1])


def test_gradients_move_every_parameter():
    net, images = network(*SMALL, *TWO), torch.rand(4, 3, 32, 32)
    for module in net.modules():
        if isinstance(module, SelfRouting):  # a routing that starts at 0 has no gradient for its poses
            torch.nn.init.normal_(module.map)
    net(images).scores[torch.arange(4), torch.arange(4)].log().sum().backward()
    assert all(parameter.grad.any() for parameter in net.parameters())


@pytest.mark.parametrize("more", [[], TWO], ids=["SR-1", "SR-2"])
def test_a_small_network_memorizes_a_batch(more):
    net, loss = network(*SMALL, *more, classes=4), build(composed(*SMALL)["loss"], at="loss")
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8) % 4
    batch = Batch(images, labels, images, torch.arange(8))
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=1e-2), []
    for _ in range(40):
        term = sum(loss(net(images, labels), batch, Step(0, 1)).values())
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
        losses.append(term.item())
    assert losses[0] == pytest.approx(torch.tensor(4.0).log().item(), abs=0.01)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("conv_types=[3]", "conv_types, .* must have one number per layer, got 1, 0 and 0"),
        ("primary_border=1", "primary_border must be 0 without convolutional capsules, got 1"),
        ("primary_border=-1", "primary_border must be >= 0, got -1"),
        ("primary_kernel=0", "primary_kernel must be >= 1, got 0"),
        ("primary_types=0", "primary_types must be >= 1, got 0"),
        ("norm=layer", "norm must be one of none, batch, group, got layer"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        network(*SMALL, f"model.{wrong}")
