"""Parameters as the papers count them, on the meta device, through the configs that users have."""

import pytest
import torch
from torch import nn

from capsexp.config.build import build
from capsexp.config.compose import compose, to_plain


def network(*overrides: str, image_shape: tuple[int, int, int], classes: int = 10) -> nn.Module:
    node = to_plain(compose("train", list(overrides), config_dir=None))["model"]
    with torch.device("meta"):
        return build(node, at="model", image_shape=image_shape, classes=classes)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


CAPSNET = "model=dynamic_routing"
BIAS = "routing.bias=true"
NO_DECODER = "model.decoder=null"
SHARED = "model.shared_transformations=true"
CIFAR = ["model.primary_types=64", "model.padding=same"]
MATRIX_CAPSNET = "model=em_routing"
LARGER = "model=em_routing_310k"
STEREO = (2, 32, 32)


# Sabour et al. 2017: 6.8M and 8.2M (section 5.1), 11.36M (section 6). The numbers for other images include
# the bias of the class capsules, which the authors' code has.
@pytest.mark.parametrize(
    ("overrides", "image_shape", "classes", "expected"),
    [
        ([], (1, 28, 28), 10, 8_215_568),
        ([NO_DECODER], (1, 28, 28), 10, 6_804_224),
        ([SHARED, NO_DECODER], (1, 28, 28), 10, 6_804_224 - 1_474_560 + 8 * 160),
        ([BIAS], (1, 28, 28), 10, 8_215_728),
        ([BIAS, NO_DECODER], (1, 28, 28), 10, 6_804_384),
        ([], (1, 36, 36), 10, 11_361_968 - 160),
        ([NO_DECODER], (1, 36, 36), 10, 9_425_824 - 160),
        ([BIAS], (1, 36, 36), 10, 11_361_968),
        ([BIAS, NO_DECODER], (1, 36, 36), 10, 9_425_824),
        ([BIAS], (1, 40, 40), 10, 13_475_808),
        ([BIAS, NO_DECODER], (1, 40, 40), 10, 11_228_064),
        ([BIAS, NO_DECODER], (2, 32, 32), 5, 6_661_200),
        ([BIAS, NO_DECODER, *CIFAR], (3, 24, 24), 10, 22_476_448),
    ],
)
def test_capsnet_has_the_papers_number_of_parameters(overrides, image_shape, classes, expected):
    assert count(network(CAPSNET, *overrides, image_shape=image_shape, classes=classes)) == expected


def test_the_modules_of_capsnet_have_the_papers_number_of_parameters():
    net = network(CAPSNET, image_shape=(1, 28, 28))
    counts = {name: count(module) for name, module in net.named_children()}
    assert counts == {
        "conv": 20_992,
        "primary_caps": 5_308_672,
        "class_caps": 1_474_560,
        "decoder": 1_411_344,
    }


@pytest.mark.parametrize(
    ("overrides", "image_shape", "children"),
    [
        ([], (1, 28, 28), 32 * 6 * 6),
        ([], (1, 36, 36), 32 * 10 * 10),
        ([], (1, 40, 40), 32 * 12 * 12),
        ([], (2, 32, 32), 32 * 8 * 8),
        (CIFAR, (3, 24, 24), 64 * 12 * 12),
    ],
)
def test_primary_capsules_are_as_many_as_in_the_paper(overrides, image_shape, children):
    assert network(CAPSNET, *overrides, image_shape=image_shape).class_caps.weight.shape[0] == children


def test_uniform_coupling_changes_no_parameter():
    assert count(network(CAPSNET, "routing=uniform", image_shape=(1, 28, 28))) == 8_215_568


def test_baseline_has_the_papers_number_of_parameters():
    assert count(network("model=cnn_sabour", image_shape=(1, 28, 28))) == 35_445_522
    assert count(network("model=cnn_multimnist", image_shape=(1, 36, 36))) == 24_563_978


# Section 5.2, affNIST: the networks with their datasets, as the recipes have them.
@pytest.mark.parametrize(
    ("experiment", "overrides", "expected"),
    [
        ("sabour2017_affnist", [], 13_475_808 - 160),
        ("sabour2017_affnist", [NO_DECODER], 11_228_064 - 160),
        ("sabour2017_affnist_baseline", [], 13_460_762),
        ("sabour2017_mnist_affine", [], 13_475_808 - 160),
        ("sabour2017_mnist_affine_baseline", [], 13_460_762),
        ("sabour2017_mnist_affine_laptop", [], 2_276_480),
        ("sabour2017_mnist_affine_laptop_baseline", [], 2_279_594),
    ],
)
def test_networks_for_affnist_are_of_the_papers_size_and_of_one_size(experiment, overrides, expected):
    assert count(network(f"experiment={experiment}", *overrides, image_shape=(1, 40, 40))) == expected


# Hinton, Sabour, Frosst 2018: 68K and 310K (section 4), with smallNORB's two cameras and primary capsules
# without biases.
@pytest.mark.parametrize(
    ("overrides", "image_shape", "classes", "expected"),
    [
        ([MATRIX_CAPSNET], STEREO, 5, 68_618),
        ([MATRIX_CAPSNET], (1, 32, 32), 5, 67_018),
        ([LARGER], STEREO, 5, 316_650),
        # One 4x4 matrix per parent type, not one for each of its 9 * 32, 9 * 32 and 32 kinds of children.
        ([LARGER, SHARED], STEREO, 5, 316_650 - 16 * (2 * 32 * (9 * 32 - 1) + 5 * (32 - 1))),
        ([LARGER], (1, 32, 32), 5, 315_850),
        ([LARGER, "model.padding=same"], (1, 28, 28), 10, 318_420),
        ([LARGER, "model.padding=same"], (1, 45, 20), 10, 318_420),
        ([LARGER, "model.conv_channels=256"], (3, 32, 32), 10, 458_900),
        ([LARGER, "model.conv_channels=256"], (3, 24, 24), 10, 458_900),
    ],
)
def test_matrix_capsnet_has_the_papers_number_of_parameters(overrides, image_shape, classes, expected):
    assert count(network(*overrides, image_shape=image_shape, classes=classes)) == expected


def test_the_modules_of_matrix_capsnet_have_the_papers_number_of_parameters():
    net = network(MATRIX_CAPSNET, image_shape=STEREO, classes=5)
    layers = {name: count(module) for name, module in net.named_children() if count(module)}
    betas = {name: count(module) for name, module in net.named_modules() if name.endswith("routing")}
    assert list(betas.values()) == [2 * 16, 2 * 16, 2 * 5]
    assert sum(betas.values()) == 74
    assert layers == {
        "conv": 3_264,
        "primary_caps": 8_704,
        "conv_caps_1": 18_432 + 2 * 16,
        "conv_caps_2": 36_864 + 2 * 16,
        "class_caps": 1_280 + 2 * 5,
    }


def test_vectors_need_n_squared_where_matrices_need_n():
    matrix, vector = (
        network(MATRIX_CAPSNET, f"model.pose={pose}", image_shape=STEREO, classes=5)
        for pose in ("matrix", "vector")
    )
    for tensor, other in zip(matrix.parameters(), vector.parameters(), strict=True):
        assert other.numel() == tensor.numel() * (16 if tensor.shape[-2:] == (4, 4) else 1)


def test_cnn_of_hinton_has_the_papers_number_of_parameters():
    assert count(network("model=cnn_hinton", image_shape=STEREO, classes=5)) == 4_253_349
    assert count(network("model=cnn_hinton", image_shape=(1, 32, 32), classes=5)) == 4_252_549
