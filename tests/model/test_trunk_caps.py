"""The network of Heinsen 2019 with any routing on its dense capsules."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from capsexp.capsules import Batch, Capsules, Routed
from capsexp.config.build import build
from capsexp.config.compose import compose, to_plain
from capsexp.errors import UserError
from capsexp.layer.trunk import Trunk, TrunkPrimaryCaps, smallest_side
from capsexp.schedule import Step

STEREO = (2, 48, 48)
TINY = ["model=trunk_caps", "model.channels=[8,8]", "model.strides=[1,2]"]
SMALL = [*TINY, "model.primary_types=6", "model.dense_types=[5]"]
REPAIRED = ["model.initialisation=orthogonal", "routing.beta_start=0.5"]
ROUTINGS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "routing").glob("*.yaml"))
READ_NO_ACTIVATIONS = ["dynamic", "inverted", "self_attention", "uniform"]


def composed(*overrides):
    return to_plain(compose("train", list(overrides), config_dir=None))


def network(*overrides, image_shape=STEREO, classes=5):
    torch.manual_seed(0)
    return build(composed(*overrides)["model"], at="model", image_shape=image_shape, classes=classes)


def images(count, channels=1, height=8, width=8, seed=0):
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(seed))


def test_the_published_sizes_have_the_published_parameters():
    net = network("model=trunk_caps", image_shape=(2, 96, 96))
    assert sum(parameter.numel() for parameter in net.parameters()) == 271_688
    layers = [net.dense_caps_1, net.class_caps]
    counts = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    assert counts == [64 * (16 + 16 + 2), 64 * 5 * (16 + 16 + 2)] == [2_176, 10_880]
    assert (net.dense_caps_1.in_caps, net.class_caps.in_caps) == (64 * 81, 64)


@pytest.mark.parametrize(("side", "sides"), [(96, [94, 46, 44, 21, 19, 9]), (48, [46, 22, 20, 9, 7, 3])])
def test_the_trunk_has_the_published_sides(side, sides):
    trunk, features, got = Trunk((2, side, side)), torch.zeros(1, 4, side, side), []
    for block in trunk.blocks:
        features = block(features)
        got.append(features.shape[2])
    assert got == sides
    assert (trunk.grid.rows, trunk.grid.columns, trunk.grid.step) == (sides[-1], sides[-1], 8)


def test_coordinates_go_from_minus_one_to_one():
    planes = Trunk((1, 30, 40)).coordinates
    assert planes.shape == (2, 30, 40)
    assert (planes[0, 0] == -1).all()
    assert (planes[0, -1] == 1).all()
    assert (planes[1, :, 0] == -1).all()
    assert (planes[1, :, -1] == 1).all()
    assert Trunk((1, 30, 40), coordinates=False).coordinates is None


def test_the_trunk_is_norm_convolution_swish():
    trunk, batch = Trunk((1, 9, 9), channels=(3,), strides=(2,)), images(4, 1, 9, 9)
    expected = torch.cat([batch, trunk.coordinates.expand(4, -1, -1, -1)], 1)
    expected = F.batch_norm(expected, None, None, training=True)
    expected = F.conv2d(expected, trunk.blocks[0].conv.weight, stride=2)
    torch.testing.assert_close(trunk(batch), expected * expected.sigmoid())


def test_kernels_start_kaiming_normal_and_biases_from_0():
    conv = Trunk((2, 48, 48)).blocks[2].conv
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert not conv.bias.any()


def test_primary_capsules_are_in_the_order_row_column_type():
    layer, features = TrunkPrimaryCaps(7, types=3, pose_dim=4, norm="none"), images(2, 7, 5, 6)
    capsules = layer(features)
    assert capsules.poses.shape == (2, 5 * 6 * 3, 4)
    poses = layer.pose(features)
    torch.testing.assert_close(capsules.poses.view(2, 5, 6, 3, 4)[1, 2, 3, 1], poses[1, 4:8, 2, 3])
    scores = layer.score(features).sigmoid()
    torch.testing.assert_close(capsules.activations.view(2, 5, 6, 3)[1, 2, 3, 1], scores[1, 1, 2, 3])


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_the_network_is_its_layers_one_after_another_under_any_routing(routing, norm):
    net, batch = network(*SMALL, f"routing={routing}", f"model.norm={norm}", image_shape=(1, 8, 8)), images(4)
    net.calibrate(batch)
    net.eval()
    output = net(batch)
    assert list(output.layers) == ["primary_caps", "dense_caps_1", "class_caps"]
    capsules = net.primary_caps(net.trunk(batch))
    for name in ("dense_caps_1", "class_caps"):
        capsules = getattr(net, name)(Capsules(*capsules[:2]))
        capsules = net.norms[name].routed(capsules) if norm != "none" else capsules
        assert isinstance(output.layers[name], Routed)
        for tensor, other in zip(capsules[:3], output.layers[name][:3], strict=True):
            torch.testing.assert_close(other, tensor)
    expected = capsules.activations if capsules.scores is None else capsules.scores
    torch.testing.assert_close(output.scores, expected)
    assert output.probabilities.shape == (4, 5)


def test_scores_are_logits_of_a_softmax_or_the_activations_if_asked():
    overrides, batch = [*SMALL, *REPAIRED], images(3)
    output = network(*overrides, image_shape=(1, 8, 8))(batch)
    torch.testing.assert_close(output.probabilities, output.scores.softmax(1))
    assert output.scores.min() < 0
    other = network(*overrides, "model.loss_input=activations", image_shape=(1, 8, 8))(batch)
    torch.testing.assert_close(other.scores, output.scores.sigmoid())


@pytest.mark.parametrize(
    ("shared", "matrices"), [("first", [1, 5, 4]), ("all", [1, 1, 1]), ("none", [3 * 3 * 6, 5, 4])]
)
def test_shared_transformations_chooses_the_layers(shared, matrices):
    net = network(
        *SMALL, "model.dense_types=[5,4]", f"model.shared_transformations={shared}", image_shape=(1, 9, 9)
    )
    layers = [getattr(net, name) for name in net.routed_layers]
    assert [len(layer.weight) for layer in layers] == matrices
    assert [len(layer.routing.beta_use) for layer in layers] == matrices


@pytest.mark.parametrize(("dense", "positions"), [("[5]", 1), ("[]", 9)])
def test_grid_is_that_of_the_children_of_the_classes(dense, positions):
    net = network(*SMALL, f"model.dense_types={dense}", image_shape=(1, 9, 9))
    assert net.grid.positions == positions
    assert net.class_caps.in_caps % positions == 0


def test_half_of_the_capsules_are_active_at_the_start_with_em():
    net, batch = network(*SMALL, "routing=em", image_shape=(1, 12, 12)), images(16, 1, 12, 12)
    net.calibrate(batch)
    for name in ("dense_caps_1", "class_caps"):
        active = net(batch).layers[name].activations > 0.5
        assert 0.35 < active.float().mean() < 0.65


# Self-routing starts with equal shares, whatever the poses.
@pytest.mark.parametrize("routing", [name for name in ROUTINGS if name != "self_routing"])
def test_gradients_are_finite_and_move_every_parameter(routing):
    settings = REPAIRED if routing == "heinsen" else []
    net, batch = network(*SMALL, f"routing={routing}", *settings, image_shape=(1, 8, 8)), images(4)
    net.calibrate(batch)
    net(batch).scores.square().sum().backward()
    for name, parameter in net.named_parameters():
        if routing in READ_NO_ACTIVATIONS and ".score" in name and not name.startswith("class_caps"):
            assert parameter.grad is None
            continue
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_an_image_alone_gives_what_it_gives_in_a_batch_in_evaluation_or_with_group_norms():
    overrides = [*SMALL, *REPAIRED, "model.trunk_norm=group", "model.norm=group"]
    for net in (network(*SMALL, image_shape=(1, 8, 8)).eval(), network(*overrides, image_shape=(1, 8, 8))):
        batch = images(4).double()
        scores = net.double()(batch).scores
        for image in range(4):
            torch.testing.assert_close(net(batch[image : image + 1]).scores[0], scores[image])


def test_weights_are_kernels_and_matrices_without_norms_biases_and_betas():
    net = network(*SMALL, image_shape=(1, 8, 8))
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    assert [names[id(tensor)] for tensor in net(images(2)).weights] == [
        "trunk.blocks.0.conv.weight",
        "trunk.blocks.1.conv.weight",
        "primary_caps.score.conv.weight",
        "primary_caps.pose.conv.weight",
        "dense_caps_1.weight",
        "class_caps.weight",
    ]


def test_a_small_network_memorizes_a_batch():
    overrides = [*SMALL, *REPAIRED, "model.dense_types=[10]"]
    loss = build(composed(*overrides)["loss"], at="loss")
    net = network(*overrides, image_shape=(1, 8, 8), classes=4)
    batch, labels = images(8), torch.arange(8) % 4
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        terms = loss(net(batch, labels), Batch(batch, labels, batch, torch.arange(8)), Step(0, 1))
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        losses.append(terms["cross_entropy"].item())
    assert losses[-1] < 0.3 * losses[0]
    assert (net(batch).scores.argmax(1) == labels).all()


@pytest.mark.parametrize(
    ("strides", "side"), [((1, 2, 1, 2, 1, 2), 29), ((1, 2, 2), 9), ((1,), 3), ((4, 4), 11)]
)
def test_smallest_side_is_the_smallest(strides, side):
    assert smallest_side(strides) == side
    trunk = Trunk((1, side, side), channels=(2,) * len(strides), strides=strides)
    assert (trunk.grid.positions, trunk.eval()(images(1, 1, side, side)).shape[2:]) == (1, (1, 1))


@pytest.mark.parametrize("model", ["trunk_caps", "pool"])
def test_too_small_an_image_is_refused_with_the_smallest_size(model):
    with pytest.raises(UserError, match=r"image_shape must be at least 29x29 for strides .* got 28x30"):
        network(f"model={model}", image_shape=(1, 28, 30))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("channels=[8]", "channels and strides must have one number per convolution, got 1 and 2"),
        ("strides=[0,1]", r"strides must be a list of numbers >= 1, got \[0, 1\]"),
        ("trunk_norm=layer", "trunk_norm must be one of none, batch, group, got layer"),
        ("norm=layer", "norm must be one of none, batch, group, got layer"),
        ("primary_types=0", "primary_types must be >= 1, got 0"),
        ("dense_types=[3,0]", r"dense_types must be a list of numbers >= 1, got \[3, 0\]"),
        ("shared_transformations=last", "shared_transformations must be one of none, first, all, got last"),
        ("pose_dim=15", "pose_dim must be a square for matrix poses, got 15"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        network(*SMALL, f"model.{wrong}", image_shape=(1, 8, 8))
