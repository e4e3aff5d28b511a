"""The 8x8 digits that scikit-learn includes: a dataset without a download."""

import torch
from sklearn.datasets import load_digits

from capsexp.data.dataset import Dataset
from capsexp.data.split import Split, SplitName, stratified

TEST_SHARE = 0.2
TEST_SEED = 0
"""Fixed: the test split is the same in every run and for every setting."""

TEST_COUNT = 359


class Digits(Dataset):
    """1,438 training and 359 test images in 10 classes; a fixed fifth of each class is the test split."""

    name = "digits"
    training_size = 1_438
    classes = tuple("0123456789")
    file_shape = (1, 8, 8)

    def check_test(self) -> int:
        """Return the number of test images."""
        return TEST_COUNT

    def _load(self, split: SplitName) -> Split:
        digits = load_digits()
        # The published values are 0 … 16.
        images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
        everything = Split(images[:, None], torch.from_numpy(digits.target).to(torch.int64))
        is_test = stratified(everything.labels, share=TEST_SHARE, seed=TEST_SEED)
        return everything.take((is_test if split == "test" else ~is_test).nonzero().flatten())
