import pytest
import torch

from capsexp.layer.matrix_primary import MatrixPrimaryCaps


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).relu()


def primary(in_channels=5, *, types=4, pose_dim=9):
    torch.manual_seed(0)
    return MatrixPrimaryCaps(in_channels, types=types, pose_dim=pose_dim)


def test_capsules_come_in_the_order_row_column_type():
    layer, given = primary(), features(2, 5, 3, 4)
    poses, activations = layer(given)
    assert poses.shape == (2, 3 * 4 * 4, 9)
    for row, column, kind in [(0, 0, 0), (2, 1, 3), (1, 3, 2)]:
        place = (row * 4 + column) * 4 + kind
        pixel = given[:, :, row, column]
        matrices = layer.pose.weight[9 * kind : 9 * (kind + 1), :, 0, 0]
        torch.testing.assert_close(poses[:, place], pixel @ matrices.T)
        logit = pixel @ layer.activation.weight[kind, :, 0, 0]
        torch.testing.assert_close(activations[:, place], logit.sigmoid())


def test_there_are_no_biases():
    parameters = {name: tuple(tensor.shape) for name, tensor in primary().named_parameters()}
    assert parameters == {"pose.weight": (36, 5, 1, 1), "activation.weight": (4, 5, 1, 1)}


def test_channels_last_memory_gives_the_same_capsules():
    layer, given = primary(), features(2, 5, 3, 4)
    expected = layer(given)
    last = layer.to(memory_format=torch.channels_last)(given.to(memory_format=torch.channels_last))
    for tensor, other in zip(expected, last, strict=True):
        torch.testing.assert_close(other, tensor)


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e3])
def test_calibrated_poses_have_a_mean_square_of_1_and_each_type_a_mean_logit_of_0(scale):
    layer, given = primary(), scale * features(8, 5, 6, 6)
    layer.calibrate(given)
    assert layer(given).poses.square().mean().item() == pytest.approx(1, rel=1e-4)
    logits = layer.activation(given)
    assert (logits.mean((0, 2, 3)).abs() < 1e-4 * logits.abs().mean((0, 2, 3))).all()


def test_about_half_of_each_calibrated_type_is_active():
    layer, given = primary(16), features(8, 16, 6, 6)
    layer.calibrate(given)
    active = (layer(given).activations > 0.5).float().view(-1, 4).mean(0)
    assert ((active > 0.4) & (active < 0.6)).all()


def test_calibrating_twice_changes_nothing():
    layer, given = primary(), features(8, 5, 6, 6)
    layer.calibrate(given)
    before = [tensor.clone() for tensor in layer.parameters()]
    layer.calibrate(given)
    for tensor, other in zip(before, layer.parameters(), strict=True):
        torch.testing.assert_close(other, tensor, rtol=1e-4, atol=1e-6)


def test_silent_features_leave_the_weights_as_they_are():
    layer = primary()
    before = [tensor.clone() for tensor in layer.parameters()]
    layer.calibrate(torch.zeros(2, 5, 3, 4))
    for tensor, other in zip(before, layer.parameters(), strict=True):
        torch.testing.assert_close(other, tensor, rtol=0, atol=0)
