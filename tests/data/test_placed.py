import os
import re

import pytest
import torch

from capsexp.config.build import build
from capsexp.config.compose import compose, to_plain
from capsexp.errors import UserError

DIGITS = ("dataset@dataset.source=digits", "dataset.canvas=12", "dataset.preprocess.shift=2")


@pytest.fixture
def affine():
    """`affine("KEY=VALUE", …)`: digits on 12x12, or with `source="mnist"` MNIST on 40x40."""

    def make(*overrides, source="digits"):
        small = DIGITS if source == "digits" else ()
        overrides = ["dataset=mnist_affine", *small, *overrides]
        return build(to_plain(compose("train", overrides, config_dir=None))["dataset"], at="dataset")

    return make


@pytest.fixture
def mnist(affine):
    root = os.environ.get("CAPSEXP_DATA")
    if root is None or affine(f"data_root={root}", source="mnist").missing_files():
        pytest.skip("MNIST is not under CAPSEXP_DATA")
    return affine(f"data_root={root}", source="mnist")


def positions(images, originals):
    """Return each image's position on its canvas, (down, right), after checking that no ink is lost."""
    side, margins = originals.shape[2], images.shape[2] - originals.shape[2] + 1
    result = torch.full((len(images), 2), -1)
    for down in range(margins):
        for right in range(margins):
            window = images[:, :, down : down + side, right : right + side]
            here = (window == originals).all((1, 2, 3))
            result[here] = torch.tensor([down, right])
    assert (result >= 0).all()
    assert torch.equal(images.long().sum((1, 2, 3)), originals.long().sum((1, 2, 3)))
    return result


def batches(dataset, split, **settings):
    options = {"batch_size": 100, "seed": 0, "device": "cpu", "limit": None} | settings
    return dataset.batches(split, memory_format=torch.contiguous_format, **options)


def assert_equally_likely(drawn, margins):
    counts = (drawn[:, 0] * margins + drawn[:, 1]).bincount(minlength=margins**2)
    expected = len(drawn) / margins**2
    assert len(counts) == margins**2
    # Chi squared, 4 standard deviations above its mean.
    excess = ((counts - expected) ** 2 / expected).sum() - (margins**2 - 1)
    assert excess < 4 * (2 * (margins**2 - 1)) ** 0.5


def test_training_images_get_new_random_positions_in_each_epoch(affine):
    dataset = affine()
    training, _ = dataset.read_training()
    originals, _ = dataset.source.read_training()
    assert (positions(training.images, originals.images) == 2).all()
    drawn = []
    for epoch in range(10):
        for batch in batches(dataset, training).training(epoch):
            pixels = (batch.pixels * 255).round().to(torch.uint8)
            drawn.append(positions(pixels, originals.images[batch.indices]))
    assert_equally_likely(torch.cat(drawn), 5)


def test_familiar_and_validation_images_have_the_same_positions_in_every_run(affine):
    dataset, again = affine(), affine("seed=7", "trainer.batch_size=3")
    splits = [dataset.read_training()[1], dataset.familiar(), again.read_training()[1], again.familiar()]
    for split, same in zip(splits[:2], splits[2:], strict=True):
        assert torch.equal(split.images, same.images)
    for batch_size, seed in ((100, 0), (7, 1)):
        taken = batches(dataset, splits[1], batch_size=batch_size, seed=seed).in_order()
        pixels = torch.cat([batch.pixels for batch in taken])
        assert torch.equal((pixels * 255).round().to(torch.uint8), splits[1].images)
    moved = affine("dataset.placement_seed=1").familiar()
    assert not torch.equal(moved.images, splits[1].images)
    assert torch.equal(moved.labels, splits[1].labels)


def test_fixed_positions_are_equally_likely_and_lose_no_ink(affine):
    dataset = affine("dataset.canvas=10", "dataset.preprocess.shift=1")
    assert_equally_likely(positions(dataset.familiar().images, dataset.source.read("test").images), 3)
    validation = dataset.read_training()[1]
    assert_equally_likely(positions(validation.images, dataset.source.read_training()[1].images), 3)


def test_mnist_images_have_all_13x13_positions(mnist):
    training, validation = mnist.read_training()
    familiar, originals = mnist.familiar(), mnist.source.read("test")
    assert (training.size, validation.size, familiar.size) == (55_000, 5_000, 10_000)
    assert_equally_likely(positions(familiar.images, originals.images), 13)
    assert_equally_likely(positions(validation.images, mnist.source.read_training()[1].images), 13)


def test_expanded_test_images_are_the_familiar_ones(affine):
    dataset = affine("dataset.test_pictures=expanded")
    for field, same in zip(dataset.read("test"), dataset.familiar(), strict=True):
        assert torch.equal(field, same)


def test_validation_images_are_optional(affine):
    training, validation = affine("dataset.source.validation=0").read_training()
    assert (training.size, validation.size) == (1438, 0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.canvas=13", r"canvas must be the side .*\(8x8\) plus an even number of pixels, got 13"),
        ("dataset.canvas=6", "plus an even number of pixels, got 6"),
        ("dataset.preprocess.shift=3", r"shift must be <= 2, the margin of 8x8 images .* of 12x12, got 3"),
        ("dataset.preprocess.resize=20", r"preprocess\.resize must be null: .*source\.preprocess\.resize"),
        ("dataset.rotation=181", r"rotation must be in \[0, 180\] degrees, got 181"),
        ("dataset.shear=-1", "shear must be >= 0, got -1"),
        ("dataset.scale=[1.2,0.8]", r"scale must be \[lowest, highest\] with 0 < .*, got \[1\.2, 0\.8\]"),
        ("dataset.transforms=0", "transforms must be >= 1, got 0"),
    ],
)
def test_invalid_settings_are_reported_in_one_line(affine, override, message):
    with pytest.raises(UserError, match=message):
        affine(override)


def test_images_can_be_resized_before_they_are_placed(affine):
    dataset = affine("dataset.source.preprocess.resize=6")
    assert dataset.margin == 3
    assert dataset.familiar().images.shape == (359, 1, 12, 12)


NO_RANGES = ("dataset.rotation=0", "dataset.shear=0", "dataset.scale=[1,1]")


def test_without_ranges_the_affine_images_are_the_originals_moved_by_whole_pixels(affine):
    dataset = affine(*NO_RANGES, "dataset.transforms=2")
    originals, moved = dataset.source.read("test"), dataset.read("test")
    assert torch.equal(moved.labels, originals.labels.repeat(2))
    for image, original in zip(moved.images[:, 0], originals.images[:, 0].repeat(2, 1, 1), strict=True):
        assert torch.equal(ink(image), ink(original))


def ink(image):
    rows, columns = image.nonzero().T
    return image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def test_more_transforms_do_not_change_the_first_ones(affine):
    single, triple = (affine(f"dataset.transforms={n}", "dataset.canvas=16").read("test") for n in (1, 3))
    count = single.size
    assert triple.size == 3 * count
    assert torch.equal(triple.images[:count], single.images)
    assert not torch.equal(triple.images[count : 2 * count], single.images)
    assert torch.equal(triple.labels, single.labels.repeat(3))


def test_affine_images_depend_only_on_their_seed(affine):
    default, other_run, other_seed = (
        affine("dataset.canvas=16", override).read("test").images
        for override in ("seed=0", "seed=3", "dataset.affine_seed=1")
    )
    assert torch.equal(default, other_run)
    assert not torch.equal(default, other_seed)


def test_a_canvas_too_small_for_the_ranges_is_reported_on_reading(affine):
    dataset = affine("dataset.canvas=8", "dataset.preprocess.shift=0", "dataset.scale=[1.5,1.5]")
    assert dataset.read_training()[0].size > 0
    with pytest.raises(UserError, match=r"\d+ of 359 images do not fit on the canvas of 8x8: ink of up to"):
        dataset.read("test")


def test_mnist_fits_the_canvas_with_affnists_ranges(mnist):
    originals, transformed = mnist.source.read("test"), mnist.read("test")
    assert torch.equal(transformed.labels, originals.labels)
    assert tuple(transformed.images.shape) == (10_000, 1, 40, 40)
    before, after = (images.double().sum((1, 2, 3)) for images in (originals.images, transformed.images))
    factors = after / before
    assert 0.8**2 - 0.03 < factors.min() < 0.68
    assert 1.40 < factors.max() < 1.2**2 + 0.03
    assert factors.mean().item() == pytest.approx(1, abs=0.01)


def test_files_are_the_sources(affine, tmp_path):
    dataset = affine(f"data_root={tmp_path}", source="mnist")
    assert dataset.missing_files() == dataset.source.missing_files()
    assert len(dataset.missing_files()) == 4
    assert dataset.folder == tmp_path / "MNIST/raw"
    assert dataset.problems() == dataset.source.problems()
    with pytest.raises(UserError, match=re.escape("capsexp data prepare mnist")):
        dataset.require_files()
    assert affine().folder is None
    assert affine().missing_files() == affine().problems() == affine().caveats() == []
