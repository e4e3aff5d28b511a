"""From a plain config to objects: judge every `_target_`, bind every key, then build.

`_target_` is the only registry, and a config must not be able to run code of its own: a run directory
can come from anybody. So a target is resolved first and the *object* is judged, by its real module and
its base class; then that same object is called. Hydra's `instantiate` resolves the name a second time,
reads further special keys, and differs between Hydra 1.3 and 1.4, which is why it is not used here.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from capsexp.config.components import Components
from capsexp.config.signature import fits, signature_problems
from capsexp.errors import UserError, nearest

# What a config may name: classes that only hold numbers, tensors and each other. Nothing that takes a
# path to load code from, a command or a pickle may be added here.
OWN_PACKAGES = ("model", "routing", "layer", "loss", "dataset", "study")
OWN_MODULES = ("schedule", "data.preprocess", "training.device", "training.trainer")
OUTSIDE = ("torch.nn.", "torch.optim.", "torchvision.transforms.", "torchvision.models.")
RUN_TIME = {"model": {"image_shape", "classes"}, "optimizer": {"params"}}  # known only when a run starts
GROUPS = ("device", "trainer", "dataset", "loss", "optimizer", "model")  # what no run can do without


def build_components(config: dict[str, Any], *, plugins: Sequence[str]) -> Components:
    """Check a whole config and build the parts of a run.

    The network and its optimiser are built once on the `meta` device, which costs no memory, so that
    a mistake in them is told before any work starts.

    Args:
        config: plain values, as `capsexp.config.compose.to_plain` returns them.
        plugins: further packages that `_target_` may name, from this call's command line only.

    Raises:
        UserError: every problem that was found, one line each.
    """
    found = _static_problems(config, plugins)
    problems = [problem for key in found for problem in found[key]]
    built: dict[str, Any] = {}
    for group in GROUPS[:-1]:
        if not found[group]:
            try:
                built[group] = build(config[group], at=group, plugins=plugins)
            except UserError as error:
                problems += error.problems
    problems += _target_problems(built)
    new_optimizer, learning_rate = _nothing, _nothing
    if "optimizer" in built:
        try:
            new_optimizer, learning_rate = _split_learning_rate(built["optimizer"])
        except ValueError as error:
            problems.append(f"optimizer.lr: {error}")
            del built["optimizer"]
    new_model: Callable[[], Any] = _nothing
    if "dataset" in built and not found["model"] and not found.get("routing"):
        new_model = functools.partial(_build_model, config, built["dataset"], tuple(plugins))
        problems += _meta_problems(new_model, new_optimizer if "optimizer" in built else None, learning_rate)
    if problems:
        raise UserError(*problems)
    return Components(
        seed=config["seed"],
        device=built["device"],
        trainer=built["trainer"],
        dataset=built["dataset"],
        loss=built["loss"],
        new_model=new_model,
        new_optimizer=new_optimizer,
        learning_rate=learning_rate,
    )


def _target_problems(built: dict[str, Any]) -> Iterator[str]:
    """A loss of one class, for pictures of several."""
    if "dataset" not in built or "loss" not in built:
        return
    dataset, loss = built["dataset"], built["loss"]
    targets = getattr(dataset, "targets", 1)
    if targets > 1 and not getattr(loss, "multi_label", False):
        name = getattr(loss, "__name__", type(loss).__name__)
        yield (
            f"loss: {name} takes one class in each picture, and {dataset.name} has {targets}: "
            "choose loss=margin or loss=sigmoid_cross_entropy"
        )


def checked_part(node: Any, *, at: str, plugins: Sequence[str]) -> Any:
    """Build a part that stands by itself, such as a study.

    Raises:
        UserError: every problem that was found, one line each.
    """
    if problems := list(_node_problems(node, at, plugins)):
        raise UserError(*problems)
    return build(node, at=at, plugins=plugins)


def build(node: Any, *, at: str, plugins: Sequence[str] = (), **run_time: Any) -> Any:
    """Build what a config node describes: its nested parts first, then the node itself.

    Args:
        node: a dict with `_target_` and the target's keyword arguments; `_partial_: true` leaves the
            call to whoever gets the result. Any other value is returned as it is, with the targets
            inside it built.
        at: the node's key, for messages.
        plugins: see `build_components`.
        run_time: arguments that no config can hold, such as the pictures' shape.

    Raises:
        UserError: a constructor refused a value.
    """
    if isinstance(node, list):
        return [build(item, at=f"{at}[{place}]", plugins=plugins) for place, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    keys = (key for key in node if key not in ("_target_", "_partial_"))
    arguments = {key: build(node[key], at=f"{at}.{key}", plugins=plugins) for key in keys}
    if "_target_" not in node:
        return arguments
    make = _naming(resolve(node["_target_"], plugins=plugins), at)
    if node.get("_partial_"):
        return functools.partial(make, **arguments, **run_time)
    return make(**arguments, **run_time)


def resolve(target: Any, *, plugins: Sequence[str] = ()) -> Any:
    """The class that a `_target_` names, if a config may name it.

    Raises:
        UserError: it is not there, or it is not allowed.
    """
    allowed = (*(f"capsexp.{name}." for name in (*OWN_PACKAGES, *OWN_MODULES)), *OUTSIDE)
    refusal = f"{target!r} may not be built from a config"
    if not isinstance(target, str) or not target.startswith((*allowed, *(f"{name}." for name in plugins))):
        raise UserError(
            f"{refusal}: allowed are classes in capsexp, torch.nn, torch.optim, torchvision.transforms "
            "and torchvision.models; name your own package on the command line with plugins=[PACKAGE]"
        )
    found = _locate(target)
    # The path may lead elsewhere through a module's imports: the object's own name is what counts.
    name = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', None)}"
    if name.startswith(tuple(f"{package}." for package in plugins)) and callable(found):
        return found
    if not inspect.isclass(found):
        raise UserError(f"{refusal}: it is {name}, which is no class")
    if name.startswith(OUTSIDE) and issubclass(found, _outside_bases()):
        return found
    if name.startswith(allowed[: -len(OUTSIDE)]):
        return found
    raise UserError(
        f"{refusal}: it is {name}, which is not a module, optimiser or schedule of those packages"
    )


def _outside_bases() -> tuple[type, ...]:
    import torch

    return (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)


def _locate(target: str) -> Any:
    parts = target.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            # Only "this prefix is no module" may be passed over: an import that fails inside is a bug.
            if error.name is None or not ".".join(parts[:end]).startswith(error.name):
                raise
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                names = [name for name in dir(found) if not name.startswith("_")]
                where = getattr(found, "__name__", type(found).__name__)
                raise UserError(f"no {target!r}: {where} has no {part!r}{nearest(part, names)}")
            found = getattr(found, part)
        return found
    raise UserError(f"no {target!r}: there is no module {parts[0]!r}")


def _naming(target: Callable[..., Any], at: str) -> Callable[..., Any]:
    """The target, whose complaints about a key or a value begin with the config key."""
    signature = inspect.signature(target)

    @functools.wraps(target, updated=())
    def make(*arguments: Any, **keywords: Any) -> Any:
        try:
            signature.bind(*arguments, **keywords)
        except TypeError as error:  # keys of a part that is completed at run time show only here
            raise UserError(f"{at}: {target.__name__}: {error}") from error
        try:
            return target(*arguments, **keywords)
        except ValueError as error:
            raise UserError(f"{at}: {error}") from error

    return make


def _static_problems(config: dict[str, Any], plugins: Sequence[str]) -> dict[str, list[str]]:
    """What can be told without building anything, by top-level key."""
    found = {key: list(_node_problems(node, key, plugins)) for key, node in config.items()}
    found |= {group: [*_group_problems(config.get(group), group), *found.get(group, [])] for group in GROUPS}
    seed, model = config.get("seed"), config.get("model")
    if not _is_seed(seed):
        found["seed"] = [f"seed: must be an integer >= 0, got {seed!r}"]
    if config.get("routing") is not None and isinstance(model, dict):
        if "routing" not in model:
            found["routing"] = [
                "routing: the chosen model has no routing; leave it out, or choose another model"
            ]
        elif model["routing"] == config["routing"]:  # judged once, under its own name
            found["model"] = [line for line in found["model"] if not line.startswith("model.routing.")]
    return found


def _group_problems(node: Any, group: str) -> Iterator[str]:
    """What a group's node lacks, whatever its target is."""
    if not isinstance(node, dict) or "_target_" not in node:
        yield f"{group}: nothing is chosen; choose with {group}=OPTION"
    elif bool(node.get("_partial_")) is not (group == "optimizer"):
        yield f"{group}._partial_: must be {str(group == 'optimizer').lower()} for this group"
    elif group == "optimizer" and not fits(node.get("lr"), float):
        yield f"optimizer.lr: must be a number or a schedule, got {node.get('lr')!r}"


def _node_problems(node: Any, at: str, plugins: Sequence[str]) -> Iterator[str]:
    """What is wrong with the keys and types of a node and of all nodes inside it."""
    if isinstance(node, list):
        node = {str(place): item for place, item in enumerate(node)}
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        yield from _node_problems(value, f"{at}.{key}", plugins)
    if "_target_" not in node:
        return
    try:
        target = resolve(node["_target_"], plugins=plugins)
    except UserError as error:
        yield f"{at}._target_: {error}"
        return
    # The learning rate is the loop's; `_group_problems` looks at it.
    apart = {"_target_", "_partial_"} | ({"lr"} if at == "optimizer" else set())
    given = {key: value for key, value in node.items() if key not in apart}
    yield from signature_problems(
        target, given, at, run_time=RUN_TIME.get(at, set()), partial=bool(node.get("_partial_"))
    )


def _is_seed(seed: Any) -> bool:
    return isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0


def _split_learning_rate(optimizer: Any) -> tuple[Callable[..., Any], Callable[..., float]]:
    """The optimiser without its `lr`, which the loop sets at every step, and that `lr` as a schedule."""
    from capsexp.schedule import as_schedule

    keywords = dict(optimizer.keywords)
    learning_rate = as_schedule(keywords.pop("lr"))
    return functools.partial(optimizer.func, **keywords), learning_rate


def _build_model(config: dict[str, Any], dataset: Any, plugins: Sequence[str]) -> Any:
    run_time = {"image_shape": dataset.image_shape, "classes": len(dataset.classes)}
    node = config["model"]
    if "routing" in node and node["routing"] == config.get("routing"):  # told about under its own name
        run_time["routing"] = build(node["routing"], at="routing", plugins=plugins)
        node = {key: value for key, value in node.items() if key != "routing"}
    return build(node, at="model", plugins=plugins, **run_time)


def _meta_problems(
    new_model: Callable[[], Any],
    new_optimizer: Callable[..., Any] | None,
    learning_rate: Callable[..., float],
) -> Iterator[str]:
    import torch

    from capsexp.schedule import Step

    try:
        with torch.device("meta"):
            model = new_model()
        if new_optimizer is not None:
            new_optimizer(model.parameters(), lr=learning_rate(Step(0, 1)))
    except UserError as error:
        yield from error.problems


def _nothing(*arguments: Any, **keywords: Any) -> Any:
    raise AssertionError("a part that could not be built was used")
