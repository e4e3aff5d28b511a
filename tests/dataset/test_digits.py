import torch
from sklearn.datasets import load_digits

from capsexp.data.preprocess import Preprocess
from capsexp.dataset.digits import Digits


def digits():
    preprocess = Preprocess.identity()
    return Digits(validation=0.1, split_seed=0, preprocess=preprocess)


def test_every_digit_is_in_exactly_one_split():
    splits = [digits().read(name) for name in ("train", "test")]
    assert [split.size for split in splits] == [1438, 359]
    together = torch.cat([split.images.flatten(1) for split in splits])
    published = torch.from_numpy(load_digits().data)
    assert sorted((together.double() * 16 / 255).round().tolist()) == sorted(published.tolist())


def test_a_fifth_of_every_class_is_in_the_test_split():
    train, test = (digits().read(split).labels.bincount() for split in ("train", "test"))
    shares = test / (train + test)
    assert shares.min() > 0.19
    assert shares.max() < 0.21


def test_the_test_split_is_the_same_every_time():
    first, again = digits().read("test"), digits().read("test")
    assert torch.equal(first.images, again.images)
    # Frozen: another test split would make accuracies incomparable.
    assert first.labels[:10].tolist() == [0, 1, 4, 6, 4, 0, 5, 5, 8, 9]
    assert digits().prepare(print) is None
