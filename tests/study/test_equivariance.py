from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from capsexp.analysis.trained_run import TrainedRun
from capsexp.capsules import Capsules, Output, Routed
from capsexp.data.dataset import Dataset
from capsexp.data.preprocess import Preprocess
from capsexp.data.seeds import epoch_order
from capsexp.data.split import Split
from capsexp.errors import UserError
from capsexp.schedule import Step
from capsexp.study import equivariance
from capsexp.study.equivariance import Equivariance, held_out_r2

MOVES = {"shifts": [-2, -1, 1, 2], "rotations": [-90, 90], "seed": 0}


class Blobs(Dataset):
    """Random images with a black border, so that moving them loses nothing."""

    name = "blobs"
    classes = ("a", "b", "c")
    file_shape = (1, 20, 20)

    def __init__(self, **changes):
        super().__init__(preprocess=Preprocess.identity(**changes), validation=0, split_seed=0)

    def _load(self, split):
        generator = torch.Generator().manual_seed(0)
        images = torch.zeros(60, 1, 20, 20, dtype=torch.uint8)
        images[:, :, 5:15, 5:15] = torch.randint(0, 255, (60, 1, 10, 10), generator=generator).byte()
        return Split(images, torch.arange(60) % 3)


class Network(nn.Module):
    """Class capsules whose poses are a function of the images; `right` maps labels to predictions."""

    def __init__(self, poses, right=lambda labels: labels):
        super().__init__()
        self.poses, self.right, self.inputs = poses, right, []

    def forward(self, images, labels):
        self.inputs.append(images)
        scores = nn.functional.one_hot(self.right(labels), 3).float()
        poses = self.poses(images).unsqueeze(1).expand(-1, 3, -1)
        coupling = torch.full((len(images), 4, 3), 1 / 3)
        return Output(scores, scores, {"class_caps": Routed(poses, scores, coupling)})


def middle(images):
    """Row and column of the centre of mass."""
    mass = images[:, 0] / images.sum((2, 3))[:, :, None]
    places = torch.arange(20.0)
    return torch.stack([(mass.sum(2) * places).sum(1), (mass.sum(1) * places).sum(1)], 1)


def study(poses, tiny_components, right=lambda labels: labels, limit=None, moves=MOVES, **changes):
    components = tiny_components("trainer.batch_size=32")._replace(dataset=Blobs(**changes))
    model = Network(poses, right)
    model.class_caps = SimpleNamespace(coordinate_elements=(0, 1), coordinate_scale=0.01)
    run = TrainedRun(model, components, path=Path("run"), step=Step(0, 1), limit=limit)
    return Equivariance(**moves)(run), model


def test_a_pose_that_encodes_the_position_is_equivariant(tiny_components):
    (numbers, figures, _), _ = study(lambda images: 0.01 * middle(images), tiny_components)
    down, right = numbers["moves"]["down"], numbers["moves"]["right"]
    for metrics, slopes in ((down, (1, 0)), (right, (0, 1))):
        assert metrics["r2"]["one_map"] == pytest.approx(1, abs=1e-4)
        assert metrics["r2"]["each_class"] == pytest.approx(1, abs=1e-4)
        assert metrics["explained"]["one_map"] == pytest.approx(1, abs=1e-4)
        assert (metrics["slope_of_row"], metrics["slope_of_column"]) == pytest.approx(slopes, abs=1e-3)
        assert metrics["accuracy"] == [1, 1, 1, 1]
        assert metrics["by"] == [-2, -1, 1, 2]
    size = middle(Blobs().read("test").images.float()).norm(dim=1)
    assert down["relative_change"] == pytest.approx([(by / size).mean().item() for by in (2, 1, 1, 2)], 1e-3)
    assert "slope_of_row" not in numbers["moves"]["rotation"]
    assert numbers["r2/down"] == down["r2"]["each_class"]
    assert set(figures) == {"equivariance", "equivariance-poses"}


def test_random_poses_are_not_equivariant(tiny_components):
    torch.manual_seed(0)
    (numbers, *_), _ = study(lambda images: torch.randn(len(images), 4), tiny_components)
    for metrics in numbers["moves"].values():
        for kind in ("r2", "explained"):
            assert max(metrics[kind].values()) < 0.15


def test_poses_that_change_differently_for_each_class_need_a_map_per_class(tiny_components):
    def poses(images):
        signs = torch.tensor([1.0, -1.0, 2.0])[torch.arange(len(images)) % 3]
        return signs[:, None] * middle(images)

    moves = {"shifts": [-1, 1], "rotations": [], "seed": 0}
    (numbers, *_), _ = study(poses, lambda *_: tiny_components("trainer.batch_size=60"), moves=moves)
    r2 = numbers["moves"]["down"]["r2"]
    assert r2["each_class"] == pytest.approx(1, abs=1e-4)
    assert r2["one_map"] < 0.9
    assert set(numbers["moves"]) == {"down", "right"}


def test_the_stored_images_are_moved_and_then_preprocessed(tiny_components):
    changes = {"crop": 12, "standardise": "last"}
    moves = {"shifts": [3], "rotations": [], "seed": 0}
    options = {"limit": 7, "moves": moves, **changes}
    (numbers, *_), model = study(lambda images: images.flatten(1)[:, :5], tiny_components, **options)
    assert numbers["pictures"] == 7
    blobs = Blobs().read("test")
    images = blobs.images[epoch_order(blobs.size, seed=0, epoch=0)[:7].sort().values]
    moved = torch.zeros_like(images)
    moved[:, :, 3:] = images[:, :, :-3]
    unmoved, down, right = model.inputs
    preprocess = Preprocess.identity(**changes)
    torch.testing.assert_close(unmoved, preprocess.test(images).images)
    torch.testing.assert_close(down, preprocess.test(moved).images)
    sideways = torch.zeros_like(images)
    sideways[..., 3:] = images[..., :-3]
    torch.testing.assert_close(right, preprocess.test(sideways).images)


def test_rotations_are_counterclockwise_around_the_center():
    images = torch.randint(0, 256, (3, 2, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(equivariance.rotated(images, 90), images.rot90(1, (2, 3)))
    torch.testing.assert_close(equivariance.rotated(images, 0), images)


def test_r2_is_over_the_images_that_were_not_fitted_to():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(30, 4, 3, dtype=torch.float64, generator=generator)
    outputs = inputs[..., :1] - 2 * inputs[..., 2:] + 0.5 + torch.randn(30, 4, 1, generator=generator)
    fitted, labels = torch.arange(30) < 15, torch.arange(30) % 2
    errors, truths = [], []
    for groups in (torch.zeros(30), labels):
        for group in groups.unique():
            train, test = ((groups == group) & half for half in (fitted, ~fitted))
            design, other = (
                np.c_[inputs[rows].reshape(-1, 3), np.ones(4 * rows.sum())] for rows in (train, test)
            )
            weights = np.linalg.lstsq(design, outputs[train].reshape(-1, 1).numpy(), rcond=None)[0]
            truths.append(outputs[test].reshape(-1, 1).numpy())
            errors.append(truths[-1] - other @ weights)
        truth, error = np.concatenate(truths), np.concatenate(errors)
        expected = 1 - (error**2).sum() / ((truth - truth.mean()) ** 2).sum()
        assert held_out_r2(inputs, outputs, groups, fitted) == pytest.approx(expected)
        errors, truths = [], []


def test_too_few_rows_and_constant_outputs_have_no_r2():
    inputs, labels = torch.randn(4, 1, 3).double(), torch.zeros(4)
    fitted = torch.tensor([True, True, False, False])
    assert held_out_r2(inputs, inputs[..., :1], labels, fitted) is None
    assert held_out_r2(inputs[..., :0], torch.ones(4, 1, 1).double(), labels, fitted) is None


def test_a_trained_network_loses_accuracy_and_its_poses_change_as_it_is_moved(trained_run):
    run = trained_run(limit=200)
    numbers, *_ = Equivariance(shifts=[1, 3], rotations=[30], seed=0)(run)
    right = sum((output.scores.argmax(1) == batch.labels).sum().item() for batch, output in run.outputs())
    assert numbers["accuracy"] == pytest.approx(right / 200)
    down = numbers["moves"]["down"]
    assert down["accuracy"][1] < min(down["accuracy"][0], numbers["accuracy"])
    assert 0 < down["relative_change"][0] < down["relative_change"][1]


def test_networks_and_images_without_a_pose_to_follow_are_refused(tiny_components, trained_run):
    with pytest.raises(UserError, match=r"^fewer than 2 images are classified correctly: there are no poses"):
        study(middle, tiny_components, right=lambda labels: (labels + 1) % 3)
    with pytest.raises(UserError, match=r"^study\.shifts: must be < the image's 20x20, got -20$"):
        study(middle, tiny_components, moves={**MOVES, "shifts": [1, -20]})
    model = Network(middle)
    model.forward = lambda images, labels: Output(images.flatten(1), images.flatten(1))
    components = tiny_components()._replace(dataset=Blobs())
    run = TrainedRun(model, components, path=Path("run"), step=Step(0, 1), limit=None)
    with pytest.raises(UserError, match=r"^this network has no capsules, so there are no poses to follow$"):
        Equivariance(**MOVES)(run)
    components.dataset.labels_per_image = 2
    with pytest.raises(UserError, match=r"^this study needs images of one class each; those of "):
        Equivariance(**MOVES)(run)


def test_class_capsules_that_nothing_routes_are_followed_too_and_poses_may_be_long(tiny_components):
    def long(images):
        return middle(images).repeat(1, 40)

    routed, unrouted = Network(long), Network(long)
    forward = unrouted.forward

    def without_coupling(images, labels):
        output = forward(images, labels)
        poses, activations = output.layers["class_caps"][:2]
        return output._replace(layers={"class_caps": Capsules(poses, activations)})

    unrouted.forward = without_coupling
    components = tiny_components()._replace(dataset=Blobs())
    findings = [
        Equivariance(**MOVES)(TrainedRun(model, components, path=Path("run"), step=Step(0, 1), limit=None))
        for model in (routed, unrouted)
    ]
    assert findings[0].numbers == findings[1].numbers
    figure = findings[1].figures["equivariance-poses"]
    assert figure.get_figheight() < 20
    assert not len(figure.axes[0].get_yticks())


@pytest.mark.parametrize("none", [[], [0]])
def test_a_study_without_moves_is_refused(none):
    with pytest.raises(ValueError, match=r"^shifts and rotations must not both be empty or 0$"):
        Equivariance(shifts=none, rotations=none, seed=0)
