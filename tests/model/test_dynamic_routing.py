import math

import pytest
import torch
from torch import nn

from capsexp.capsules import Batch
from capsexp.config.build import build
from capsexp.config.compose import compose, to_plain
from capsexp.errors import UserError
from capsexp.model.dynamic_routing import CapsNet
from capsexp.ops.squash import squash
from capsexp.schedule import Step

THIN = ["model=dynamic_routing", "model.conv_channels=4", "model.decoder.hidden=[8]"]
SMALL = ["model=dynamic_routing_small", "model.conv_channels=8"]
MNIST = (1, 28, 28)


def composed(*overrides):
    return to_plain(compose("train", list(overrides), config_dir=None))


def network(*overrides, image_shape=MNIST, classes=10):
    torch.manual_seed(0)
    return build(composed(*overrides)["model"], at="model", image_shape=image_shape, classes=classes)


def random_images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_changing_the_bias_of_one_primary_channel_changes_36_capsules_of_one_type():
    net, images = network(*THIN), random_images(1, *MNIST)
    features = net.conv(images).relu()
    before = net.primary_caps(features).poses
    with torch.no_grad():
        net.primary_caps.conv.bias[0] += 1
    changed = (net.primary_caps(features).poses != before).any(2)[0].nonzero().squeeze(1)
    assert changed.tolist() == list(range(0, 1152, 32))


def test_routing_normalises_over_the_ten_parents():
    coupling = network(*THIN)(random_images(2, *MNIST)).layers["class_caps"].coupling
    assert coupling.shape == (2, 1152, 10)
    torch.testing.assert_close(coupling.sum(2), torch.ones(2, 1152))


def test_network_is_the_papers_wiring():
    net, images = network(*THIN), random_images(2, *MNIST)
    u = net.conv(images).relu()
    u = net.primary_caps.conv(u).permute(0, 2, 3, 1).reshape(2, 1152, 8)
    votes = torch.einsum("bik,ikjd->bijd", squash(u), net.class_caps.weight)
    expected = net.class_caps.routing(votes, u.norm(dim=2))
    output = net(images)
    torch.testing.assert_close(output.layers["class_caps"].poses, expected.poses)
    torch.testing.assert_close(output.scores, expected.poses.norm(dim=2))
    assert output.probabilities is output.scores


def test_an_image_alone_gives_what_it_gives_in_a_batch():
    net, images = network(*THIN).double(), random_images(5, *MNIST).double()
    batch = net(images)
    for image in range(5):
        alone = net(images[image : image + 1])
        torch.testing.assert_close(alone.scores[0], batch.scores[image])
        torch.testing.assert_close(alone.reconstruction[0], batch.reconstruction[image])


def test_black_images_without_biases_give_finite_values_and_gradients():
    net = network(*THIN)
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    output = net(torch.zeros(2, *MNIST))
    (output.scores.sum() + output.reconstruction.sum()).backward()
    assert not output.scores.any()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("decode", "labels", "decoded"),
    [
        ("label", [3, 4], [3, 4]),
        ("label", None, "longest"),
        ("prediction", [3, 4], "longest"),
        ("prediction", None, "longest"),
        ("7", [3, 4], [7, 7]),
        ("0", None, [0, 0]),
    ],
)
def test_decode_chooses_the_class_capsule(decode, labels, decoded):
    net = network(*THIN, f"model.decode={decode}")
    output = net(random_images(2, *MNIST), None if labels is None else torch.tensor(labels))
    classes = output.scores.argmax(1) if decoded == "longest" else torch.tensor(decoded)
    expected = net.decoder(output.layers["class_caps"].poses, classes)
    torch.testing.assert_close(output.reconstruction, expected)


def test_without_a_decoder_there_is_no_reconstruction():
    output = network(*THIN, "model.decoder=null")(random_images(2, *MNIST), torch.tensor([1, 2]))
    assert output.reconstruction is None


@pytest.mark.parametrize(
    ("overrides", "image_shape", "classes"),
    [
        (THIN, (3, 17, 17), 2),
        (THIN, (2, 33, 20), 3),
        ([*THIN, "model.padding=same"], (3, 5, 24), 4),
        (SMALL, (1, 8, 8), 10),
        (SMALL, (3, 32, 32), 26),
    ],
)
def test_any_image_and_number_of_classes(overrides, image_shape, classes):
    output = network(*overrides, image_shape=image_shape, classes=classes)(random_images(2, *image_shape))
    assert output.scores.shape == (2, classes)
    assert output.reconstruction.shape == (2, *image_shape)


@pytest.mark.parametrize("image_shape", [(1, 16, 28), (1, 28, 16), (1, 3, 3)])
def test_too_small_a_image_is_refused_with_the_smallest_size(image_shape):
    got = f"got {image_shape[1]}x{image_shape[2]}"
    with pytest.raises(UserError, match=f"image_shape must be at least 17x17 .* {got}"):
        network(*THIN, image_shape=image_shape)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("decode=longest", "decode must be one of label, prediction, or a class 0 ... 9, got longest"),
        ("decode=10", "decode must be one of label, prediction, or a class 0 ... 9, got 10"),
        ("initialisation=xavier", "initialisation must be one of default, official, got xavier"),
        ("transformation=elementwise", "elementwise needs class_dim = primary_dim, got 16 and 8"),
        ("transformation=dot", "transformation must be one of matrix, elementwise, got dot"),
        ("padding=full", "padding must be one of valid, same, got full"),
        ("votes_mib=0", "votes_mib must be > 0 or null, got 0"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        network(*THIN, f"model.{wrong}")


def test_official_initialisation_is_truncated_normal_with_biases_of_a_tenth():
    net = network(*THIN, "model.initialisation=official", "routing.bias=true", "routing.prior=learned")
    # A normal of standard deviation 1, cut at 2, has 0.88.
    for parameter, std in [
        (net.conv.weight, 0.05),
        (net.primary_caps.conv.weight, 0.1),
        (net.class_caps.weight, 0.1),
        (net.decoder.layers[0].weight, 0.1),
    ]:
        assert parameter.abs().max() <= 2 * std
        assert parameter.std().item() == pytest.approx(0.88 * std, rel=0.1)
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            assert parameter.unique().tolist() == [pytest.approx(0.1)]
    assert not net.class_caps.routing.prior.any()


@pytest.mark.parametrize(("image_shape", "classes"), [(MNIST, 10), (MNIST, 50), ((1, 17, 17), 3)])
def test_the_default_initialisation_keeps_the_length_of_capsules(image_shape, classes):
    net = network(*THIN, "routing.iterations=1", image_shape=image_shape, classes=classes)
    u = net.primary_caps(net.conv(random_images(8, *image_shape)).relu())
    lengths = net.class_caps(u).activations
    s = (lengths / (1 - lengths)).sqrt()  # squash, undone
    rms = [tensor.square().mean().sqrt().item() for tensor in (s, u.activations)]
    assert math.log2(rms[0] / rms[1]) == pytest.approx(0, abs=0.5)


def test_channels_last_gives_the_same_output():
    net, images = network(*THIN), random_images(2, *MNIST)
    expected = net(images).scores
    got = net.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last)).scores
    torch.testing.assert_close(got, expected)


def test_autocast_routes_in_float32():
    net, images = network(*THIN, "routing.implementation=reference"), random_images(2, *MNIST)
    seen = []
    net.class_caps.routing.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = net(images, torch.tensor([1, 2]))
    assert seen == [torch.float32]
    assert output.scores.dtype == torch.float32
    torch.testing.assert_close(output.scores, net(images).scores, rtol=0.05, atol=0.001)


def test_a_hundred_classes_train_within_the_budget_for_votes():
    plain = ("model.votes_mib=1", "routing.implementation=reference")
    net = network(*SMALL, *plain, image_shape=(1, 8, 8), classes=100)
    sizes = []
    net.class_caps.routing.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].nbytes))
    net(random_images(4, 1, 8, 8), torch.arange(4)).scores.sum().backward()
    assert max(sizes) <= 2**20
    assert len(sizes) == 2 * 4


def test_small_network_memorizes_a_batch():
    config = composed(*SMALL)
    loss = build(config["loss"], at="loss")
    net = network(*SMALL, image_shape=(1, 8, 8))
    images, labels = random_images(8, 1, 8, 8), torch.arange(8)
    batch = Batch(images, labels, images, torch.arange(8))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for number in range(25):
        terms = loss(net(images, labels), batch, Step(number, 25))
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    assert (net(images).scores.argmax(1) == labels).all()


def test_image_shape_and_classes_are_what_the_dataset_gives():
    node = {
        key: value for key, value in composed(*THIN)["model"].items() if key not in ("_target_", "init_from")
    }
    node["routing"], node["decoder"] = (build(node[key], at=key) for key in ("routing", "decoder"))
    assert isinstance(CapsNet(image_shape=MNIST, classes=10, **node), nn.Module)


@pytest.mark.compile
@pytest.mark.parametrize("votes_mib", [64.0, 0.05])
def test_compiled_network_gives_the_same_values_and_gradients(votes_mib):
    net = network(*SMALL, f"model.votes_mib={votes_mib}", image_shape=(1, 8, 8))
    images, labels = random_images(4, 1, 8, 8), torch.arange(4)

    def results(forward):
        output = forward(images, labels)
        loss = output.scores.square().sum() + output.reconstruction.sum()
        return output.scores, output.reconstruction, *torch.autograd.grad(loss, list(net.parameters()))

    for expected, got in zip(results(net), results(torch.compile(net)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
