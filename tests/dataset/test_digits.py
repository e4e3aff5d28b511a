import torch
from sklearn.datasets import load_digits

from capsexp.data.preprocess import Preprocess
from capsexp.dataset.digits import Digits


def digits():
    preprocess = Preprocess(
        resize=None,
        shift=0,
        crop=None,
        flip=False,
        brightness=0,
        contrast=None,
        light="window",
        standardise=None,
        test_crops=1,
    )
    return Digits(validation=0.1, split_seed=0, preprocess=preprocess)


def test_every_digit_is_in_exactly_one_part():
    parts = [digits().read(part) for part in ("train", "test")]
    assert [part.size for part in parts] == [1438, 359]
    together = torch.cat([part.images.flatten(1) for part in parts])
    published = torch.from_numpy(load_digits().data)
    assert sorted((together.double() * 16 / 255).round().tolist()) == sorted(published.tolist())


def test_a_fifth_of_every_class_is_for_testing():
    train, test = (digits().read(part).labels.bincount() for part in ("train", "test"))
    shares = test / (train + test)
    assert shares.min() > 0.19
    assert shares.max() < 0.21


def test_the_test_part_is_the_same_every_time():
    first, again = digits().read("test"), digits().read("test")
    assert torch.equal(first.images, again.images)
    # Frozen: another test part would make accuracies incomparable.
    assert first.labels[:10].tolist() == [0, 1, 4, 6, 4, 0, 5, 5, 8, 9]
    assert digits().prepare(print) is None
