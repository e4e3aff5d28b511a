"""Random orders and seeds as functions of the seed, the epoch and the batch."""

import hashlib

import torch
from jaxtyping import Int64
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits for the random stream that these parts name: (seed, epoch, batch, purpose)."""
    # Python's hash() of a string changes from process to process.
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def epoch_order(count: int, *, seed: int, epoch: int) -> Int64[Tensor, " N"]:
    """The order of an epoch. Drawn on the CPU, so that it is the same on every device."""
    return _permutation(count, derive_seed(seed, epoch, "order"))


def _permutation(count: int, seed: int) -> Int64[Tensor, " N"]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
