import io
from pathlib import Path

import pytest
import torch

from capsexp.analysis.routing import figures as routing_figures
from capsexp.analysis.trained_run import TrainedRun
from capsexp.config.build import build_components
from capsexp.errors import UserError
from capsexp.ops.receptive_fields import Grid
from capsexp.schedule import Step
from capsexp.study.routing import Routing
from capsexp.training.metrics import batch_metrics

SETTINGS = {
    "iterations": 5,
    "pictures": 1,
    "layer": None,
    "bins": 20,
    "near": 0.05,
    "distance": "squared",
}
EM = ["model=em_routing", "model.conv_channels=8", "model.primary_types=2", "model.conv_types=[3,4]"]


def untrained(config, limit=40):
    components = build_components(config, plugins=[])
    torch.manual_seed(0)
    model = components.new_model().eval()
    return TrainedRun(model, components, path=Path("run"), step=Step(0, 1), limit=limit)


def total_height(axes):
    """Return the sum of the heights of all bars of a plot."""
    return sum(float(patch.get_data().values.sum()) for patch in axes.patches)


def test_curves_are_those_of_the_network_over_all_images_and_continue_beyond_its_iterations(trained_run):
    run = trained_run(limit=150)
    numbers, figures, _ = Routing(**SETTINGS)(run)
    expected = 0.0
    for batch, output in run.outputs():
        metrics = batch_metrics(output, batch, {"loss": torch.zeros(())})
        expected += metrics["coupling_entropy/class_caps"] * len(batch.labels) / 150
    layer = numbers["layers"]["class_caps"]
    assert numbers["pictures"] == 150
    assert numbers["entropy/class_caps"] == pytest.approx(expected, rel=1e-5)
    assert layer["iterations"] == 3
    assert layer["entropy"][2] == numbers["entropy/class_caps"]
    assert [len(layer[name]) for name in ("entropy", "coupling_change", "logit_change")] == [5, 4, 4]
    assert layer["entropy"][0] == pytest.approx(1)
    assert {"routing-entropy", "routing-change"} < set(figures)


def test_examples_are_the_first_correct_ones_of_different_classes_and_the_first_wrong_one(trained_run):
    run = trained_run(limit=200)
    numbers, figures, _ = Routing(**{**SETTINGS, "pictures": 3})(run)
    right, wrong = {}, []
    for batch, output in run.outputs():
        predictions = output.scores.argmax(1)
        for number, label, guess in zip(
            batch.indices.tolist(), batch.labels.tolist(), predictions.tolist(), strict=True
        ):
            if label == guess and label not in right and len(right) < 3:
                right[label] = number
            elif label != guess:
                wrong.append(number)
    shown = [example["picture"] for example in numbers["shown"]]
    assert sorted(shown) == sorted([*right.values(), wrong[0]])
    named = {f"routing-{kind}-{number}" for kind in ("votes", "parents") for number in shown}
    assert named | {"routing-entropy", "routing-change"} == set(figures)
    for example in numbers["shown"]:
        assert len(example["share"]) == len(example["distance"]) == 3
        assert example["share"][0] == pytest.approx([0.1] * 10)
        assert [sum(row) for row in example["share"]] == pytest.approx([1] * 3)


def test_histograms_hold_every_vote_with_the_weight_of_its_assignment():
    generator = torch.Generator().manual_seed(0)
    distances = torch.rand(2, 50, 4, generator=generator)
    coupling = torch.rand(2, 50, 4, generator=generator).softmax(2)
    image = torch.rand(1, 8, 8, generator=generator)
    example = routing_figures.Example(3, 1, 1, image, distances, coupling, torch.zeros(2, 4, 4))
    figure = routing_figures.histograms(example, "abcd", bins=10, near=0.25, squared=False)
    for row, (everything, near) in enumerate(zip(figure.axes[::2], figure.axes[1::2], strict=True)):
        assert total_height(everything) == pytest.approx(50, rel=1e-4)
        assert total_height(near) == pytest.approx(
            coupling[row][distances[row] < 0.25].sum().item(), rel=1e-4
        )
    assert not figure.axes[1].texts
    far = routing_figures.histograms(example, "abcd", bins=10, near=1e-9, squared=False)
    assert far.axes[1].texts[0].get_text() == "no distance below 1e-09"


@pytest.mark.parametrize("grid", [Grid(2, 3, (3.5, 1.5), 2), Grid(3, 1, (2.0, 4.0), 3), Grid(1, 1)])
def test_a_position_is_drawn_around_the_center_of_its_receptive_field(grid):
    image = torch.zeros(1, 12, 10)
    for place, centre in enumerate(grid.centres()):
        values = torch.zeros(1, grid.positions, 2)
        values[0, place, 1] = 5
        maps = routing_figures._excess_maps(values, grid, image)
        assert maps.shape == (1, 2, 2 * (12 + 2 * grid.step), 2 * (10 + 2 * grid.step))
        square = maps[0, 1].nonzero().double()
        assert len(square) == (2 * grid.step) ** 2
        # The center of pixel 0 is half a pixel from the image's edge, which is one step from the map's edge.
        middle = (square.mean(0) + 0.5 - 1) / 2 - grid.step
        torch.testing.assert_close(middle, centre.double())
        assert not maps[0, 0].any()


def test_every_layer_of_a_network_with_em_routing_is_traced_or_only_the_named_one(em_config):
    run = untrained(em_config(*EM))
    numbers, figures, _ = Routing(**SETTINGS)(run)
    layers = numbers["layers"]
    assert list(layers) == ["conv_caps_1", "conv_caps_2", "class_caps"]
    for layer in layers.values():
        assert layer["iterations"] == 3
        assert [len(layer[name]) for name in ("entropy", "coupling_change")] == [3, 2]
        assert layer["entropy"][0] == pytest.approx(1, abs=1e-5)
        assert "logit_change" not in layer
    assert numbers["class_capsules"]["share_of_label"][0] == pytest.approx(0.1)
    assert any(name.startswith("routing-votes-") for name in figures)
    named, *_ = Routing(**{**SETTINGS, "layer": "conv_caps_2"})(run)
    assert list(named["layers"]) == ["conv_caps_2"]
    assert named["layers"]["conv_caps_2"]["entropy"] == pytest.approx(layers["conv_caps_2"]["entropy"])
    with pytest.raises(UserError, match=r"^study\.layer: must be null or one of conv_caps_1, conv_caps_2, "):
        Routing(**{**SETTINGS, "layer": "conv_caps_3"})(run)


def test_the_control_without_routing_has_one_iteration_in_which_nothing_changes(em_config):
    overrides = [
        "model=dynamic_routing_small",
        "model.conv_channels=8",
        "model.decoder=null",
        "routing=uniform",
    ]
    numbers, figures, _ = Routing(**SETTINGS)(untrained(em_config(*overrides)))
    layer = numbers["layers"]["class_caps"]
    assert layer == {"iterations": 1, "entropy": [pytest.approx(1)], "coupling_change": []}
    for name in ("routing-change", "routing-entropy"):
        figures[name].savefig(io.BytesIO())


def test_distances_of_all_images_are_the_mean_of_those_of_each(em_config):
    run = untrained(em_config(*EM), limit=3)
    numbers, *_ = Routing(**SETTINGS)(run)
    expected = 0.0
    test = run.components.dataset.read("test")
    for number in run.sampled(test.size):
        split = test.take(number[None])
        (batch, output), *_ = run.outputs(split)
        layer = run.model.class_caps
        below = output.layers["conv_caps_2"]
        votes, routed = layer.votes(below.poses)[0], output.layers["class_caps"]
        squares = (votes - routed.poses[0]).square().sum(2)
        weights = routed.coupling[0][:, batch.labels[0]]
        expected += (squares[:, batch.labels[0]] * weights).sum() / weights.sum() / 3
    got = numbers["class_capsules"]["distance_from_label"][2]
    assert got == pytest.approx(expected.item(), rel=1e-4)


def test_a_network_that_routes_nothing_and_images_of_several_classes_are_refused(em_config):
    cnn = untrained(em_config("model=cnn_sabour", "model.conv_channels=[2]", "model.hidden=[4]"))
    with pytest.raises(UserError, match=r"^this network routes no capsules, so there is no routing"):
        Routing(**SETTINGS)(cnn)
    run = untrained(em_config(*EM))
    run.model.grid = None
    with pytest.raises(UserError, match=r"^this network has no `grid`, so its capsules cannot be mapped to"):
        Routing(**SETTINGS)(run)
    run.components.dataset.labels_per_image = 2
    with pytest.raises(
        UserError, match=r"^this study needs images of one class each; those of digits have 2$"
    ):
        Routing(**SETTINGS)(run)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"iterations": 0}, "iterations must be >= 1, got 0"),
        ({"pictures": 0}, "pictures must be >= 1, got 0"),
        ({"bins": 0}, "bins must be >= 1, got 0"),
        ({"near": 0}, "near must be > 0, got 0"),
        ({"distance": "far"}, "distance must be one of l2, squared, got far"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        Routing(**{**SETTINGS, **wrong})
