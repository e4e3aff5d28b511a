import pytest
import torch
from em_examples import windows_by_loops

from capsexp.ops.receptive_fields import (
    Grid,
    gather_windows,
    margins,
    padded,
    receptive_fields,
    scatter_max,
    scatter_sum,
)

# rows, columns, types, kernel, stride
GRIDS = [
    (14, 14, 8, (3, 3), 2),
    (6, 6, 16, (3, 3), 1),
    (5, 7, 2, (3, 2), 2),
    (7, 4, 1, (2, 3), 3),
    (6, 6, 3, (1, 1), 2),
    (3, 3, 2, (3, 3), 1),
]


def fields_of(rows, columns, types, kernel, stride):
    return receptive_fields(Grid(rows, columns), types, kernel, stride)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_windows_are_those_of_the_loops(grid):
    fields = fields_of(*grid)
    expected = windows_by_loops(*grid)
    assert fields.children.tolist() == expected
    assert fields.in_caps == grid[0] * grid[1] * grid[2]
    assert fields.connected == len({child for window in expected for child in window})


def test_the_papers_strides_leave_one_row_and_column_without_parents():
    assert fields_of(14, 14, 8, (3, 3), 2).connected == 13 * 13 * 8
    assert fields_of(6, 6, 16, (3, 3), 1).connected == 6 * 6 * 16


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_sums_and_maxima_of_children_are_those_of_the_loops(grid):
    fields = fields_of(*grid)
    values = torch.randn(2, *fields.children.shape, 3, dtype=torch.float64)
    total, largest = scatter_sum(values, fields), scatter_max(values, fields)
    for child in range(fields.in_caps):
        seen = values[:, fields.children == child]
        torch.testing.assert_close(total[:, child], seen.sum(1))
        if seen.shape[1]:
            torch.testing.assert_close(largest[:, child], seen.amax(1))
        else:
            assert (largest[:, child] == -torch.inf).all()


def test_places_hold_what_their_children_hold():
    fields = fields_of(5, 7, 2, (3, 2), 2)
    values = torch.randn(2, fields.in_caps, 4)
    torch.testing.assert_close(gather_windows(values, fields), values[:, fields.children])


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"), [(28, 5, 2, (1, 2)), (8, 3, 1, (1, 1)), (7, 1, 2, (0, 0))]
)
def test_same_padding_is_that_of_tensorflow(size, kernel, stride, expected):
    assert margins(size, kernel, stride, "same") == expected
    grid = Grid(size, size).after_convolution((kernel, kernel), stride, "same")
    assert (grid.rows, grid.columns) == (-(-size // stride),) * 2
    assert padded(torch.zeros(1, 1, size, size), kernel, stride, "same").shape[2] == size + sum(expected)


def test_grids_of_the_paper_are_14_6_4_and_their_centres_the_true_ones():
    conv = Grid(32, 32).after_convolution((5, 5), 2)
    first = conv.after_convolution((3, 3), 2)
    second = first.after_convolution((3, 3), 1)
    assert [grid.rows for grid in (conv, first, second)] == [14, 6, 4]
    assert second.centres()[:4].tolist() == [[8, 8], [8, 12], [8, 16], [8, 20]]


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_centres_are_where_a_symmetric_input_is_seen(padding):
    """The mean pixel that a position reacts to, found by gradients through two real convolutions."""
    kernels, strides = (5, 3), (2, 2)
    grid = Grid(17, 21)
    image = torch.zeros(1, 1, 17, 21, requires_grad=True)
    features = image
    for kernel, stride in zip(kernels, strides, strict=True):
        grid = grid.after_convolution((kernel, kernel), stride, padding)
        features = torch.nn.functional.conv2d(
            padded(features, kernel, stride, padding), torch.ones(1, 1, kernel, kernel), stride=stride
        )
    assert features.shape[2:] == (grid.rows, grid.columns)
    row, column = grid.rows // 2, grid.columns // 2  # away from the padding
    (weight,) = torch.autograd.grad(features[0, 0, row, column], image)
    weight = weight[0, 0] / weight.sum()
    seen = [
        (weight.sum(1) * torch.arange(17)).sum().item(),
        (weight.sum(0) * torch.arange(21)).sum().item(),
    ]
    assert grid.centres().view(grid.rows, grid.columns, 2)[row, column].tolist() == pytest.approx(seen)
