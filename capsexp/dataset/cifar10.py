"""CIFAR-10: small color photographs, 32x32."""

import torch
from torchvision import datasets

from capsexp.data.checked_files import RemoteFile, StoredFile
from capsexp.data.published import PublishedDataset
from capsexp.data.split import Split, SplitName

FOLDER = "cifar-10-batches-py/"
CHECKSUMS = {
    "batches.meta": "f962466ef690d46b226450fb9aadc74ba4bc64a76aa526b5827fe4bc5c7125cb",
    "data_batch_1": "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd",
    "data_batch_2": "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8",
    "data_batch_3": "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9",
    "data_batch_4": "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b",
    "data_batch_5": "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154",
    "test_batch": "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831",
}


class CIFAR10(PublishedDataset):
    """50,000 training and 10,000 test images in 10 classes."""

    name = "cifar10"
    training_size = 50_000
    classes = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    file_shape = (3, 32, 32)
    test_count = 10_000
    files = (
        RemoteFile(
            "cifar-10-python.tar.gz",
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            tuple(StoredFile(FOLDER + name, f"sha256:{sha256}") for name, sha256 in CHECKSUMS.items()),
        ),
    )

    def _needs(self, stored: StoredFile, split: SplitName) -> bool:
        return stored.name.endswith("meta") or ("test" in stored.name) == (split == "test")

    def _load(self, split: SplitName) -> Split:
        # The files are pickles: never open an unverified one.
        self._verified(split)
        source = datasets.CIFAR10(self.root, train=split == "train", download=False)
        images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
        return Split(images, torch.tensor(source.targets, dtype=torch.int64))
