"""Layers have defaults, for use in a notebook. They are the values of the networks in conf/model."""

import inspect

import pytest

from capsexp.config.compose import compose, to_plain
from capsexp.layer.class_caps import ClassCaps
from capsexp.layer.matrix_caps import ConvCaps, SharedClassCaps
from capsexp.layer.matrix_primary import MatrixPrimaryCaps
from capsexp.layer.primary import PrimaryCaps

# The key of conf/model for an argument of a layer, where its name differs.
KEYS = {
    PrimaryCaps: {
        "types": "primary_types",
        "dim": "primary_dim",
        "kernel": "primary_kernel",
        "stride": "primary_stride",
        "scale": "primary_scale",
    },
    MatrixPrimaryCaps: {"kernel": "primary_kernel", "stride": "primary_stride"},
    ConvCaps: {"kernel": "conv_kernels", "stride": "conv_strides"},
}

# Arguments that other networks set.
UNOFFERED = {"norm_per"}


@pytest.mark.parametrize(
    ("layer", "model"),
    [
        (PrimaryCaps, "dynamic_routing"),
        (ClassCaps, "dynamic_routing"),
        (MatrixPrimaryCaps, "em_routing"),
        (ConvCaps, "em_routing"),
        (SharedClassCaps, "em_routing"),
    ],
)
def test_the_defaults_of_a_layer_are_the_values_of_its_network(layer, model):
    values = to_plain(compose("train", [f"model={model}"], config_dir=None))["model"]
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(layer).parameters.items()
        if parameter.default is not parameter.empty
    }
    assert defaults
    for name, default in defaults.items():
        if name in UNOFFERED:
            continue
        value = values[KEYS.get(layer, {}).get(name, name)]
        assert default in value if isinstance(value, list) else default == value, name
