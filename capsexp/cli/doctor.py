"""`capsexp doctor`: what is installed on this machine, and what that enables."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping

import torch

from capsexp.data.dataset import Dataset
from capsexp.data.prepare import list_datasets
from capsexp.ops.kernels.compiled import compiler, library_path
from capsexp.terminal import Table, new_console
from capsexp.training.device import available, best, has_tunable_allocator
from capsexp.training.environment import PACKAGES


def report(datasets: Mapping[str, Dataset]) -> None:
    """Print versions, devices, datasets, compiler and allocator, each with what it enables."""
    table = Table("component", "found", "use")
    for row in (*_versions(), *_devices(), _compiler(), _library(), _allocator(), *_data(datasets)):
        table.add_row(*row)
    new_console().print(table)


def _versions() -> list[tuple[str, str, str]]:
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return [("python", platform.python_version(), platform.platform()), ("packages", packages, "")]


def _devices() -> list[tuple[str, str, str]]:
    rows = []
    for name, usable in available().items():
        use = f"device={name}" + (", also the choice of device=auto" if name == best() else "")
        rows.append((name, _detail(name) if usable else "no", use if usable else f"device={name} is refused"))
    return rows


def _detail(name: str) -> str:
    if name == "cuda":
        return ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    if name == "cpu":
        instructions = torch.backends.cpu.get_cpu_capability()
        threads = torch.get_num_threads()
        return f"{os.cpu_count()} cores, {threads} thread{'s' * (threads != 1)}, {instructions}"
    return "yes"


def _compiler() -> tuple[str, str, str]:
    path = compiler()
    if path is None:
        return ("compiler", "none", "no fused routing and no trainer.compile=true on the CPU: install g++")
    return ("compiler", path, "fused routing and trainer.compile=true work on the CPU")


def _library() -> tuple[str, str, str]:
    path = library_path()
    if path.exists():
        return ("fused routing", str(path), "built for this processor; used by EM and dynamic routing")
    use = "built at its first use, in a minute" if compiler() else "EM routing uses the reference"
    return ("fused routing", "not built yet", use)


def _allocator() -> tuple[str, str, str]:
    if has_tunable_allocator():
        name = " ".join(platform.libc_ver())
        return ("allocator", name, "device.allocator=tuned reuses large buffers on the CPU")
    return ("allocator", "not glibc", "device.allocator has no effect here")


def _data(datasets: Mapping[str, Dataset]) -> list[tuple[str, str, str]]:
    rows = []
    for row in list_datasets(datasets):
        usable = row.state in ("embedded", "present")
        command = f"dataset={row.name}" if usable else f"capsexp data prepare {row.name}"
        rows.append((f"data: {row.name}", row.state, command))
    return rows
