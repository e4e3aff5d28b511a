"""Several layers of convolutional capsules on top of each other."""

from collections.abc import Sequence

from capsexp.errors import refuse
from capsexp.layer.matrix_caps import ConvCaps, MatrixCapsOptions
from capsexp.ops.receptive_fields import Grid


def require_windows(
    conv_types: Sequence[int], conv_kernels: Sequence[int], conv_strides: Sequence[int]
) -> None:
    """Check that the lists that describe layers of convolutional capsules have the same length.

    Raises:
        ValueError: they have not.
    """
    if not len(conv_types) == len(conv_kernels) == len(conv_strides):
        refuse(
            "conv_types, conv_kernels and conv_strides must have one number per layer, "
            f"got {len(conv_types)}, {len(conv_kernels)} and {len(conv_strides)}"
        )


def conv_stack(
    grid: Grid,
    types: int,
    windows: Sequence[tuple[int, int, int]],
    shared: MatrixCapsOptions,
) -> tuple[dict[str, ConvCaps], Grid, int]:
    """Build layers of convolutional capsules.

    Args:
        grid: of the primary capsules.
        types: of the primary capsules.
        windows: parent types, kernel and stride of each layer.
        shared: the settings that all layers share.

    Returns: the layers by name, "conv_caps_1" first; grid and types of the last one.
    """
    layers: dict[str, ConvCaps] = {}
    for number, (parents, kernel, stride) in enumerate(windows, 1):
        layer = ConvCaps(grid, types, types=parents, kernel=kernel, stride=stride, **shared)
        layers[f"conv_caps_{number}"] = layer
        grid, types = layer.grid, parents
    return layers, grid, types
