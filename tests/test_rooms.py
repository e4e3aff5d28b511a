"""Which room of capsexp may import which: a table, and a look at every import."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import capsexp

PACKAGE = Path(capsexp.__file__).parent
GROUND = {
    "capsules",
    "child",
    "documents",
    "errors",
    "files",
    "locks",
    "outputs",
    "schedule",
    "terminal",
    "text",
}  # modules that every room may import
# `protocols` are the types in routing/__init__: what a layer may expect of the routing that it is given.
ROOMS = {
    "ops": set(),
    "routing": {"ops", "protocols"},
    "layer": {"ops", "protocols"},
    "model": {"ops", "layer", "protocols"},
    "loss": {"ops"},
    "data": set(),
    "dataset": {"data"},
    "config": set(),
    "training": {"ops", "data", "config", "protocols"},
    "analysis": {"ops", "layer", "data", "dataset", "config", "training", "protocols"},
    "study": {"ops", "data", "dataset", "analysis"},
    "compare": {"config", "training"},
    "cli": {"data", "config", "training", "analysis", "study", "compare", "ops"},
}
WITHOUT_TORCH = {"compare", "config", "documents", "errors", "files", "locks", "outputs", "terminal", "text"}
FREE = {"__init__", "__main__"}  # the public names, and `python -m capsexp`


def modules() -> dict[str, Path]:
    """The files of all modules, by dotted name."""
    return {
        ".".join(("capsexp", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in PACKAGE.rglob("*.py")
    }


MODULES = modules()


def room_of(name: str) -> str:
    """The room of a dotted name, or the ground-floor module itself."""
    _, room, *rest = [*name.split("."), "__init__"]
    if room == "routing" and ".".join(name.split(".")[:3]) not in MODULES and rest != ["__init__"]:
        return "protocols"
    return room


def imports(node: ast.AST) -> Iterator[str]:
    """Dotted names that run-time code imports, also inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from imports(ast.Module(child.orelse, []))
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"a relative import: {ast.unparse(child)}"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from imports(child)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_rooms_below_its_own(module):
    room = room_of(module)
    if room in FREE:
        return
    allowed = {room, *GROUND, *ROOMS.get(room, set())}
    names = imports(ast.parse(MODULES[module].read_text()))
    own = {name for name in names if name.partition(".")[0] == "capsexp"}
    assert {name for name in own if room_of(name) not in allowed} == set()


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) in WITHOUT_TORCH])
def test_these_rooms_import_torch_only_inside_functions(module):
    tree = ast.parse(MODULES[module].read_text())
    at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = imports(ast.Module(at_import, []))
    assert {name for name in names if name.partition(".")[0] in ("torch", "torchvision")} == set()


def test_the_table_has_every_room_and_no_circle():
    rooms = {room_of(module) for module in MODULES}
    assert rooms == {*ROOMS, *GROUND, *FREE}
    order: list[str] = []
    while len(order) < len(ROOMS):
        ready = [room for room in ROOMS if room not in order and ROOMS[room] - {"protocols"} <= {*order}]
        assert ready, "a circle"
        order += ready


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import capsexp.data.split as s, os", {"capsexp.data.split", "os"}),
        ("def f():\n    from capsexp.cli import entry", {"capsexp.cli.entry"}),
        ("if TYPE_CHECKING:\n    import torch\nelse:\n    import os", {"os"}),
        ("if typing.TYPE_CHECKING:\n    import torch", set()),
        ("try:\n    import torch\nexcept ImportError:\n    pass", {"torch"}),
    ],
)
def test_the_imports_that_count(code, names):
    assert set(imports(ast.parse(code))) == names


def test_the_types_of_the_routing_package_are_no_routing():
    assert room_of("capsexp.routing.BalancedRouting") == "protocols"
    assert room_of("capsexp.routing.dynamic.DynamicRouting") == room_of("capsexp.routing") == "routing"
    assert room_of("capsexp.routing.__init__") == "routing"
