"""Fashion-MNIST: articles of clothing, 28x28, grayscale."""

from capsexp.data.checked_files import RemoteFile, StoredFile
from capsexp.data.published import IdxDataset

URL = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
FOLDER = "FashionMNIST/raw/"


def _file(name: str, packed: str, unpacked: str) -> RemoteFile:
    # Published checksums: sha256 for the archives, md5 for the files inside them.
    stored = StoredFile(FOLDER + name, f"md5:{unpacked}")
    return RemoteFile(f"{FOLDER}{name}.gz", f"{URL}{name}.gz", packed, (stored,))


class FashionMNIST(IdxDataset):
    """60,000 training and 10,000 test images in 10 classes."""

    name = "fashion_mnist"
    training_size = 60_000
    classes = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    files = (
        _file(
            "train-images-idx3-ubyte",
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        ),
        _file(
            "train-labels-idx1-ubyte",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "9018921c3c673c538a1fc5bad174d6f9",
        ),
        _file(
            "t10k-images-idx3-ubyte",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "8181f5470baa50b63fa0f6fddb340f0a",
        ),
        _file(
            "t10k-labels-idx1-ubyte",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            "15d484375f8d13e6eb1aabb0c3f46965",
        ),
    )
