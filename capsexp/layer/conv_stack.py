"""Several layers of convolutional capsules on top of each other."""

from collections.abc import Sequence

from capsexp.errors import refuse, require_at_least_1
from capsexp.layer.matrix_caps import ConvCaps, MatrixCapsOptions
from capsexp.ops.receptive_fields import Grid


def require_windows(
    conv_types: Sequence[int], conv_kernels: Sequence[int], conv_strides: Sequence[int]
) -> None:
    """Check the lists that describe layers of convolutional capsules, of which there may be none.

    Raises:
        ValueError: a number < 1, or lists of different lengths.
    """
    # None passes: an empty list is no layer.
    require_at_least_1(
        conv_types=conv_types or None, conv_kernels=conv_kernels or None, conv_strides=conv_strides or None
    )
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
