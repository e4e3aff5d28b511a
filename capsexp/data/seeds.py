"""Random orders and seeds as functions of the seed, the epoch and the batch."""

import hashlib

import torch
from jaxtyping import Int64
from torch import Tensor


def derive_seed(*keys: int | str) -> int:
    """Return a seed of 63 bits for the random stream with these keys: (seed, epoch, batch, purpose)."""
    # Python's hash() of a string changes from process to process.
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def epoch_order(count: int, *, seed: int, epoch: int) -> Int64[Tensor, " N"]:
    """Return the order of an epoch, drawn on the CPU so that it is the same on every device."""
    return permutation(count, derive_seed(seed, epoch, "order"))


def permutation(count: int, seed: int) -> Int64[Tensor, " N"]:
    """Return a random permutation of 0 … count - 1, drawn on the CPU."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
