import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capsexp.data.batches import Batches
from capsexp.data.dataset import Dataset
from capsexp.data.preprocess import Preprocess
from capsexp.data.seeds import derive_seed, epoch_order
from capsexp.data.split import Split, split_validation, stratified
from capsexp.errors import DataError

IDENTITY = {}
AUGMENTED = {"shift": 2, "flip": True, "brightness": 20, "contrast": [0.5, 1.5], "standardise": "last"}


def numbered(count, channels=1, side=6):
    """Random images, labeled by their position."""
    images = torch.randint(0, 256, (count, channels, side, side), generator=torch.Generator().manual_seed(0))
    return Split(images.to(torch.uint8), torch.arange(count))


def batches(count=23, *, side=6, preprocess=AUGMENTED, **changes):
    keywords = {
        "batch_size": 5,
        "seed": 0,
        "device": "cpu",
        "memory_format": torch.contiguous_format,
        "limit": None,
    }
    return Batches(numbered(count, side=side), Preprocess.identity(**preprocess), **{**keywords, **changes})


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))


class Toy(Dataset):
    name = "toy"
    classes = ("a", "b")
    file_shape = (1, 6, 6)

    def __init__(self, *, split, **keywords):
        self.split = split
        super().__init__(split_seed=0, **keywords)

    def _load(self, split):
        return self.split


def toy(*, split=None, preprocess=IDENTITY, validation=0):
    split = split or Split(numbered(9).images, torch.arange(9) % 2)
    return Toy(split=split, preprocess=Preprocess.identity(**preprocess), validation=validation)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 12), epoch=st.integers(0, 3), data=st.data())
def test_training_can_start_at_any_batch(count, batch_size, epoch, data):
    all_batches = batches(count, batch_size=batch_size)
    start = data.draw(st.integers(0, len(all_batches)))
    whole = list(all_batches.training(epoch))
    resumed = list(batches(count, batch_size=batch_size).training(epoch, start=start))
    assert len(resumed) == len(all_batches) - start
    assert all(equal(a, b) for a, b in zip(whole[start:], resumed, strict=True))


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 12))
def test_an_epoch_visits_each_image_once(count, batch_size):
    all_batches = batches(count, batch_size=batch_size)
    for epoch in (all_batches.training(0), all_batches.in_order()):
        batches_of_epoch = list(epoch)
        assert len(batches_of_epoch) == len(all_batches) == -(-count // batch_size)
        assert sorted(torch.cat([batch.indices for batch in batches_of_epoch]).tolist()) == list(range(count))


def test_labels_and_indices_belong_to_their_images():
    split = numbered(23)
    for batch in batches(preprocess=IDENTITY).training(1):
        assert torch.equal(batch.labels, batch.indices)
        assert torch.equal(batch.pixels, split.images[batch.indices].float() / 255)
        assert batch.images is batch.pixels


def test_batches_do_not_use_the_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = list(batches().training(0))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert all(equal(a, b) for a, b in zip(first, batches().training(0), strict=True))


def test_epochs_and_seeds_differ_in_order_and_in_augmentation():
    first = next(batches(200, batch_size=200).training(0))
    for other in (
        next(batches(200, batch_size=200).training(1)),
        next(batches(200, batch_size=200, seed=1).training(0)),
    ):
        assert not torch.equal(first.indices, other.indices)
        restored = [batch.images[batch.indices.argsort()] for batch in (first, other)]
        assert not torch.equal(*restored)


def test_in_order_keeps_the_order_and_is_not_random():
    all_batches = batches()
    first, again = list(all_batches.in_order()), list(all_batches.in_order())
    assert all(equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.cat([batch.indices for batch in first]).tolist() == list(range(23))
    pixels = torch.cat([batch.pixels for batch in first])
    assert torch.equal(pixels, numbered(23).images.float() / 255)


def test_views_start_with_the_batches_of_in_order():
    crops = {"crop": 2, "test_crops": 13}
    all_batches = batches(preprocess=crops, side=9)
    for plain, views in zip(all_batches.in_order(), all_batches.views(), strict=True):
        assert len(views) == 13
        assert equal(plain, views[0])
        assert len({view.pixels.sum().item() for view in views}) == 13
        assert all(torch.equal(view.indices, plain.indices) for view in views)
        assert all(torch.equal(view.labels, plain.labels) for view in views)
    assert [len(views) for views in batches(limit=2).views()] == [1, 1]


def test_limit_stops_an_epoch_early_and_changes_nothing_before():
    limited, whole = batches(limit=2), batches()
    assert len(limited) == 2
    assert len(batches(limit=99)) == len(whole) == 5
    pairs = zip(limited.training(0), list(whole.training(0))[:2], strict=True)
    assert all(equal(a, b) for a, b in pairs)
    assert len(list(limited.in_order())) == 2
    assert limited.visited == sum(len(batch.labels) for batch in limited.in_order())
    assert whole.visited == whole.count


def test_channels_last_changes_only_the_memory_format():
    split = numbered(10, channels=3)
    keywords = {"batch_size": 4, "seed": 0, "device": "cpu", "limit": None}
    plain = Batches(
        split, Preprocess.identity(**AUGMENTED), memory_format=torch.contiguous_format, **keywords
    )
    last = Batches(split, Preprocess.identity(**AUGMENTED), memory_format=torch.channels_last, **keywords)
    for a, b in zip(plain.training(0), last.training(0), strict=True):
        assert b.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(a.images, b.images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "split must have >= 1 image, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"limit": 0}, "limit must be >= 1 batch or null, got 0"),
    ],
)
def test_impossible_batches_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        batches(**changes)


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (22, 22), (0.5, 12), (0.001, 1)])
def test_validation_images_are_removed_from_training(count, expected):
    training, validation = split_validation(numbered(23), count=count, seed=0)
    assert validation.size == expected
    assert sorted(training.labels.tolist() + validation.labels.tolist()) == list(range(23))
    assert torch.equal(validation.images, numbered(23).images[validation.labels])


def test_validation_images_depend_only_on_their_seed():
    first, again, other = (
        split_validation(numbered(100), count=20, seed=seed)[1].labels for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("count", [23, 24])
def test_validation_must_leave_an_image_to_train_on(count):
    with pytest.raises(ValueError, match=f"validation must leave an image to train on, got {count} of 23"):
        split_validation(numbered(23), count=count, seed=0)


@pytest.mark.parametrize("validation", [-1, 1.0, 0.0, -0.5])
def test_validation_out_of_range_is_refused_before_reading(validation):
    with pytest.raises(ValueError, match=r"validation must be an integer >= 0 or a share in \(0, 1\)"):
        toy(validation=validation)


def test_stratified_takes_a_share_of_every_class():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 2)
    chosen = stratified(labels, share=0.2, seed=0)
    assert labels[chosen].bincount().tolist() == [10, 4, 1]
    assert torch.equal(chosen, stratified(labels, share=0.2, seed=0))
    assert not torch.equal(chosen, stratified(labels, share=0.2, seed=1))


def test_derived_seeds_are_the_same_in_every_process_and_depend_on_every_key():
    keys = [(0, 1, 2, "a"), (0, 1, 2, "b"), (0, 12, "a"), (0, 1, "2", "a"), (1, 1, 2, "a"), (0, 2, 1, "a")]
    seeds = [derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Frozen: Python's own hash of a string would differ in the next process.
    assert seeds[0] == 6_302_797_363_194_110_411


def test_the_order_of_an_epoch_is_a_fixed_permutation():
    # Frozen: a change here changes every run.
    assert epoch_order(6, seed=0, epoch=0).tolist() == [3, 1, 2, 4, 5, 0]
    assert sorted(epoch_order(100, seed=3, epoch=7).tolist()) == list(range(100))


def test_images_have_the_shape_that_the_dataset_reports():
    dataset = toy(preprocess={"resize": 10, "crop": 8}, validation=3)
    training, validation = dataset.read_training()
    assert (training.size, validation.size) == (6, 3)
    assert tuple(training.images.shape[1:]) == dataset.raw_shape == (1, 10, 10)
    assert dataset.image_shape == (1, 8, 8)


def test_a_dataset_has_no_caveats_by_default():
    assert toy().caveats() == []


def test_a_crop_larger_than_the_images_is_refused_before_reading():
    with pytest.raises(ValueError, match="crop must be <= the image's 6x6, got 7"):
        toy(preprocess={"crop": 7})


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (Split(numbered(4).images, torch.zeros(3, dtype=torch.int64)), "expected 3 train images of shape"),
        (
            numbered(4, side=5),
            r"expected 4 train images of shape \(1, 6, 6\), found 4 of shape \(1, 5, 5\)",
        ),
        (numbered(4), "the train labels must be 0 … 1"),
        (numbered(0), "the train labels must be 0 … 1"),
    ],
)
def test_images_and_labels_that_do_not_match_the_dataset_are_refused(split, message):
    with pytest.raises(DataError, match=message):
        toy(split=split).read("train")
