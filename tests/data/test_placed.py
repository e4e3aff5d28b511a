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
    """`affine(KEY=VALUE, …)`: digits on 12x12, or with `source="mnist"` MNIST on 40x40."""

    def make(*overrides, source="digits"):
        words = ["dataset=mnist_affine", *(DIGITS if source == "digits" else ()), *overrides]
        return build(to_plain(compose("train", words, config_dir=None))["dataset"], at="dataset")

    return make


@pytest.fixture
def mnist(affine):
    root = os.environ.get("CAPSEXP_DATA")
    if root is None or affine(f"data_root={root}", source="mnist").missing_files():
        pytest.skip("MNIST is not under CAPSEXP_DATA")
    return affine(f"data_root={root}", source="mnist")


def places(images, originals):
    """Where on its canvas each picture lies, (down, right); each lies whole at a random place."""
    side, margins = originals.shape[2], images.shape[2] - originals.shape[2] + 1
    found = torch.full((len(images), 2), -1)
    for down in range(margins):
        for right in range(margins):
            window = images[:, :, down : down + side, right : right + side]
            here = (window == originals).all((1, 2, 3))
            found[here] = torch.tensor([down, right])
    assert (found >= 0).all()
    assert torch.equal(images.long().sum((1, 2, 3)), originals.long().sum((1, 2, 3)))
    return found


def batches(dataset, split, **settings):
    options = {"batch_size": 100, "seed": 0, "device": "cpu", "limit": None} | settings
    return dataset.batches(split, memory_format=torch.contiguous_format, **options)


def assert_as_likely(found, margins):
    counts = (found[:, 0] * margins + found[:, 1]).bincount(minlength=margins**2)
    expected = len(found) / margins**2
    assert len(counts) == margins**2
    # Chi squared, 4 standard deviations above its mean.
    excess = ((counts - expected) ** 2 / expected).sum() - (margins**2 - 1)
    assert excess < 4 * (2 * (margins**2 - 1)) ** 0.5


def test_training_pictures_are_anywhere_on_the_canvas_anew_in_each_epoch(affine):
    dataset = affine()
    training, _ = dataset.read_training()
    originals, _ = dataset.source.read_training()
    assert (places(training.images, originals.images) == 2).all()
    found = []
    for epoch in range(10):
        for batch in batches(dataset, training).training(epoch):
            pixels = (batch.pixels * 255).round().to(torch.uint8)
            found.append(places(pixels, originals.images[batch.indices]))
    assert_as_likely(torch.cat(found), 5)


def test_familiar_and_validation_pictures_have_each_one_place_whatever_the_run(affine):
    dataset, again = affine(), affine("seed=7", "trainer.batch_size=3")
    splits = [dataset.read_training()[1], dataset.familiar(), again.read_training()[1], again.familiar()]
    for one, other in zip(splits[:2], splits[2:], strict=True):
        assert torch.equal(one.images, other.images)
    for batch_size, seed in ((100, 0), (7, 1)):
        taken = batches(dataset, splits[1], batch_size=batch_size, seed=seed).in_order()
        pixels = torch.cat([batch.pixels for batch in taken])
        assert torch.equal((pixels * 255).round().to(torch.uint8), splits[1].images)
    moved = affine("dataset.placement_seed=1").familiar()
    assert not torch.equal(moved.images, splits[1].images)
    assert torch.equal(moved.labels, splits[1].labels)


def test_fixed_places_are_as_likely_and_lose_no_ink(affine):
    dataset = affine("dataset.canvas=10", "dataset.preprocess.shift=1")
    assert_as_likely(places(dataset.familiar().images, dataset.source.read("test").images), 3)
    validation = dataset.read_training()[1]
    assert_as_likely(places(validation.images, dataset.source.read_training()[1].images), 3)


def test_mnist_lies_at_all_13x13_places(mnist):
    training, validation = mnist.read_training()
    familiar, originals = mnist.familiar(), mnist.source.read("test")
    assert (training.size, validation.size, familiar.size) == (55_000, 5_000, 10_000)
    assert_as_likely(places(familiar.images, originals.images), 13)
    assert_as_likely(places(validation.images, mnist.source.read_training()[1].images), 13)


def test_the_test_part_is_the_familiar_one_when_asked_for(affine):
    dataset = affine("dataset.test_pictures=expanded")
    for one, other in zip(dataset.read("test"), dataset.familiar(), strict=True):
        assert torch.equal(one, other)


def test_there_may_be_no_validation_pictures(affine):
    training, validation = affine("dataset.source.validation=0").read_training()
    assert (training.size, validation.size) == (1438, 0)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("dataset.canvas=13", r"canvas must be the side .*\(8x8\) and an even number of pixels more, got 13"),
        ("dataset.canvas=6", "an even number of pixels more, got 6"),
        ("dataset.preprocess.shift=3", r"shift must be <= 2, the margin of 8x8 pictures .* of 12x12, got 3"),
        ("dataset.preprocess.resize=20", r"preprocess\.resize must be null: .*source\.preprocess\.resize"),
        ("dataset.rotation=181", r"rotation must be in \[0, 180\] degrees, got 181"),
        ("dataset.shear=-1", "shear must be >= 0, got -1"),
        ("dataset.scale=[1.2,0.8]", r"scale must be \[lowest, highest\] with 0 < .*, got \[1\.2, 0\.8\]"),
        ("dataset.transforms=0", "transforms must be >= 1, got 0"),
    ],
)
def test_settings_that_cannot_be_are_told_in_one_line(affine, override, told):
    with pytest.raises(UserError, match=told):
        affine(override)


def test_pictures_may_be_made_smaller_before_they_are_placed(affine):
    dataset = affine("dataset.source.preprocess.resize=6")
    assert dataset.margin == 3
    assert dataset.familiar().images.shape == (359, 1, 12, 12)


NO_RANGES = ("dataset.rotation=0", "dataset.shear=0", "dataset.scale=[1,1]")


def test_without_ranges_the_affine_pictures_are_the_originals_moved_by_whole_pixels(affine):
    dataset = affine(*NO_RANGES, "dataset.transforms=2")
    originals, found = dataset.source.read("test"), dataset.read("test")
    assert torch.equal(found.labels, originals.labels.repeat(2))
    for image, original in zip(found.images[:, 0], originals.images[:, 0].repeat(2, 1, 1), strict=True):
        assert torch.equal(ink(image), ink(original))


def ink(image):
    rows, columns = image.nonzero().T
    return image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def test_further_transforms_leave_the_first_ones_as_they_are(affine):
    one, three = (affine(f"dataset.transforms={n}", "dataset.canvas=16").read("test") for n in (1, 3))
    count = one.size
    assert three.size == 3 * count
    assert torch.equal(three.images[:count], one.images)
    assert not torch.equal(three.images[count : 2 * count], one.images)
    assert torch.equal(three.labels, one.labels.repeat(3))


def test_affine_pictures_depend_on_their_seed_alone(affine):
    one, run, other = (
        affine("dataset.canvas=16", word).read("test").images
        for word in ("seed=0", "seed=3", "dataset.affine_seed=1")
    )
    assert torch.equal(one, run)
    assert not torch.equal(one, other)


def test_a_canvas_that_is_too_small_for_the_ranges_is_told_when_the_pictures_are_made(affine):
    dataset = affine("dataset.canvas=8", "dataset.preprocess.shift=0", "dataset.scale=[1.5,1.5]")
    assert dataset.read_training()[0].size > 0
    with pytest.raises(UserError, match=r"\d+ of 359 pictures do not fit on the canvas of 8x8: ink of up to"):
        dataset.read("test")


def test_mnist_fits_under_affnists_ranges_and_its_area_changes_as_they_say(mnist):
    originals, found = mnist.source.read("test"), mnist.read("test")
    assert torch.equal(found.labels, originals.labels)
    assert tuple(found.images.shape) == (10_000, 1, 40, 40)
    before, after = (images.double().sum((1, 2, 3)) for images in (originals.images, found.images))
    factors = after / before
    assert 0.8**2 - 0.03 < factors.min() < 0.68
    assert 1.40 < factors.max() < 1.2**2 + 0.03
    assert factors.mean().item() == pytest.approx(1, abs=0.01)


def test_files_are_those_of_the_source(affine, tmp_path):
    dataset = affine(f"data_root={tmp_path}", source="mnist")
    assert dataset.missing_files() == dataset.source.missing_files()
    assert len(dataset.missing_files()) == 4
    assert dataset.folder == tmp_path / "MNIST/raw"
    assert dataset.problems() == dataset.source.problems()
    with pytest.raises(UserError, match=re.escape("capsexp data prepare mnist")):
        dataset.require_files()
    assert affine().folder is None
    assert affine().missing_files() == affine().problems() == affine().caveats() == []
