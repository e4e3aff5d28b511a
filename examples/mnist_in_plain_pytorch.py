"""Train capsules in a plain PyTorch loop: capsexp's layers, routing and loss, without its trainer or Hydra.

capsexp data prepare mnist
python examples/mnist_in_plain_pytorch.py            # about 98.5 % after one epoch
python examples/mnist_in_plain_pytorch.py digits 10  # scikit-learn's digits, 10 epochs, no download
"""

import sys

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import capsexp


class CapsNet(nn.Module):
    """A small CapsNet for images of 28x28: convolution, primary capsules, one capsule per class."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 64, kernel_size=9)  # 28x28 -> 20x20
        self.primary_caps = capsexp.PrimaryCaps(64, types=8)  # 20x20 -> 6x6 positions of 8 capsules
        self.class_caps = capsexp.ClassCaps(6 * 6 * 8, 8, 10, 16, routing=capsexp.make("routing/dynamic"))

    def forward(self, images: Tensor) -> Tensor:
        """Return the lengths of the class capsules, [B, 10]."""
        return self.class_caps(self.primary_caps(self.conv(images).relu())).activations


def load(name: str, split: str) -> TensorDataset:
    """Load a split of a dataset as images in [0, 1] of 28x28 and labels."""
    images, labels = capsexp.make(f"dataset/{name}", preprocess={"resize": 28}).read(split)
    return TensorDataset(images.float() / 255, labels)


def accuracy(net: nn.Module, test: TensorDataset) -> float:
    """Return the fraction of test images that are classified correctly."""
    with torch.no_grad():
        correct = [(net(images).argmax(1) == labels).sum().item() for images, labels in DataLoader(test, 500)]
    return sum(correct) / len(test)


def main(name: str = "mnist", epochs: int = 1) -> float:
    """Train and return the test accuracy."""
    torch.manual_seed(0)
    train, test = load(name, "train"), load(name, "test")
    net = CapsNet()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for epoch in range(epochs):
        for images, labels in DataLoader(train, batch_size=64, shuffle=True):
            loss = capsexp.margin_loss(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: test accuracy {100 * accuracy(net, test):.2f} %", flush=True)
    return accuracy(net, test)


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
