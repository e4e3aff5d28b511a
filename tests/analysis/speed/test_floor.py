import pytest
import torch

from capsexp.analysis.speed import floor
from capsexp.analysis.speed.measure import random_batches


@pytest.fixture
def moved(tiny_components):
    """Bytes of a step of a tiny CapsNet, the network, and its batch."""

    def measure(*overrides):
        components = tiny_components("model.decoder=null", "model.padding=valid", *overrides)
        model, batch = components.new_model(), next(random_batches(components).training(0))
        return floor.step_bytes(components, model, batch), model, batch

    return measure


def test_the_bytes_are_those_of_layers_and_parameters(moved):
    total, model, batch = moved("trainer.batch_size=9")
    with torch.no_grad():
        features = model.conv(batch.images)
        primary = model.primary_caps(features)
        out = model.class_caps(primary)
    weights = sum(parameter.numel() for parameter in model.parameters())
    capsules, parents = sum(map(torch.numel, primary)), sum(map(torch.numel, out[:2]))
    maps = primary.poses.numel()  # of the convolution inside
    images = 2 * batch.images.numel() + 2 * features.numel()  # no gradient of the images
    layers = 3 * features.numel() + 2 * maps + 3 * capsules + 2 * parents
    assert total == 4 * (images + layers + 10 * weights)


def test_the_bytes_of_images_are_in_proportion_to_their_number(moved):
    one, two, three = (moved(f"trainer.batch_size={size}")[0] for size in (8, 16, 24))
    assert three - two == two - one > 0


@pytest.mark.parametrize(("overrides", "states"), [(["optimizer=adam"], 2), (["optimizer=sgd"], 1)])
def test_the_numbers_that_an_optimizer_keeps_are_counted(tiny_components, overrides, states):
    assert floor.optimizer_states(tiny_components(*overrides)) == states


def test_a_copy_has_a_speed(monkeypatch):
    monkeypatch.setattr(floor, "COPIED", 2**16)
    assert 1e6 < floor.copy_bandwidth(torch.device("cpu")) < 1e13
