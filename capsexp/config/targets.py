"""Which classes a config may name as `_target_`.

`_target_` is the only registry, and a config must not be able to run code of its own: a run directory
can come from anybody. So a target is resolved first and the *object* is checked, by its real module and
its base class; then `capsexp.config.build` calls that same object. Hydra's `instantiate` resolves the name
a second time and reads further special keys, which is why it is not used.
"""

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

from capsexp.errors import UserError, nearest

# Classes that only hold numbers, tensors and each other. Add nothing here that takes a path to load code
# from, a command or a pickle.
OWN_PACKAGES = ("model", "routing", "layer", "loss", "dataset", "study")
OWN_MODULES = ("schedule", "data.preprocess", "training.device", "training.trainer")
OUTSIDE = ("torch.nn.", "torch.optim.", "torchvision.transforms.", "torchvision.models.")


def resolve(target: Any, *, plugins: Sequence[str] = ()) -> Any:
    """Return the class that a `_target_` names, if a config may name it.

    Args:
        target: the dotted name.
        plugins: further packages that it may be in, from this call's command line only.

    Raises:
        UserError: it does not exist, or it is not allowed.
    """
    own = tuple(f"capsexp.{name}." for name in (*OWN_PACKAGES, *OWN_MODULES))
    added = tuple(f"{name}." for name in plugins)
    refusal = f"{target!r} may not be built from a config"
    if not isinstance(target, str) or not target.startswith((*own, *OUTSIDE, *added)):
        raise UserError(
            f"{refusal}: allowed are classes in capsexp, torch.nn, torch.optim, torchvision.transforms "
            "and torchvision.models; name your own package on the command line with plugins=[PACKAGE]"
        )
    candidate = _locate(target)
    # A path may reach another object through a module's imports, so check the object's own name.
    name = f"{getattr(candidate, '__module__', None)}.{getattr(candidate, '__qualname__', None)}"
    if name.startswith(added) and callable(candidate):
        return candidate
    if not inspect.isclass(candidate):
        raise UserError(f"{refusal}: it is {name}, which is not a class")
    if name.startswith(own) or (name.startswith(OUTSIDE) and issubclass(candidate, _outside_bases())):
        return candidate
    raise UserError(
        f"{refusal}: it is {name}, which is not a module, optimizer or schedule of those packages"
    )


def _outside_bases() -> tuple[type, ...]:
    import torch

    return (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)


def _locate(target: str) -> Any:
    """Return the object of a dotted name.

    `pkgutil.resolve_name` would report an import that fails inside the module as a missing name.
    """
    names = target.split(".")
    for end in range(len(names) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(names[:end]))
        except ModuleNotFoundError as error:
            # Try a shorter prefix only if this one is not a module: an import that fails inside one is a bug.
            if error.name is None or not ".".join(names[:end]).startswith(error.name):
                raise
            continue
        for name in names[end:]:
            if not hasattr(owner, name):
                public = [attribute for attribute in dir(owner) if not attribute.startswith("_")]
                owner_name = getattr(owner, "__name__", type(owner).__name__)
                raise UserError(f"no {target!r}: {owner_name} has no {name!r}{nearest(name, public)}")
            owner = getattr(owner, name)
        return owner
    raise UserError(f"no {target!r}: there is no module {names[0]!r}")
