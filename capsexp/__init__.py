"""Capsule networks: routing algorithms, layers, losses, networks, and experiments with them.

The names are imported on first use, so `import capsexp` is fast and the command line starts without torch.
"""

import importlib

TYPE_CHECKING = False  # type checkers take it for True; typing itself takes longer to import than this file

if TYPE_CHECKING:
    from capsexp.analysis.trained_run import TrainedRun
    from capsexp.capsules import Batch, Capsules, Output, Routed
    from capsexp.config.make import make
    from capsexp.errors import UserError
    from capsexp.layer.class_caps import ClassCaps
    from capsexp.layer.decoder import Decoder
    from capsexp.layer.matrix_caps import ConvCaps, SharedClassCaps
    from capsexp.layer.matrix_primary import MatrixPrimaryCaps
    from capsexp.layer.primary import PrimaryCaps
    from capsexp.loss.margin import margin_loss
    from capsexp.loss.spread import spread_loss
    from capsexp.ops.receptive_fields import Grid
    from capsexp.ops.squash import squash
    from capsexp.routing import advance
    from capsexp.routing.dynamic import dynamic_routing
    from capsexp.routing.em import em_routing
    from capsexp.schedule import Step

    load = TrainedRun.load

__all__ = [
    "Batch",
    "Capsules",
    "ClassCaps",
    "ConvCaps",
    "Decoder",
    "Grid",
    "MatrixPrimaryCaps",
    "Output",
    "PrimaryCaps",
    "Routed",
    "SharedClassCaps",
    "Step",
    "TrainedRun",
    "UserError",
    "advance",
    "dynamic_routing",
    "em_routing",
    "load",
    "make",
    "margin_loss",
    "spread_loss",
    "squash",
]

_MODULES = {
    "Batch": "capsules",
    "Capsules": "capsules",
    "ClassCaps": "layer.class_caps",
    "ConvCaps": "layer.matrix_caps",
    "Decoder": "layer.decoder",
    "Grid": "ops.receptive_fields",
    "MatrixPrimaryCaps": "layer.matrix_primary",
    "Output": "capsules",
    "PrimaryCaps": "layer.primary",
    "Routed": "capsules",
    "SharedClassCaps": "layer.matrix_caps",
    "Step": "schedule",
    "TrainedRun": "analysis.trained_run",
    "UserError": "errors",
    "advance": "routing",
    "dynamic_routing": "routing.dynamic",
    "em_routing": "routing.em",
    "make": "config.make",
    "margin_loss": "loss.margin",
    "spread_loss": "loss.spread",
    "squash": "ops.squash",
}


def __getattr__(name: str) -> object:
    value: object
    if name == "load":
        from capsexp.analysis.trained_run import TrainedRun

        value = TrainedRun.load
    elif name in _MODULES:
        value = getattr(importlib.import_module(f"capsexp.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module 'capsexp' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
