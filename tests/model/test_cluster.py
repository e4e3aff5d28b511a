import pytest
import torch

from capsexp.capsules import Batch, Routed
from capsexp.config.build import build
from capsexp.config.compose import compose, to_plain
from capsexp.errors import UserError
from capsexp.schedule import Step
from capsexp.training.metrics import batch_metrics

STEREO = (2, 32, 32)
SMALL = ["model=cluster_small", "model.pose_dim=4", "model.votes=3"]


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
    ("option", "image_shape", "classes"),
    [("cluster", (3, 32, 32), 10), ("cluster", STEREO, 5), ("cluster_small", STEREO, 5)],
)
def test_parameters_are_those_of_the_formula(option, image_shape, classes):
    with torch.device("meta"):
        net = network(f"model={option}", image_shape=image_shape, classes=classes)
    votes, dim = {"cluster": (8, 24), "cluster_small": (5, 6)}[option]
    expected, in_dim = dim * 8 * 8, image_shape[0]
    for parents, side in [(4, 32), (4, 16), (4, 16), (4, 8), (classes, 8)]:
        outputs = parents * votes * dim
        expected += 4 * (in_dim * 9 * outputs + outputs) + 2 * dim * side * side
        in_dim = dim
    assert count(net) == expected
    assert [layer.out_shape[2] for layer in net.cluster_caps] == [32, 16, 16, 8, 8]


def test_parameters_are_as_many_as_the_yaml_files_say():
    with torch.device("meta"):
        assert count(network("model=cluster", image_shape=(3, 32, 32))) == 3_833_856
        assert count(network("model=cluster_small", image_shape=STEREO, classes=5)) == 141_672


def test_scores_are_one_linear_map_of_the_poses_of_each_class():
    net, images = network(*SMALL), random_images(2, 1, 8, 8)
    output = net(images)
    poses = output.layers["class_caps"].poses
    assert poses.shape == (2, 10, 4 * 2 * 2)
    torch.testing.assert_close(output.scores, poses @ net.score.weight[0])
    torch.testing.assert_close(output.probabilities, output.scores.softmax(1))


def test_the_layers_have_metrics_and_no_coupling():
    net, images, labels = network(*SMALL), random_images(4, 1, 8, 8), torch.arange(4)
    output = net(images)
    assert not any(isinstance(layer, Routed) for layer in output.layers.values())
    metrics = batch_metrics(output, Batch(images, labels, images, labels), {"loss": torch.zeros(())})
    assert metrics.keys() == {"accuracy", "loss", "activation/class_caps", "active/class_caps"}
    torch.testing.assert_close(output.layers["class_caps"].activations, output.scores.sigmoid())


@pytest.mark.parametrize(
    ("image_shape", "classes", "strides"),
    [
        ((3, 5, 9), 2, [1, 2, 1, 2, 1]),
        ((1, 8, 8), 10, [2]),
        ((2, 17, 32), 26, [1, 3, 1]),
        (STEREO, 5, [1, 2]),
    ],
)
def test_any_image_number_of_classes_and_of_layers(image_shape, classes, strides):
    net = network(*SMALL, f"model.strides={strides}", image_shape=image_shape, classes=classes)
    assert net(random_images(2, *image_shape)).scores.shape == (2, classes)


def test_an_image_alone_gives_what_it_gives_in_a_batch():
    net, images = network(*SMALL).double(), random_images(3, 1, 8, 8).double()
    batch = net(images).scores
    for image in range(3):
        torch.testing.assert_close(net(images[image : image + 1]).scores[0], batch[image])


def test_black_images_give_finite_values_and_gradients():
    net = network(*SMALL)
    net(torch.zeros(2, 1, 8, 8)).scores.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def test_weight_decay_acts_on_kernels_and_the_linear_map():
    net = network(*SMALL)
    weights = net(random_images(1, 1, 8, 8)).weights
    assert {id(weight) for weight in weights} == {
        id(parameter) for name, parameter in net.named_parameters() if name.endswith("weight")
    }
    assert len(weights) == 6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("strides=[]", r"strides must be a list of numbers >= 1, got \[\]"),
        ("types=0", "types must be >= 1, got 0"),
        ("eps=0.0", "eps must be > 0, got 0.0"),
        ("strides=[4,4,1]", r"image_shape must be at least 17x17 for strides \[4, 4, 1\], got 8x8"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        network(*SMALL, f"model.{wrong}")


@pytest.mark.parametrize("image_shape", [(1, 4, 9), (1, 9, 4), (3, 1, 1)])
def test_too_small_an_image_is_refused_with_the_smallest_size(image_shape):
    with pytest.raises(
        UserError, match=r"image_shape must be at least 5x5 for strides \[1, 2, 1, 2, 1\], got"
    ):
        network(*SMALL, image_shape=image_shape)


def test_a_few_steps_reduce_the_loss():
    config = composed(*SMALL)
    loss, net = build(config["loss"], at="loss"), network(*SMALL)
    images, labels = random_images(16, 1, 8, 8), torch.arange(16) % 10
    batch, losses = Batch(images, labels, images, torch.arange(16)), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for number in range(30):
        total = sum(loss(net(images, labels), batch, Step(number, 30)).values())
        losses.append(total.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 4


@pytest.mark.compile
def test_compiled_network_gives_the_same_values_and_gradients():
    # 1 / deviation is steep where votes agree: in float32 the gradients differ in the third digit.
    net = network(*SMALL, "model.strides=[1,2]").double()
    images = random_images(4, 1, 8, 8).double()

    def results(forward):
        scores = forward(images).scores
        return scores, *torch.autograd.grad(scores.square().sum(), list(net.parameters()))

    for expected, got in zip(results(net), results(torch.compile(net)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
