import pytest
import torch
from torch import nn

from capsexp.capsules import Batch
from capsexp.config.build import build
from capsexp.config.compose import compose, to_plain
from capsexp.errors import UserError
from capsexp.ops.squash import exponential_squash
from capsexp.schedule import Step

MNIST, STEREO, PAIRS = (1, 28, 28), (2, 48, 48), (1, 36, 36)
NO_DECODER = "model.decoder=null"
SMALL = [
    "model=efficient",
    "model.conv_channels=[8,8,16]",
    "model.conv_kernels=[3,3,3]",
    "model.conv_strides=[1,1,1]",
    "model.decoder.hidden=[8]",
]


def composed(*overrides):
    return to_plain(compose("train", list(overrides), config_dir=None))


def network(*overrides, image_shape=(1, 8, 8), classes=10):
    torch.manual_seed(0)
    return build(composed(*overrides)["model"], at="model", image_shape=image_shape, classes=classes)


def random_images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("option", "image_shape", "classes", "expected"),
    [
        ("efficient", MNIST, 10, 161_824),
        ("efficient_smallnorb", STEREO, 5, 151_664),
        ("efficient_multimnist", PAIRS, 10, 154_656),
    ],
)
def test_networks_without_their_decoders_have_the_published_number_of_parameters(
    option, image_shape, classes, expected
):
    with torch.device("meta"):
        net = network(f"model={option}", image_shape=image_shape, classes=classes)
        bare = network(f"model={option}", NO_DECODER, image_shape=image_shape, classes=classes)
    assert count(bare) == count(net) - count(net.decoder) == expected


def test_the_modules_have_the_published_number_of_parameters():
    with torch.device("meta"):
        net = network("model=efficient", image_shape=MNIST)
    assert {name: count(module) for name, module in net.named_children()} == {
        "convs": 832 + 18_496 + 36_928 + 73_856 + 2 * (32 + 64 + 64 + 128),
        "primary_caps": 128 * 81 + 128,
        "class_caps": 16 * 8 * 10 * 16 + 16 * 10,
        "decoder": 1_411_344,
    }
    assert count(net) == 1_573_168


@pytest.mark.parametrize(
    ("option", "image_shape", "side"),
    [("efficient", MNIST, 9), ("efficient_smallnorb", STEREO, 8), ("efficient_multimnist", PAIRS, 5)],
)
def test_the_primary_capsules_see_the_whole_map(option, image_shape, side):
    net = network(f"model={option}", NO_DECODER, image_shape=image_shape)
    assert net.convs(random_images(2, *image_shape)).shape[2:] == (side, side)
    assert net.primary_caps.weight.shape == (128, side, side)
    assert net.grid.positions == 1
    output = net(random_images(2, *image_shape))
    assert output.layers["primary_caps"].poses.shape == (2, 16, 8)
    assert output.layers["class_caps"].coupling.shape == (2, 16, 10)


def test_network_is_the_papers_wiring():
    net, images = network(*SMALL).eval(), random_images(2, 1, 8, 8)
    features = images
    for module in net.convs:
        features = module(features)
    kernels = net.primary_caps.weight.unsqueeze(1)
    numbers = nn.functional.conv2d(features, kernels, net.primary_caps.bias, groups=16)
    u = exponential_squash(numbers.view(2, 2, 8))
    votes = torch.einsum("bik,ikjd->bijd", u, net.class_caps.weight)
    expected = net.class_caps.routing(votes, u.norm(dim=2))
    output = net(images)
    torch.testing.assert_close(output.layers["class_caps"].poses, expected.poses)
    torch.testing.assert_close(output.scores, expected.poses.norm(dim=2))
    assert output.probabilities is output.scores


def test_normalisation_follows_the_activation():
    kinds = [type(module).__name__ for module in network(*SMALL).convs]
    assert kinds == ["Conv2d", "LeakyReLU", "ChannelNorm"] * 3
    instance = network(*SMALL, "model.norm=instance", "model.leak=0.3").convs
    assert instance[1].negative_slope == 0.3
    assert isinstance(instance[2], nn.InstanceNorm2d)
    assert instance[2].affine


def test_matrices_and_kernels_start_from_hes_normal():
    net = network("model=efficient", NO_DECODER, image_shape=MNIST)
    assert net.class_caps.weight.std().item() == pytest.approx((2 / (16 * 8 * 10)) ** 0.5, rel=0.02)
    assert net.convs[3].weight.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.02)
    assert not net.convs[3].bias.any()
    assert not net.class_caps.routing.bias.any()


def test_official_gains_and_biases_are_small_and_uniform():
    norm = network(*SMALL, "model.norm=instance", "model.norm_start=official").convs[2]
    for parameter in (norm.weight, norm.bias):
        assert 0.02 < parameter.abs().max() <= 0.05
    default = network(*SMALL, "model.norm=instance").convs[2]
    assert (default.weight == 1).all()
    assert not default.bias.any()


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_an_image_alone_is_predicted_as_in_a_batch(norm):
    net = network(*SMALL, f"model.norm={norm}").double()
    images = random_images(4, 1, 8, 8).double()
    net(images)  # moves the running statistics
    net.eval()
    batch = net(images)
    for image in range(4):
        alone = net(images[image : image + 1])
        torch.testing.assert_close(alone.scores[0], batch.scores[image])
        torch.testing.assert_close(alone.reconstruction[0], batch.reconstruction[image])


def test_two_labels_are_decoded_one_at_a_time():
    net = network(*SMALL)
    output = net(random_images(3, 1, 8, 8), torch.tensor([[1, 2], [3, 4], [5, 6]]))
    assert output.reconstruction.shape == (3, 2, 1, 8, 8)


def test_black_images_give_finite_values_and_gradients():
    for norm in ("batch", "instance"):
        net = network(*SMALL, f"model.norm={norm}")
        output = net(torch.zeros(2, 1, 8, 8), torch.tensor([1, 2]))
        (output.scores.sum() + output.reconstruction.sum()).backward()
        assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


@pytest.mark.parametrize("routing", ["dynamic", "em", "uniform"])
def test_other_routings_fit_and_em_gets_a_balanced_start(routing):
    net = network(*SMALL, f"routing={routing}")
    images = random_images(8, 1, 8, 8)
    net.calibrate(images)
    activations = net(images).layers["class_caps"].activations
    if routing == "em":
        assert 0.25 < (activations > 0.5).double().mean() < 0.75


@pytest.mark.parametrize(
    ("option", "image_shape", "message"),
    [
        ("efficient", (1, 10, 28), "image_shape must be at least 11x11 .*, got 10x28"),
        ("efficient_smallnorb", (1, 8, 8), "image_shape must be at least 23x23 .*, got 8x8"),
        ("efficient_smallnorb", (1, 28, 22), "image_shape must be at least 23x23 .*, got 28x22"),
    ],
)
def test_too_small_an_image_is_refused_with_the_smallest_size(option, image_shape, message):
    with pytest.raises(UserError, match=message):
        network(f"model={option}", image_shape=image_shape)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("conv_kernels=[3,3]", "must have one number per convolution, got 3, 2 and 3"),
        ("conv_channels=[8,8,12]", "the last of conv_channels must be a multiple of primary_dim 8, got 12"),
        ("leak=1", r"leak must be in \[0, 1\), got 1"),
        ("norm=layer", "norm must be one of batch, instance, got layer"),
        ("norm_start=zero", "norm_start must be one of default, official, got zero"),
        ("decode=10", "decode must be one of label, prediction, or a class 0 ... 9, got 10"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        network(*SMALL, f"model.{wrong}")


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_few_steps_reduce_the_loss(norm):
    settings = [*SMALL, f"model.norm={norm}"]
    loss, net = build(composed(*settings)["loss"], at="loss"), network(*settings)
    images, labels = random_images(16, 1, 8, 8), torch.arange(16) % 10
    batch, losses = Batch(images, labels, images, torch.arange(16)), []
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for number in range(30):
        total = sum(loss(net(images, labels), batch, Step(number, 30)).values())
        losses.append(total.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 3


@pytest.mark.compile
@pytest.mark.usefixtures("no_type_checks")
def test_compiled_network_gives_the_same_values_and_gradients():
    net, images, labels = network(*SMALL), random_images(4, 1, 8, 8), torch.arange(4)

    def results(forward):
        output = forward(images, labels)
        loss = output.scores.square().sum() + output.reconstruction.sum()
        return output.scores, *torch.autograd.grad(loss, list(net.parameters()))

    for expected, got in zip(results(net), results(torch.compile(net)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
