"""What a network costs: parameters, multiplications of a forward pass, and memory."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from capsexp.config.components import Components
from capsexp.errors import UserError, is_integer
from capsexp.routing import advance
from capsexp.schedule import Step
from capsexp.training.evaluate import inference
from capsexp.training.memory import peak_resident
from capsexp.training.run_dir import RunDir

ELEMENTWISE = {
    f"aten::{name}{end}" for name in ("mul", "div", "pow", "addcmul", "addcdiv") for end in ("", "_")
} | {"aten::mse_loss", "aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::_native_batch_norm_legit"}
"""Operators with one multiplication or division for each element of their result."""
COPIES = {
    f"aten::{name}"
    for name in (
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand"),
        *("squeeze", "unsqueeze", "clone", "contiguous", "as_strided", "alias", "detach", "_to_copy"),
    )
}
"""Operators whose result holds the elements of their first argument."""
PRODUCTS = {"aten::mul", "aten::mm", "aten::bmm"}
"""Operators with which an outer product makes a block-diagonal matrix of an identity."""


class Multiplications(TorchDispatchMode):
    """Count the multiplications and divisions of everything that runs inside.

    Counted: matrix products and convolutions; products, quotients, squares and normalizations of elements;
    a fused routing by its formula below, with its votes made once. Not counted: additions, comparisons,
    exponentials, logarithms, roots, and products with the zeros of a block-diagonal matrix, which
    `window_votes` makes of an identity.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.unknown: set[str] = set()
        """Operators of capsexp without a formula."""
        self._identities = WeakTensorKeyDictionary()
        """Side of each identity matrix."""
        self._blocks = WeakTensorKeyDictionary()
        """Number of blocks of each block-diagonal matrix."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and count it."""
        result = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        if name == "aten::eye":
            self._identities[result] = len(result)
        elif name in COPIES:
            self._follow(args[0], result)
        elif blocks := self._largest(self._identities, args) if name in PRODUCTS else 0:
            self._blocks[result] = blocks
        else:
            self.total += self._count(func, name, args, kwargs or {}, result)
        return result

    def _follow(self, source: Any, result: Any) -> None:
        for known in (self._identities, self._blocks):
            if isinstance(source, Tensor) and source in known:
                known[result] = known[source]

    def _count(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
        if func.overloadpacket in flop_registry:  # a multiplication and an addition are two operations
            products = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result) // 2
            return products // max(1, self._largest(self._blocks, args))
        if name in FORMULAS:
            return FORMULAS[name](args)
        if name in ELEMENTWISE:
            return int((result[0] if isinstance(result, Sequence) else result).numel())
        if name.startswith("capsexp::"):
            self.unknown.add(name)
        return 0

    @staticmethod
    def _largest(known: Mapping[Any, int], args: Sequence[Any]) -> int:
        return max((known[arg] for arg in args if isinstance(arg, Tensor) and arg in known), default=0)


def em_multiplications(args: Sequence[Any]) -> int:
    """Return the multiplications of `capsexp::em_routing`, as those below of the reference in PyTorch."""
    poses, weight, iterations, child = args[0], args[1], len(args[5]), args[7]
    return _of_gaussians(poses, weight, child, iterations, step=2, parent=2 * (iterations - 1))


def vb_multiplications(args: Sequence[Any]) -> int:
    """Return the multiplications of `capsexp::vb_routing`."""
    poses, weight, child, iterations = args[0], args[1], args[4], args[8]
    return _of_gaussians(poses, weight, child, iterations, step=1, parent=5 * iterations - 1)


def heinsen_multiplications(args: Sequence[Any]) -> int:
    """Return the multiplications of `capsexp::heinsen_routing`."""
    poses, weight, child, iterations = args[0], args[1], args[4], args[10]
    return _of_gaussians(poses, weight, child, iterations, step=3, parent=2 * (iterations - 1))


def _of_gaussians(
    poses: Tensor, weight: Tensor, child: Tensor, iterations: int, *, step: int, parent: int
) -> int:
    """Return the multiplications of a routing that fits Gaussians to votes, which are made once.

    A vote takes `side` for each of its numbers; 3 for each number and `step` for its weight in every M-step;
    1 for each number and 1 for its share in every E-step. A parent takes `parent` for each number.
    """
    batch, _, dim = poses.shape
    types, side = weight.shape[1:3]
    parents = batch * child.shape[0] * types
    per_vote = dim * side + iterations * (3 * dim + step) + (iterations - 1) * (dim + 1)
    return int(parents * (child.shape[1] * per_vote + parent * dim))


def dynamic_multiplications(args: Sequence[Any]) -> int:
    """Return the multiplications of `capsexp::dynamic_routing`: votes, weighted sums and agreements."""
    inputs, weight, iterations = args[0], args[1], args[4]
    batch, children, size = inputs.shape
    parents, dim = weight.shape[2:]
    passes = 2 * iterations - 1
    return int(batch * (children * parents * dim * (size + passes) + 2 * iterations * parents * dim))


FORMULAS: dict[str, Callable[[Sequence[Any]], int]] = {
    "capsexp::em_routing": em_multiplications,
    "capsexp::vb_routing": vb_multiplications,
    "capsexp::heinsen_routing": heinsen_multiplications,
    "capsexp::dynamic_routing": dynamic_multiplications,
}
"""Multiplications of the operators of capsexp, from their arguments. A new operator needs a formula here."""


def network_costs(components: Components) -> dict[str, int | None]:
    """Return `parameters`, the number of trained values, and `multiplications` of one image.

    They are counted on a network of its own on the CPU. `multiplications` is None where an operator has no
    formula, or where the network does not run on the CPU.
    """
    with torch.random.fork_rng(devices=()):
        model = components.new_model()
    advance(model, Step(0, 1))
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "multiplications": _multiplications(model, components),
    }


def _multiplications(model: nn.Module, components: Components) -> int | None:
    dataset = components.dataset
    images, labels = torch.zeros(1, *dataset.image_shape), torch.arange(dataset.labels_per_image)
    try:
        with inference(model), Multiplications() as counter:
            model(images, labels if len(labels) == 1 else labels.unsqueeze(0))
    except (UserError, NotImplementedError):  # such as a fused path that only the GPU has
        return None
    return None if counter.unknown else counter.total


def note_network(run: RunDir, components: Components) -> dict[str, int | None]:
    """Write `network_costs` into status.json, and return them."""
    costs = network_costs(components)
    run.update_status("running", costs={**_noted(run), **costs})
    return costs


def note_peak(run: RunDir, components: Components) -> None:
    """Write the peak memory of all attempts into status.json."""
    before, now = _noted(run), peak_memory(components.device.torch_device)
    earlier = before.get("peak_memory")
    run.update_status(
        "running", costs={**before, "peak_memory": max(now, earlier if is_integer(earlier) else 0)}
    )


def _noted(run: RunDir) -> dict[str, Any]:
    costs = run.status().get("costs")
    return costs if isinstance(costs, dict) else {}


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes, on the machine and on the GPU together."""
    on_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return peak_resident() + on_gpu


def in_words(count: int) -> str:
    """Return a large number in words: 6.49 million."""
    for size, name in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= size:
            digits = max(0, 2 - math.floor(math.log10(count / size)))
            return f"{count / size:.{digits}f} {name}"
    return str(count)
