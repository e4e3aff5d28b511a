import pytest
import torch
from torch import nn

from capsexp.model.cnn_sabour import CNN

THIN = {"conv_channels": [4, 4, 2], "kernel": 5, "pool": 1, "hidden": [9, 7], "dropout": 0.5}


def test_scores_are_logits_and_probabilities_their_softmax():
    output = CNN((3, 12, 10), 6, **THIN)(torch.rand(2, 3, 12, 10))
    assert output.scores.shape == (2, 6)
    torch.testing.assert_close(output.probabilities, output.scores.softmax(1))
    assert output.reconstruction is None
    assert not output.layers


def test_labels_change_nothing():
    net, images = CNN((1, 8, 8), 3, **THIN).eval(), torch.rand(2, 1, 8, 8)
    assert torch.equal(net(images).scores, net(images, torch.tensor([0, 1])).scores)


def test_dropout_acts_on_the_last_hidden_layer_only():
    net = CNN((1, 8, 8), 3, **THIN)
    kinds = [type(layer).__name__ for layer in net.layers]
    assert kinds == ["Conv2d", "ReLU"] * 3 + ["Flatten"] + ["Linear", "ReLU"] * 2 + ["Dropout", "Linear"]


def test_convolutions_keep_the_size_of_the_image():
    layers = CNN((1, 9, 7), 3, **THIN).layers
    assert next(layer for layer in layers if isinstance(layer, nn.Linear)).in_features == 126


def test_pooling_follows_each_convolution_and_rounds_down():
    net = CNN((2, 17, 11), 3, **{**THIN, "conv_channels": [4, 6], "pool": 2})
    kinds = [type(layer).__name__ for layer in net.layers]
    assert kinds[:7] == ["Conv2d", "ReLU", "MaxPool2d"] * 2 + ["Flatten"]
    assert next(layer for layer in net.layers if isinstance(layer, nn.Linear)).in_features == 6 * 4 * 2
    assert net(torch.rand(2, 2, 17, 11)).scores.shape == (2, 3)


def test_weights_are_those_of_convolutions_and_fully_connected_layers_without_biases():
    net = CNN((1, 8, 8), 3, **THIN)
    expected = [layer.weight for layer in net.layers if isinstance(layer, nn.Conv2d | nn.Linear)]
    weights = net(torch.rand(1, 1, 8, 8)).weights
    assert len(expected) == len(weights) == 6
    assert all(weight is other for weight, other in zip(expected, weights, strict=True))


def test_pooling_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match=r"pool must leave a pixel .*, got 2 after 3 convolutions of 8x7"):
        CNN((1, 8, 7), 3, **{**THIN, "pool": 2})
    with pytest.raises(ValueError, match="pool must be >= 1, got 0"):
        CNN((1, 8, 8), 3, **{**THIN, "pool": 0})


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_an_impossible_dropout_is_refused(dropout):
    with pytest.raises(ValueError, match=rf"dropout must be in \[0, 1\), got {dropout}"):
        CNN((1, 8, 8), 3, **{**THIN, "dropout": dropout})


def test_each_convolution_may_have_its_own_kernel():
    net = CNN((1, 9, 9), 3, **{**THIN, "conv_channels": [4, 6], "kernel": [5, 3]})
    sizes = [layer.kernel_size for layer in net.layers if isinstance(layer, nn.Conv2d)]
    assert sizes == [(5, 5), (3, 3)]
    with pytest.raises(
        ValueError, match=r"kernel must be a number or one for each of 3 conv.*, got \[5, 3\]"
    ):
        CNN((1, 9, 9), 3, **{**THIN, "conv_channels": [4, 6, 8], "kernel": [5, 3]})
