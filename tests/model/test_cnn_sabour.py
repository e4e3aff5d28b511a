import pytest
import torch
from torch import nn

from capsexp.model.cnn_sabour import CNN

THIN = {"conv_channels": [4, 4, 2], "kernel": 5, "hidden": [9, 7], "dropout": 0.5}


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


def test_convolutions_keep_the_size_of_the_picture():
    assert (
        next(one for one in CNN((1, 9, 7), 3, **THIN).layers if isinstance(one, nn.Linear)).in_features == 126
    )


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_an_impossible_dropout_is_refused(dropout):
    with pytest.raises(ValueError, match=rf"dropout must be in \[0, 1\), got {dropout}"):
        CNN((1, 8, 8), 3, **{**THIN, "dropout": dropout})
