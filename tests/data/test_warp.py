"""Random deformations of training images, the mirrored stereo pair, and mixup."""

import math

import pytest
import torch
from torch.nn import functional as F

from capsexp.capsules import Output
from capsexp.data.batches import Batches
from capsexp.data.preprocess import Preprocess
from capsexp.data.split import Split
from capsexp.data.warp import ELASTIC_POINTS, Warp
from capsexp.loss.cross_entropy import CrossEntropy
from capsexp.schedule import Step

NONE = {"rotation": 0, "scale": None, "shear": 0, "elastic": 0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blob(height=33, width=41, *, row, column, count=1):
    """Smooth gray spots, as bytes."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    spot = 250 * torch.exp(-((y - row) ** 2 + (x - column) ** 2) / 8)
    return spot.round().to(torch.uint8).expand(count, 1, height, width)


def center_of(images):
    """Row and column of the mean of the gray values, from the center of the image."""
    weights = images.double()
    height, width = images.shape[2:]
    rows = (weights.sum(3) * (torch.arange(height) - (height - 1) / 2)).sum(2)
    columns = (weights.sum(2) * (torch.arange(width) - (width - 1) / 2)).sum(2)
    return torch.stack([rows, columns], dim=-1)[:, 0] / weights.sum((1, 2, 3))[:, None]


def warped(images, seed=0, fill="zeros", **changes):
    return Warp.parse(**NONE | changes).apply(images, fill=fill, generator=generator(seed))


def test_empty_ranges_change_nothing_and_draw_nothing():
    images, drawn = blob(row=9, column=9), generator()
    assert Warp.parse(**NONE).apply(images, fill="zeros", generator=drawn) is images
    assert torch.equal(drawn.get_state(), generator().get_state())
    assert Warp.parse(**NONE | {"scale": [1, 1]}) == Warp()


def test_a_rotation_keeps_the_distance_from_the_center_and_reaches_both_ends_of_its_range():
    images = blob(row=16, column=30, count=256)  # 10 pixels to the right of the center
    centers = center_of(warped(images, rotation=30))
    torch.testing.assert_close(centers.norm(dim=1), torch.full((256,), 10.0).double(), atol=0.1, rtol=0)
    angles = torch.atan2(-centers[:, 0], centers[:, 1]).rad2deg()
    assert -30.5 < angles.min() < -25
    assert 25 < angles.max() < 30.5


def test_scales_are_drawn_for_width_and_height_separately():
    images = blob(row=22, column=28, count=256)  # 6 down, 8 to the right
    factors = center_of(warped(images, scale=[0.8, 1.2])) / torch.tensor([6.0, 8.0])
    assert 0.78 < factors.min() < 0.82
    assert 1.18 < factors.max() < 1.22
    assert abs(torch.corrcoef(factors.T)[0, 1]) < 0.3  # 5 standard errors


def test_a_shear_moves_rows_by_their_height():
    centers = center_of(warped(blob(row=6, column=20, count=256), shear=0.5))  # 10 above the center
    torch.testing.assert_close(centers[:, 0], torch.full((256,), -10.0).double(), atol=0.1, rtol=0)
    assert -5.1 < centers[:, 1].min() < -4.5
    assert 4.5 < centers[:, 1].max() < 5.1


def test_an_elastic_deformation_moves_control_points_by_their_offsets():
    rows, columns = torch.meshgrid(torch.arange(33), torch.arange(41), indexing="ij")
    ramps = torch.stack([6 * columns, 6 * rows]).to(torch.uint8).expand(64, 2, 33, 41)
    draws = generator()
    torch.rand(64, 4, generator=draws, dtype=torch.float64)  # of the affine part
    offsets = 3 * (2 * torch.rand(64, 2, ELASTIC_POINTS, ELASTIC_POINTS, generator=draws) - 1)
    moved = warped(ramps, elastic=3).double()
    for point, (row, column) in {(2, 2): (16, 20), (1, 3): (8, 30)}.items():
        came_from = torch.tensor([column, row]) + offsets[:, :, *point]
        torch.testing.assert_close(moved[:, :, row, column], 6 * came_from.double(), atol=0.51, rtol=0)


def test_all_channels_are_deformed_alike():
    images = blob(row=20, column=12, count=8).repeat(1, 2, 1, 1)
    result = warped(images, rotation=20, scale=[0.8, 1.2], shear=0.2, elastic=2)
    assert torch.equal(result[:, 0], result[:, 1])


@pytest.mark.parametrize(("fill", "lowest"), [("zeros", 0), ("edge", 200)])
def test_the_outside_is_filled(fill, lowest):
    images = torch.full((4, 1, 12, 12), 200, dtype=torch.uint8)
    assert warped(images, fill=fill, scale=[0.5, 0.5]).min() == lowest


def test_the_result_depends_only_on_the_image_and_the_generator():
    images = blob(row=20, column=12, count=6)
    changes = {"rotation": 20, "scale": [0.8, 1.2], "shear": 0.2, "elastic": 2}
    first, again, other = (warped(images, seed, **changes) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    changed = torch.cat([255 - images[:1], images[1:]])
    assert torch.equal(warped(changed, 1, **changes)[1:], first[1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotation": 181}, "rotation must be in"),
        ({"rotation": -1}, "rotation must be in"),
        ({"shear": -0.1}, "shear must be"),
        ({"elastic": math.inf}, "elastic must be"),
        ({"scale": [0, 1]}, "scale must be null or"),
        ({"scale": [1.2, 0.8]}, "scale must be null or"),
        ({"scale": [1]}, "scale must be null or"),
    ],
)
def test_bad_ranges_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Preprocess.identity(**changes)


def test_a_mirrored_stereo_pair_swaps_its_cameras():
    images = torch.randint(0, 256, (64, 2, 5, 7), generator=generator(3)).to(torch.uint8)
    pixels = (
        (Preprocess.identity(flip="stereo").train(images, generator()).pixels * 255).round().to(torch.uint8)
    )
    mirrored = (pixels == images.flip(1, 3)).flatten(1).all(1)
    same = (pixels == images).flatten(1).all(1)
    assert torch.equal(mirrored, ~same)
    assert 15 < mirrored.sum() < 49  # a fair coin leaves this range once in 40,000 draws


def test_stereo_needs_two_cameras():
    with pytest.raises(ValueError, match="flip 'stereo' needs images of two channels"):
        Preprocess.identity(flip="stereo").output_shape((1, 8, 8))


@pytest.mark.usefixtures("no_type_checks")
def test_an_unknown_flip_is_refused():
    with pytest.raises(ValueError, match="flip must be"):
        Preprocess.identity(flip="sideways")


def mixup_batches(**options):
    images = torch.randint(0, 256, (40, 1, 6, 6), generator=generator(5)).to(torch.uint8)
    keywords = {"batch_size": 16, "seed": 0, "device": "cpu", "limit": None}
    keywords |= {"memory_format": torch.contiguous_format}
    preprocess = Preprocess.identity(mixup=0.4, **options)
    return Batches(Split(images, torch.arange(40)), preprocess, **keywords), images


def test_mixup_mixes_images_and_labels_by_the_same_share():
    batches, images = mixup_batches()
    shares = []
    for epoch in range(30):
        for batch in batches.training(epoch):
            share = batch.mixed.share
            expected = share * images[batch.labels] + (1 - share) * images[batch.mixed.labels]
            torch.testing.assert_close(batch.images, expected / 255)
            torch.testing.assert_close(batch.pixels, batch.images)
            assert sorted(batch.mixed.labels) == sorted(batch.labels)
            shares.append(share)
    # Of Beta(0.4, 0.4), folded at 1/2: the mean is 0.840, the deviation 0.153; 5 standard errors.
    assert abs(sum(shares) / len(shares) - 0.840) < 5 * 0.153 / len(shares) ** 0.5
    assert min(shares) >= 0.5


def test_validation_images_are_not_mixed():
    batches, _ = mixup_batches()
    assert all(batch.mixed is None for batch in batches.in_order())


def test_part_of_a_mixed_batch_keeps_its_other_labels():
    batches, _ = mixup_batches()
    batch = next(batches.training(0))
    part = batch.take(slice(3, 7))
    assert torch.equal(part.mixed.labels, batch.mixed.labels[3:7])
    assert torch.equal(part.images, batch.images[3:7])
    assert F.one_hot(part.labels, 40).shape == (4, 40)


def test_a_mixed_batch_in_pieces_has_the_loss_of_the_whole():
    batches, _ = mixup_batches()
    batch = next(batches.training(0))
    loss = CrossEntropy(label_smoothing=0.1, weight_decay=0.0, reconstruction_weight=0.0)
    scores = torch.randn(16, 40, generator=generator(1))

    def term(rows):
        output = Output(scores=scores[rows], probabilities=scores[rows].softmax(1))
        return loss(output, batch.take(rows), Step(0, 10))["cross_entropy"]

    whole, halves = term(slice(None)), [term(slice(0, 8)), term(slice(8, 16))]
    torch.testing.assert_close(sum(halves) / 2, whole)
