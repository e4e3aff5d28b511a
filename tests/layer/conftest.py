import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Size of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [
            tensor.untyped_storage().nbytes() for tensor in tree_leaves(result) if torch.is_tensor(tensor)
        ]
        self.size = max([self.size, *sizes])
        return result


@pytest.fixture
def largest_tensor():
    return LargestTensor()
