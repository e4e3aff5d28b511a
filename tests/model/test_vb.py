"""The networks of variational Bayes routing, and what capsule norms ask of a network."""

import pytest
import torch

import capsexp
from capsexp.errors import UserError
from capsexp.layer.capsule_norm import CapsuleNorm

STEREO = {"image_shape": (2, 32, 32), "classes": 5}
SMALL = {
    "image_shape": (1, 8, 8),
    "classes": 10,
    "conv_channels": 8,
    "conv_kernel": 3,
    "conv_stride": 1,
    "primary_types": 2,
    "conv_types": [4],
    "conv_kernels": [3],
    "conv_strides": [2],
}
BETAS = {"vb": 74, "vb_169k": 106, "vb_one_layer": 10}


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "published"), [("vb", 68_714), ("vb_169k", 169_642), ("vb_one_layer", 206_154)]
)
def test_parameters_are_the_published_ones_without_betas_and_with_a_gain(name, published):
    assert parameters(capsexp.make(f"model/{name}", **STEREO)) == published - BETAS[name] + 1


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_every_parameter_gets_a_gradient(norm):
    torch.manual_seed(0)
    network = capsexp.make("model/vb", **SMALL, norm=norm, conv_norm=norm)
    output = network(torch.randn(6, 1, 8, 8))
    torch.nn.functional.cross_entropy(output.scores, torch.arange(6)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_class_scores_are_the_gain_times_scores_of_mean_0_and_variance_1():
    network = capsexp.make("model/vb", **SMALL)
    output = network(torch.randn(64, 1, 8, 8))
    assert network.class_scores.gain.item() == 4
    torch.testing.assert_close(output.scores.mean(0), torch.zeros(10), atol=1e-4, rtol=0)
    torch.testing.assert_close(output.scores.std(0, correction=0), torch.full((10,), 4.0), atol=0.1, rtol=0)
    torch.testing.assert_close(output.probabilities, output.scores.softmax(1))


def test_the_loss_can_take_the_activations_as_in_the_authors_code():
    network = capsexp.make("model/vb", **SMALL, loss_input="activations", score_gain=None)
    output = network(torch.randn(8, 1, 8, 8))
    assert torch.equal(output.scores, output.layers["class_caps"].activations)
    assert torch.equal(output.probabilities, output.scores)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_in_evaluation_an_image_alone_is_classified_as_in_a_batch(norm):
    torch.manual_seed(0)
    network, images = capsexp.make("model/vb", **SMALL, norm=norm, conv_norm=norm), torch.randn(5, 1, 8, 8)
    network(images)
    network.eval()
    together = network(images).scores
    for image in range(5):
        torch.testing.assert_close(
            network(images[image : image + 1]).scores[0], together[image], atol=1e-4, rtol=1e-4
        )


def test_each_layer_of_capsules_has_a_norm_and_only_the_primary_one_has_a_gain():
    network = capsexp.make("model/vb", **SMALL)
    norms = {name: module for name, module in network.named_modules() if isinstance(module, CapsuleNorm)}
    assert set(norms) == {"primary_caps.norm", "norms.conv_caps_1", "norms.class_caps"}
    assert {name for name, norm in norms.items() if list(norm.parameters())} == {"primary_caps.norm"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"primary_kernel": 7}, "primary_kernel must be <= the features' 6x6, got 7"),
        ({"score_gain": 0}, "score_gain must be > 0"),
        ({"norm": "layer"}, "norm: must be 'none' or 'batch' or 'group', got 'layer'"),
        ({"conv_norm": "layer"}, "conv_norm: must be 'none' or 'batch' or 'group', got 'layer'"),
        ({"loss_input": "poses"}, "loss_input: must be 'scores' or 'activations', got 'poses'"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        capsexp.make("model/vb", **{**SMALL, **changes})
