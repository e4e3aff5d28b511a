import pytest
import torch
import torch.nn.functional as F
from torch import nn

from capsexp.capsules import Batch, Capsules, Routed
from capsexp.config.build import build
from capsexp.config.compose import compose, to_plain
from capsexp.errors import UserError
from capsexp.loss.spread import spread_loss
from capsexp.model.em_routing import MatrixCapsNet
from capsexp.routing import advance
from capsexp.schedule import Step
from capsexp.training.start import moving_average

SMALL = ["model=em_routing", "model.conv_channels=8", "model.primary_types=2", "model.conv_types=[3,4]"]
DECODER = "model.decoder={_target_: capsexp.layer.decoder.Decoder, _partial_: true, hidden: [8]}"
RAMP = (
    "routing.inverse_temperature_ramp={_target_: capsexp.schedule.Linear, start: 0.5, end: 1.5, steps: 1.0}"
)
STEREO = (2, 32, 32)
LAYERS = ["primary_caps", "conv_caps_1", "conv_caps_2", "class_caps"]


def composed(*overrides):
    return to_plain(compose("train", list(overrides), config_dir=None))


def network(*overrides, image_shape=STEREO, classes=5):
    torch.manual_seed(0)
    return build(composed(*overrides)["model"], at="model", image_shape=image_shape, classes=classes)


def smooth_images(count, channels, height, width, seed=0):
    """Smooth noise, each image with mean 0 and variance 1."""
    noise = torch.randn(count, channels, 5, 5, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(noise, (height, width), mode="bicubic")
    return (smooth - smooth.mean((1, 2, 3), keepdim=True)) / smooth.std((1, 2, 3), keepdim=True)


@pytest.mark.parametrize(
    ("image_shape", "padding", "grids"),
    [
        (STEREO, "valid", [14, 6, 4]),
        ((1, 28, 28), "same", [14, 6, 4]),
        ((1, 28, 28), "valid", [12, 5, 3]),
        ((3, 24, 24), "valid", [10, 4, 2]),
        ((1, 8, 8), "valid", [2, 1, 1]),
    ],
)
def test_layers_have_the_grids_of_the_paper(image_shape, padding, grids):
    net = network(*SMALL, f"model.padding={padding}", image_shape=image_shape)
    layers = net(smooth_images(2, *image_shape)).layers
    assert list(layers) == LAYERS
    counts = [side * side * types for side, types in zip(grids, (2, 3, 4), strict=True)]
    for count, capsules in zip([*counts, 5], layers.values(), strict=True):
        assert capsules.poses.shape == (2, count, 16)
        assert capsules.activations.shape == (2, count)


def test_class_votes_carry_the_centres_that_the_grids_lead_to():
    offsets = network(*SMALL).class_caps.coordinates.view(4, 4, 16)
    assert offsets[:, 0, 3].tolist() == pytest.approx([-0.08, -0.04, 0, 0.04])
    assert offsets[0, :, 7].tolist() == pytest.approx([-0.08, -0.04, 0, 0.04])
    wide = network(*SMALL, "model.padding=same", image_shape=(1, 28, 36)).class_caps.coordinates.view(
        4, 6, 16
    )
    assert wide[:, 0, 3].tolist() == pytest.approx([-0.07, -0.03, 0.01, 0.05])
    assert wide[0, :, 7].tolist() == pytest.approx([-0.11, -0.07, -0.03, 0.01, 0.05, 0.09])


def test_network_is_the_papers_wiring():
    net, images = network(*SMALL), smooth_images(2, *STEREO)
    output = net(images)
    capsules = net.primary_caps(net.conv(images).relu())
    for name, layer in zip(LAYERS, [None, net.conv_caps_1, net.conv_caps_2, net.class_caps], strict=True):
        capsules = capsules if layer is None else layer(Capsules(*capsules[:2]))
        assert isinstance(output.layers[name], Capsules if layer is None else Routed)
        for tensor, other in zip(capsules[:2], output.layers[name][:2], strict=True):
            torch.testing.assert_close(other, tensor)
    assert output.scores is output.layers["class_caps"].activations
    assert output.probabilities is output.scores
    assert output.reconstruction is None


@pytest.mark.parametrize(
    ("overrides", "image_shape", "classes"),
    [
        ([], STEREO, 5),
        ([], (1, 8, 8), 10),
        ([], (1, 28, 28), 10),
        ([], (3, 24, 24), 10),
        ([], (2, 33, 20), 1),
        (["model.padding=same"], (1, 3, 9), 3),
        (["model.pose=vector"], (1, 8, 8), 10),
        (["model.conv_types=[3]", "model.conv_kernels=[5]", "model.conv_strides=[2]"], (1, 20, 20), 3),
    ],
)
def test_any_image_passes_with_finite_gradients_to_every_parameter(overrides, image_shape, classes):
    net = network(*SMALL, DECODER, *overrides, image_shape=image_shape, classes=classes)
    for batch in (1, 3):
        images = smooth_images(batch, *image_shape)
        net.calibrate(images)
        output = net(images, torch.zeros(batch, dtype=torch.long))
        assert output.scores.shape == (batch, classes)
        assert output.reconstruction.shape == (batch, *image_shape)
        net.zero_grad()
        (output.scores.square().sum() + output.reconstruction.square().sum()).backward()
        assert output.scores.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def test_gradients_move_every_parameter():
    net, images = network(*SMALL), smooth_images(4, *STEREO)
    net.calibrate(images)
    net(images).scores.square().sum().backward()
    assert all(parameter.grad.any() for parameter in net.parameters())


def test_an_image_alone_gives_what_it_gives_in_a_batch():
    net, images = network(*SMALL).double(), smooth_images(4, *STEREO).double()
    batch = net(images).scores
    for image in range(4):
        torch.testing.assert_close(net(images[image : image + 1]).scores[0], batch[image])


def test_black_images_give_finite_values_and_gradients():
    net, images = network(*SMALL), torch.zeros(2, *STEREO)
    net.calibrate(images)
    output = net(images)
    output.scores.sum().backward()
    assert output.scores.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("decode", "labels", "decoded"),
    [
        ("label", [3, 4], [3, 4]),
        ("label", None, "most active"),
        ("prediction", [3, 4], "most active"),
        ("2", [3, 4], [2, 2]),
    ],
)
def test_decode_chooses_the_class_capsule(decode, labels, decoded):
    net = network(*SMALL, DECODER, f"model.decode={decode}")
    output = net(smooth_images(2, *STEREO), None if labels is None else torch.tensor(labels))
    classes = output.scores.argmax(1) if decoded == "most active" else torch.tensor(decoded)
    expected = net.decoder(output.layers["class_caps"].poses, classes)
    torch.testing.assert_close(output.reconstruction, expected)


@pytest.mark.parametrize("cost_norm", ["null", "100"])
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_half_of_the_capsules_of_each_layer_are_active_at_the_start(iterations, cost_norm):
    routing = [f"routing.iterations={iterations}", f"routing.cost_norm={cost_norm}"]
    net, images = network(*SMALL, *routing, "model.primary_types=8"), smooth_images(16, *STEREO)
    net.calibrate(images)
    for capsules in net(images).layers.values():
        assert 0.4 < (capsules.activations > 0.5).float().mean() < 0.6


def test_calibrated_primary_poses_have_a_mean_square_of_1():
    net, images = network(*SMALL), smooth_images(16, *STEREO)
    net.calibrate(images)
    poses = net(images).layers["primary_caps"].poses
    assert poses.square().mean().item() == pytest.approx(1, rel=1e-4)


def test_calibration_draws_no_random_numbers():
    images, states = smooth_images(4, *STEREO), []
    for seed in (1, 2):
        net = network(*SMALL)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        net.calibrate(images)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(net.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_chunks_start_and_score_as_the_whole():
    images, scores = smooth_images(5, *STEREO), []
    for votes_mib in ("null", "1e-6"):
        net = network(*SMALL, f"model.votes_mib={votes_mib}")
        net.calibrate(images)
        scores.append(net(images).scores)
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)


def test_weights_are_kernels_and_matrices_without_betas_and_biases():
    net = network(*SMALL, DECODER)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    assert [names[id(tensor)] for tensor in net(smooth_images(1, *STEREO)).weights] == [
        "conv.weight",
        "primary_caps.pose.weight",
        "primary_caps.activation.weight",
        "conv_caps_1.weight",
        "conv_caps_2.weight",
        "class_caps.weight",
        "decoder.layers.0.weight",
        "decoder.layers.1.weight",
    ]


def test_advance_returns_the_inverse_temperature_of_each_layer():
    net, last = network(*SMALL, RAMP), 0.01 * (1 - 0.95**3)
    for number, factor in [(0, 0.5), (50, 1.0), (100, 1.5)]:
        assert advance(net, Step(number, 100)) == {
            "inverse_temperature/conv_caps_1": pytest.approx(factor * last),
            "inverse_temperature/conv_caps_2": pytest.approx(factor * last),
            "inverse_temperature/class_caps": pytest.approx(factor * last / 4),
        }
        assert {layer.routing.ramp.item() for layer in (net.conv_caps_1, net.class_caps)} == {factor}


def test_a_moving_average_sees_the_same_windows():
    net, images = network(*SMALL), smooth_images(2, *STEREO)
    average = moving_average(net, 0.9)
    for _ in range(2):
        average.update_parameters(net)
    assert all(torch.equal(*both) for both in zip(net.buffers(), average.module.buffers(), strict=True))
    torch.testing.assert_close(average.module(images).scores, net(images).scores)


def test_channels_last_gives_the_same_output():
    net, images = network(*SMALL), smooth_images(2, *STEREO)
    expected = net(images).scores
    got = net.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last)).scores
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_small_network_memorizes_a_batch(iterations):
    # With the paper's cost the few children of so small a image hardly move an activation from 1/2.
    routing = [f"routing.iterations={iterations}", "routing.cost_norm=100"]
    overrides = [*SMALL, "model.conv_channels=16", *routing]
    loss = build(composed(*overrides)["loss"], at="loss")
    net = network(*overrides, image_shape=(1, 8, 8), classes=4)
    images, labels = smooth_images(8, 1, 8, 8), torch.arange(8) % 4
    batch = Batch(images, labels, images, torch.arange(8))
    net.calibrate(images)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        terms = loss(net(images, labels), batch, Step(0, 1))
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        losses.append(terms["spread"].item())
    assert torch.tensor(losses).isfinite().all()
    assert losses[-1] < 0.5 * losses[0]
    assert (net(images).scores.argmax(1) == labels).all()


def test_image_shape_and_classes_are_what_the_dataset_gives():
    node = {
        key: value for key, value in composed(*SMALL)["model"].items() if key not in ("_target_", "init_from")
    }
    node["routing"] = build(node["routing"], at="routing")
    assert isinstance(MatrixCapsNet(image_shape=STEREO, classes=5, **node), nn.Module)


@pytest.mark.parametrize("image_shape", [(1, 4, 28), (2, 28, 4)])
def test_too_small_a_image_is_refused_with_the_smallest_size(image_shape):
    got = f"got {image_shape[1]}x{image_shape[2]}"
    with pytest.raises(UserError, match=f"image_shape must be at least 5x5 .* {got}"):
        network(*SMALL, image_shape=image_shape)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("conv_kernels=[3]", "conv_types, .* must have one number per layer, got 2, 1 and 2"),
        ("conv_strides=[2,1,1]", "conv_types, .* must have one number per layer, got 2, 2 and 3"),
        ("conv_types=[]", "conv_types, .* must have one number per layer, got 0, 2 and 2"),
        ("conv_types=[3,0]", r"conv_types must be a list of numbers >= 1, got \[3, 0\]"),
        ("primary_types=0", "primary_types must be >= 1, got 0"),
        ("padding=full", "padding must be one of valid, same, got full"),
        ("pose_dim=15", "pose_dim must be a square for matrix poses, got 15"),
        ("pose=tensor", "pose must be one of matrix, vector, got tensor"),
        ("coordinates=left", "coordinates must be one of paper, official, got left"),
        ("decode=longest", "decode must be one of label, prediction, or a class 0 ... 4, got longest"),
        ("votes_mib=0", "votes_mib must be > 0 or null, got 0"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        network(*SMALL, f"model.{wrong}")


def test_a_routing_that_knows_no_windows_is_refused():
    with pytest.raises(UserError, match="routing must route windows, as `em` does"):
        network(*SMALL, "routing=dynamic")


def test_a_plain_loop_needs_calibrate_and_advance_and_no_more():
    net = network(*SMALL, "routing.cost_norm=100", RAMP, image_shape=(1, 8, 8), classes=4)
    images, labels = smooth_images(8, 1, 8, 8), torch.arange(8) % 4
    net.calibrate(images)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for number in range(20):
        advance(net, Step(number, 20))
        loss = spread_loss(net(images).scores, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert net.class_caps.routing.ramp == pytest.approx(0.5 + 19 / 20)
