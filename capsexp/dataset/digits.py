"""The 8x8 digits that scikit-learn carries: a data set without a download."""

import torch
from sklearn.datasets import load_digits

from capsexp.data.dataset import Dataset
from capsexp.data.split import Split, SplitName, stratified

TEST_SHARE = 0.2
TEST_SEED = 0
"""Fixed: the test part is the same in every run and for every setting."""


class Digits(Dataset):
    """1,438 training and 359 test pictures in 10 classes; a fixed fifth of each class is for testing."""

    name = "digits"
    classes = tuple("0123456789")
    stored_shape = (1, 8, 8)

    def _load(self, part: SplitName) -> Split:
        digits = load_digits()
        # Published as 0 … 16.
        images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
        everything = Split(images[:, None], torch.from_numpy(digits.target).to(torch.int64))
        test = stratified(everything.labels, share=TEST_SHARE, seed=TEST_SEED)
        return everything.take((test if part == "test" else ~test).nonzero().flatten())
