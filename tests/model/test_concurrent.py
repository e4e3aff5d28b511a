import pytest
import torch
from wave_numbers import wave

from capsexp.capsules import Batch, Capsules, Routed
from capsexp.config.build import build
from capsexp.config.compose import compose, to_plain
from capsexp.errors import UserError
from capsexp.layer.dense_caps import DenseCaps
from capsexp.model.concurrent import route_concurrently
from capsexp.routing.inverted import InvertedRouting
from capsexp.schedule import Step

SMALL = [
    "model=concurrent",
    "model.trunk.stem=4",
    "model.trunk.channels=[4,6]",
    "model.trunk.blocks=[1,1]",
    "model.primary_types=2",
    "model.conv_types=[3,4]",
]
NONE = ["model.conv_types=[]", "model.conv_kernels=[]", "model.conv_strides=[]"]


def composed(*overrides):
    return to_plain(compose("train", list(overrides), config_dir=None))


def network(*overrides, image_shape=(3, 32, 32), classes=10):
    torch.manual_seed(0)
    return build(composed(*overrides)["model"], at="model", image_shape=image_shape, classes=classes)


def dense(weight):
    """A layer of vector capsules with these matrices [I, C, J, D]."""

    def routing(*sizes):
        return InvertedRouting(*sizes, iterations=2)

    layer = DenseCaps(weight.shape[0], weight.shape[2], pose_dim=4, pose="vector", routing=routing).double()
    layer.weight.data.copy_(weight.transpose(1, 2))
    return layer


def test_the_example_has_the_values_computed_elsewhere():
    layers = [dense(wave((6, 4, 3, 4), 1)), dense(wave((3, 4, 2, 4), 2))]
    states = route_concurrently(layers, wave((6, 4))[None], iterations=2)
    expected = [-1.0410659851, -0.7201479100, 0.2299871528, 1.5312267423]
    assert states[1].poses[0, 0].tolist() == pytest.approx(expected, abs=1e-10)
    first = layers[0](Capsules(wave((6, 4))[None], torch.ones(1, 6).double()))
    torch.testing.assert_close(states[0].poses, first.poses)
    sequential = layers[1](Capsules(first.poses, first.activations))
    assert not torch.allclose(states[1].poses, sequential.poses, atol=1e-3)


def test_the_papers_network_has_its_parameters():
    assert sum(parameter.numel() for parameter in network("model=concurrent").parameters()) == 1_828_817


def test_the_papers_network_has_its_grids():
    net = network(*SMALL)
    layers = net(torch.rand(2, 3, 32, 32)).layers
    assert {name: layer.poses.shape[1] for name, layer in layers.items()} == {
        "primary_caps": 16 * 16 * 2,
        "conv_caps_1": 7 * 7 * 3,
        "conv_caps_2": 5 * 5 * 4,
        "class_caps": 10,
    }


@pytest.mark.parametrize(
    "overrides",
    [["routing.iterations=1"], [*NONE, "routing.iterations=3"]],
    ids=["one iteration", "one layer"],
)
def test_concurrent_is_sequential_with(overrides):
    images = torch.rand(2, 3, 32, 32)
    concurrent, sequential = (
        network(*SMALL, *overrides, f"model.routing_order={order}").eval()(images)
        for order in ("concurrent", "sequential")
    )
    torch.testing.assert_close(concurrent.scores, sequential.scores)


def test_concurrent_is_not_sequential_with_two_layers_and_iterations():
    images = torch.rand(2, 3, 32, 32)
    scores = [
        network(*SMALL, f"model.routing_order={order}").eval()(images).scores
        for order in ("concurrent", "sequential")
    ]
    assert not torch.allclose(*scores, atol=1e-3)


def test_every_layer_takes_the_poses_of_the_iteration_before():
    net, images = network(*SMALL, "routing.iterations=3").eval(), torch.rand(2, 3, 32, 32)
    output = net(images)
    poses = output.layers["primary_caps"].poses
    layers = [net.conv_caps_1, net.conv_caps_2, net.class_caps]
    states = []
    for layer in layers:
        states.append(layer.routing.step(layer.votes(states[-1] if states else poses), None).poses)
    for _ in range(2):
        below = [poses, *states]
        states = [
            layer.routing.step(layer.votes(children), state).poses
            for layer, children, state in zip(layers, below, states, strict=False)
        ]
    for name, state in zip(net.routed_layers, states, strict=True):
        assert isinstance(output.layers[name], Routed)
        torch.testing.assert_close(output.layers[name].poses, state)
    torch.testing.assert_close(output.probabilities, output.scores.softmax(1))


@pytest.mark.parametrize("image_shape", [(1, 28, 28), (2, 9, 5), (1, 1, 1)], ids=str)
def test_any_image_passes_with_finite_gradients(image_shape):
    net = network(*SMALL, image_shape=image_shape)
    net(torch.rand(3, *image_shape)).scores.square().sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in net.parameters())


def test_gradients_move_every_parameter():
    net = network(*SMALL, "routing.iterations=3")
    net(torch.rand(3, 3, 32, 32)).scores.square().sum().backward()
    assert all(parameter.grad.any() for parameter in net.parameters())


def test_chunks_give_the_same_scores_and_gradients():
    results = []
    for votes_mib in ("null", "1e-6"):
        net = network(*SMALL, f"model.votes_mib={votes_mib}", "model.trunk.norm=group").double()
        scores = net(torch.linspace(0, 1, 3 * 3 * 32 * 32).view(3, 3, 32, 32).double().sin()).scores
        scores.square().sum().backward()
        results.append([scores, *(parameter.grad for parameter in net.parameters())])
    for whole, chunks in zip(*results, strict=True):
        torch.testing.assert_close(chunks, whole)


def test_a_small_network_memorizes_a_batch():
    net, loss = network(*SMALL, classes=4), build(composed(*SMALL)["loss"], at="loss")
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8) % 4
    batch = Batch(images, labels, images, torch.arange(8))
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=1e-2), []
    for _ in range(30):
        term = sum(loss(net(images, labels), batch, Step(0, 1)).values())
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
        losses.append(term.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("model.conv_types=[3]", "conv_types, .* must have one number per layer, got 1, 2 and 2"),
        ("model.routing_order=random", "routing_order must be one of concurrent, sequential, got random"),
        ("routing=self_routing", "routing must route in single steps, as `inverted` does, got SelfRouting"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        network(*SMALL, wrong)
