import re

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from capsexp.data.affine import affine_matrices, apply_affine, random_affine, random_placement
from capsexp.errors import DataError


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def repeated_matrix(count, *, angle=0.0, shear=0.0, scale=(1.0, 1.0)):
    return affine_matrices(double(angle), double(shear), double(scale)).expand(count, 2, 2)


def noise(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator)


def cut(images, height, width):
    """Return the center of the images."""
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    return images[:, :, top : top + height, left : left + width]


def ink_box(image):
    rows, columns = image.nonzero().T
    return rows.min(), rows.max(), columns.min(), columns.max()


@pytest.mark.parametrize("height", [7, 8])
@pytest.mark.parametrize("quarters", [0, 1, 2, -1])
def test_quarter_turns_equal_rot90(quarters, height):
    images = noise(3, 2, height, height)
    turned = apply_affine(images, repeated_matrix(3, angle=90.0 * quarters))
    assert torch.equal(cut(turned, height, height), torch.rot90(images, quarters, (2, 3)))
    assert turned.long().sum() == images.long().sum()


def test_the_identity_keeps_the_pixels_of_images_of_all_sizes():
    images = noise(2, 1, 6, 9)
    assert torch.equal(cut(apply_affine(images, repeated_matrix(2)), 6, 9), images)


@pytest.mark.parametrize(
    "move",
    [
        {"angle": 17.0},
        {"angle": -20.0},
        {"scale": (1.2, 1.2)},
        {"angle": 11.0, "scale": (0.8, 0.8)},
    ],
)
def test_rotation_and_scale_agree_with_torchvision(move):
    """torchvision resamples a smooth image about the same center."""
    x, y = torch.meshgrid(torch.arange(41.0), torch.arange(41.0), indexing="xy")
    image = 200 * torch.exp(-((x - 14) ** 2) / 40 - (y - 23) ** 2 / 15)
    images = image.round().to(torch.uint8)[None, None]
    scale = move.get("scale", (1.0, 1.0))[0]
    expected = vision.affine(
        images.double(),
        angle=-move.get("angle", 0.0),  # clockwise there
        translate=[0, 0],
        scale=scale,
        shear=[0.0],
        interpolation=InterpolationMode.BILINEAR,
    )
    result = cut(apply_affine(images, repeated_matrix(1, **move)), 41, 41)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=0.51)  # rounding to bytes


def center(images):
    """Return the centroid of the ink, (x, y) from the center of the image."""
    weights = images.double()[0, 0]
    height, width = weights.shape
    x = (weights.sum(0) * (torch.arange(width) - (width - 1) / 2)).sum()
    y = (weights.sum(1) * (torch.arange(height) - (height - 1) / 2)).sum()
    return (x / weights.sum()).item(), (y / weights.sum()).item()


def dot(x, y):
    images = torch.zeros(1, 1, 41, 41, dtype=torch.uint8)
    images[0, 0, 20 + y, 20 + x] = 255
    return images


@pytest.mark.parametrize(
    ("move", "expected"),
    [
        ({"shear": 0.2}, (10 + 0.2 * 15, -15)),  # the upper half moves to the right
        ({"scale": (1.2, 0.8)}, (1.2 * 10, -0.8 * 15)),
        ({"scale": (1.2, 0.8), "shear": 0.5}, (1.2 * 10 + 0.5 * 0.8 * 15, -0.8 * 15)),  # scaled first
        ({"shear": 0.2, "angle": 90.0}, (-15, -(10 + 0.2 * 15))),  # rotated last, counter-clockwise
    ],
)
def test_a_point_moves_as_the_settings_say(move, expected):
    moved = center(apply_affine(dot(10, -15), repeated_matrix(1, **move)))
    assert moved == pytest.approx(expected, abs=0.1)  # a dot between pixels is rounded to bytes


@pytest.mark.parametrize("move", [{"angle": 45.0}, {"shear": 1.5}, {"scale": (3.0, 0.5)}])
def test_no_ink_is_lost_at_the_edges(move):
    """The sum of the ink is proportional to the area, up to the corners of the image."""
    images = torch.full((1, 1, 20, 12), 200, dtype=torch.uint8)
    after = apply_affine(images, repeated_matrix(1, **move))
    area = move.get("scale", (1.0, 1.0))
    expected = images.double().sum().item() * area[0] * area[1]
    assert after.double().sum().item() == pytest.approx(expected, rel=0.02)
    top, bottom, left, right = ink_box(after[0, 0])
    height, width = after.shape[2:]
    assert top >= 0
    assert bottom < height
    assert left + right == width - 1
    assert top + bottom == height - 1


def test_all_positions_that_hold_the_ink_are_equally_likely():
    images = torch.zeros(4000, 1, 9, 9, dtype=torch.uint8)
    images[:, :, 2:5, 1:8] = noise(1, 1, 3, 7)
    draws = torch.rand(4000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    placed = random_placement(images, 10, draws)
    boxes = torch.tensor([ink_box(image[0]) for image in placed])
    tops, lefts = boxes[:, 0].bincount(minlength=10), boxes[:, 2].bincount(minlength=10)
    assert (tops[:8] > 4000 / 8 * 0.8).all()
    assert (lefts[:4] > 4000 / 4 * 0.8).all()
    assert tops[8:].sum() == lefts[4:].sum() == 0
    assert torch.equal(placed.long().sum((1, 2, 3)), images.long().sum((1, 2, 3)))


def test_ink_as_large_as_the_canvas_has_one_position_and_no_ink_has_any():
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    images[0, 0, 2:7, 3:8] = 9
    placed = random_placement(images, 5, torch.full((2, 2), 0.999, dtype=torch.float64))
    assert (placed[0] == 9).all()
    assert (placed[1] == 0).all()


def test_ink_larger_than_the_canvas_is_refused():
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    images[0, 0, 1:7, 2] = 1
    message = "1 of 3 images do not fit on the canvas of 5x5: ink of up to 6 pixels"
    with pytest.raises(DataError, match=re.escape(message)):
        random_placement(images, 5, torch.zeros(3, 2, dtype=torch.float64))


def test_draws_cover_exactly_their_ranges():
    """Measure the angle of each image from the direction of a bar."""
    images = torch.zeros(600, 1, 25, 25, dtype=torch.uint8)
    images[:, :, 12, 2:23] = 255
    transformed = random_affine(images, rotation=20, shear=0, scale=[1, 1], canvas=30, seed=5)
    slopes = []
    for image in transformed[:, 0].double():
        rows, columns = image.nonzero().T.double()
        weights = image[rows.long(), columns.long()]
        x, y = (
            columns - (columns * weights).sum() / weights.sum(),
            rows - (rows * weights).sum() / weights.sum(),
        )
        slopes.append(-torch.atan((x * y * weights).sum() / (x * x * weights).sum()).rad2deg())
    angles = torch.stack(slopes)
    assert angles.min() == pytest.approx(-20, abs=0.7)
    assert angles.max() == pytest.approx(20, abs=0.7)
    assert angles.mean().abs() < 3 * 20 / 3**0.5 / 600**0.5


def test_images_depend_on_the_seed():
    images = torch.zeros(700, 1, 12, 12, dtype=torch.uint8)
    images[:, :, 3:9, 3:9] = noise(700, 1, 6, 6)
    ranges = {"rotation": 20, "shear": 0.2, "scale": [0.8, 1.2], "canvas": 16}
    first = random_affine(images, **ranges, seed=1)
    assert torch.equal(first, random_affine(images, **ranges, seed=1))
    assert not torch.equal(first, random_affine(images, **ranges, seed=2))
