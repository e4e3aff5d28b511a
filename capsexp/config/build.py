"""From a plain config to objects: resolve every `_target_`, bind every key, then build."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from capsexp.config.components import Components
from capsexp.config.kinds import label_problems, require_kind
from capsexp.config.settings import without_routing_copy
from capsexp.config.signature import object_problems, signature_problems
from capsexp.config.targets import resolve
from capsexp.config.trial import optimizer_problems
from capsexp.config.values import leaf_problems, root_problems
from capsexp.errors import DataError, UserError, collecting, first_line, is_number

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from capsexp.data.dataset import Dataset
    from capsexp.data.manifest import Manifest
    from capsexp.schedule import Schedule

RUN_TIME = {"model": {"image_shape", "classes"}, "optimizer": {"params"}}  # known only when a run starts
NOT_ARGUMENTS = ("_target_", "_partial_")
INIT_FROM = "init_from"
"""Key of `model` that the run reads, not the network."""
# The training loop takes the learning rate and the first weights; `_group_problems` checks both.
NOT_BOUND = {"optimizer": {"lr"}, "model": {INIT_FROM}}
REQUIRED_GROUPS = ("device", "trainer", "dataset", "loss", "optimizer", "model")


def build_components(
    config: dict[str, Any], *, plugins: Sequence[str], manifest: "Manifest | None" = None
) -> Components:
    """Check a whole config and build the components of a run.

    The network and its optimizer are built once on the `meta` device, which costs no memory, so that
    a mistake in them is reported before any work starts.

    Args:
        config: plain values, as `capsexp.config.compose.to_plain` returns them.
        plugins: further packages that `_target_` may name, from this call's command line only.
        manifest: the data of a run, whose dataset this is; None for a new run, and for other data.

    Raises:
        UserError: every problem, one line each.
    """
    by_key = _static_problems(config, plugins)
    problems = [problem for key in by_key for problem in by_key[key]]
    built: dict[str, Any] = {}
    for group in REQUIRED_GROUPS[:-1]:
        if not by_key[group]:
            try:
                if group == "dataset" and manifest is not None:
                    built[group] = build_stored(config[group], manifest, at=group, plugins=plugins)
                else:
                    built[group] = build(config[group], at=group, plugins=plugins)
                require_kind(group, built[group])
            except UserError as error:
                problems += error.problems
    problems += label_problems(built)
    new_optimizer, learning_rate = _not_built, _not_built
    if "optimizer" in built:
        try:
            new_optimizer, learning_rate = _split_learning_rate(built["optimizer"])
        except UserError as error:
            problems += error.problems
            del built["optimizer"]
    new_model: Callable[[], nn.Module] = _not_built
    if "dataset" in built and not by_key["model"] and not by_key.get("routing"):
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
        init_from=config["model"].get(INIT_FROM),
    )


def build_checked(node: Any, *, at: str, plugins: Sequence[str]) -> Any:
    """Check and build a node that belongs to no run, such as a study.

    Raises:
        UserError: every problem, one line each.
    """
    if problems := list(_node_problems(node, at, plugins)):
        raise UserError(*problems)
    return build(node, at=at, plugins=plugins)


def build(node: Any, *, at: str, plugins: Sequence[str] = (), **run_time: Any) -> Any:
    """Build what a config node describes: the nodes inside it first, then the node itself.

    Args:
        node: a dict with `_target_` and the target's keyword arguments; `_partial_: true` leaves the
            call to the code that gets the result. Any other value is returned unchanged, with the targets
            inside it built.
        at: the node's key, for messages.
        plugins: see `build_components`.
        run_time: arguments that no config can have, such as the shape of the images.

    Raises:
        UserError: a constructor refused a value.
    """
    if isinstance(node, list):
        return [build(item, at=f"{at}[{place}]", plugins=plugins) for place, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    others = {INIT_FROM, *NOT_ARGUMENTS} if at == "model" else NOT_ARGUMENTS
    keys = (key for key in node if key not in others)
    arguments = {key: build(node[key], at=f"{at}.{key}", plugins=plugins) for key in keys}
    if "_target_" not in node:
        return arguments
    target = resolve(node["_target_"], plugins=plugins)
    nodes = {key: arguments[key] for key in arguments if isinstance(node[key], dict)}
    if problems := list(object_problems(target, nodes, at)):
        raise UserError(*problems)
    construct = _with_key_in_errors(target, at)
    if node.get("_partial_"):
        return functools.partial(construct, **arguments, **run_time)
    return construct(**arguments, **run_time)


def build_stored(node: dict[str, Any], manifest: "Manifest", *, at: str, plugins: Sequence[str]) -> Any:
    """Build the dataset of a run, and the source of a derived one, from its node and what the run stored."""
    target = resolve(node["_target_"], plugins=plugins)
    if not hasattr(target, "from_manifest"):  # a plugin's class that is no `Dataset`
        return build(node, at=at, plugins=plugins)
    arguments = {}
    for key in (key for key in node if key not in NOT_ARGUMENTS):
        if key == "source" and isinstance(node[key], dict):
            arguments[key] = build_stored(node[key], manifest, at=f"{at}.{key}", plugins=plugins)
        else:
            arguments[key] = build(node[key], at=f"{at}.{key}", plugins=plugins)
    return _with_key_in_errors(target.from_manifest, at)(manifest=manifest, **arguments)


def _with_key_in_errors(target: Callable[..., Any], at: str) -> Callable[..., Any]:
    """Wrap the target: its errors about arguments become a UserError that begins with the config key."""
    signature = inspect.signature(target)

    @functools.wraps(target, updated=())
    def construct(*arguments: Any, **keywords: Any) -> Any:
        try:
            signature.bind(*arguments, **keywords)
        except TypeError as error:  # a partial's arguments are complete only here
            raise UserError(f"{at}: {target.__name__}: {error}") from error
        return _report_all(lambda: target(*arguments, **keywords), at)

    return construct


def _report_all(construct: Callable[[], Any], at: str) -> Any:
    """Construct a component; all of its problems become one UserError."""
    inner: list[str] = []  # of components inside it, which begin with their own keys
    built, cause = None, None
    with collecting() as problems:
        try:
            built = construct()
        except DataError as error:
            problems += error.problems
        except UserError as error:
            inner += error.problems
        except (ValueError, OverflowError) as error:
            cause = error
            if not problems:  # else it may follow from them
                problems.append(first_line(error))
    if problems or inner:
        raise UserError(*(f"{at}: {problem}" for problem in problems), *inner) from cause
    return built


def _static_problems(config: dict[str, Any], plugins: Sequence[str]) -> dict[str, list[str]]:
    """Return the problems that show without building anything, by top-level key."""
    by_key = {key: list(_node_problems(node, key, plugins)) for key, node in config.items()}
    for group in REQUIRED_GROUPS:
        by_key[group] = [*_group_problems(config.get(group), group), *by_key.get(group, [])]
    model = config.get("model")
    by_key["seed"] = list(root_problems({"seed": config.get("seed")}))
    if config.get("routing") is not None and isinstance(model, dict):
        if "routing" not in model:
            by_key["routing"] = [
                "routing: the chosen model has no routing; leave it out, or choose another model"
            ]
        elif "routing" not in without_routing_copy(config)["model"]:  # reported once, as `routing`
            by_key["model"] = [line for line in by_key["model"] if not line.startswith("model.routing.")]
        if not config["routing"].get("_partial_"):
            by_key["routing"] = [
                "routing._partial_: must be true: the layer adds in_caps, out_caps and pose_dim"
            ]
    return by_key


def _group_problems(node: Any, group: str) -> Iterator[str]:
    """Yield the problems of a required group's node that do not depend on its target."""
    if not isinstance(node, dict) or "_target_" not in node:
        yield f"{group}: nothing is chosen; choose with {group}=OPTION"
    elif bool(node.get("_partial_")) is not (group == "optimizer"):
        yield f"{group}._partial_: must be {str(group == 'optimizer').lower()} for this group"
    elif group == "optimizer" and not _is_rate(node.get("lr")):
        yield f"optimizer.lr: must be a number or a schedule, got {node.get('lr')!r}"
    elif group == "optimizer":
        yield from leaf_problems(node["lr"], "optimizer.lr")
    elif group == "model" and not isinstance(node.get(INIT_FROM), str | None):
        yield f"model.{INIT_FROM}: must be the directory of a run, or null, got {node[INIT_FROM]!r}"


def _is_rate(value: Any) -> bool:
    return is_number(value) or (isinstance(value, dict) and "_target_" in value)


def _node_problems(node: Any, at: str, plugins: Sequence[str]) -> Iterator[str]:
    """Yield the problems of the keys and types of a node and of all nodes inside it."""
    if isinstance(node, list):
        node = {str(place): item for place, item in enumerate(node)}
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        yield from _node_problems(value, f"{at}.{key}", plugins)
    if "_target_" not in node:
        return
    if not isinstance(node.get("_partial_", False), bool):
        yield f"{at}._partial_: must be true or false, got {node['_partial_']!r}"
    try:
        target = resolve(node["_target_"], plugins=plugins)
    except UserError as error:
        yield f"{at}._target_: {error}"
        return
    excluded = {"_target_", "_partial_"} | NOT_BOUND.get(at, set())
    arguments = {key: value for key, value in node.items() if key not in excluded}
    yield from signature_problems(
        target, arguments, at, run_time=RUN_TIME.get(at, set()), partial=bool(node.get("_partial_"))
    )


def _split_learning_rate(
    optimizer: "functools.partial[Optimizer]",
) -> "tuple[Callable[..., Optimizer], Schedule]":
    """Return the optimizer without its `lr`, which the loop sets at every step, and `lr` as a schedule.

    Raises:
        UserError: settings with which no network can learn.
    """
    from capsexp.schedule import require_some_positive, schedule_in

    keywords = dict(optimizer.keywords)
    rate = keywords.pop("lr")
    new_optimizer = functools.partial(optimizer.func, **keywords)
    with collecting() as problems:
        rate = schedule_in("[0, inf)", lr=rate)
        require_some_positive(lr=rate)
    problems += optimizer_problems(new_optimizer)
    if problems:
        raise UserError(*(f"optimizer: {problem.removeprefix('optimizer: ')}" for problem in problems))
    return new_optimizer, rate


def _build_model(config: dict[str, Any], dataset: "Dataset", plugins: Sequence[str]) -> "nn.Module":
    run_time = {"image_shape": dataset.image_shape, "classes": len(dataset.classes)}
    node = without_routing_copy(config)["model"]
    if "routing" in config["model"] and "routing" not in node:  # so that its errors begin with `routing`
        run_time["routing"] = build(config["routing"], at="routing", plugins=plugins)
    return build(node, at="model", plugins=plugins, **run_time)


def _meta_problems(
    new_model: "Callable[[], nn.Module]",
    new_optimizer: "Callable[..., Optimizer] | None",
    learning_rate: "Schedule",
) -> Iterator[str]:
    """Yield the problems that show when the network and its optimizer are built on the `meta` device."""
    import torch

    from capsexp.schedule import Step

    try:
        with torch.device("meta"):
            model = new_model()
        require_kind("model", model)
        if new_optimizer is not None:
            new_optimizer(model.parameters(), lr=learning_rate(Step(0, 1)))
    except UserError as error:
        yield from error.problems
    except RuntimeError as error:  # of torch, about sizes
        yield f"model: {first_line(error)}"


def _not_built(*arguments: Any, **keywords: Any) -> Any:
    raise AssertionError("a component that could not be built was used")
