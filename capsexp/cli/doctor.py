"""`capsexp doctor`: what this machine has, and what it is good for."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping

import torch
from rich.console import Console
from rich.table import Table

from capsexp.data.dataset import Dataset
from capsexp.data.prepare import list_datasets
from capsexp.ops.kernels.compiled import compiler, library_path
from capsexp.training.device import available, best, has_tunable_allocator
from capsexp.training.run_dir import PACKAGES


def report(datasets: Mapping[str, Dataset]) -> None:
    """Print versions, devices, data sets, compiler and allocator, each with what it enables."""
    table = Table("part", "found", "what follows")
    for row in (*_versions(), *_devices(), _compiler(), _library(), _allocator(), *_data(datasets)):
        table.add_row(*row)
    Console().print(table)


def _versions() -> list[tuple[str, str, str]]:
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return [("python", platform.python_version(), platform.platform()), ("packages", found, "")]


def _devices() -> list[tuple[str, str, str]]:
    rows = []
    for name, is_there in available().items():
        use = f"device={name}" + (", what device=auto takes here" if name == best() else "")
        rows.append(
            (name, _detail(name) if is_there else "no", use if is_there else f"device={name} is refused")
        )
    return rows


def _detail(name: str) -> str:
    if name == "cuda":
        return ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    if name == "cpu":
        instructions = torch.backends.cpu.get_cpu_capability()
        return f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {instructions}"
    return "yes"


def _compiler() -> tuple[str, str, str]:
    found = compiler()
    if found is None:
        return ("compiler", "none", "no fused routing and no trainer.compile=true on the CPU: install g++")
    return ("compiler", found, "fused routing and trainer.compile=true work on the CPU")


def _library() -> tuple[str, str, str]:
    path = library_path()
    if path.exists():
        return ("fused routing", str(path), "built for this processor; EM and dynamic routing use it")
    builds = "built when it is first used, in half a minute"
    return ("fused routing", "not built yet", builds if compiler() else "EM routing takes the plain path")


def _allocator() -> tuple[str, str, str]:
    if has_tunable_allocator():
        name = " ".join(platform.libc_ver())
        return ("allocator", name, "device.allocator=tuned: a CPU keeps large buffers from step to step")
    return ("allocator", "not glibc", "device.allocator has no effect here")


def _data(datasets: Mapping[str, Dataset]) -> list[tuple[str, str, str]]:
    rows = []
    for row in list_datasets(datasets):
        usable = row.state in ("embedded", "present")
        command = f"dataset={row.name}" if usable else f"capsexp data prepare {row.name}"
        rows.append((f"data: {row.name}", row.state, command))
    return rows
