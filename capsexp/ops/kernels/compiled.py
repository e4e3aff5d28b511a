"""The C++ of this folder as a shared library, built on first use."""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from capsexp.files import read_regular, sweep_unfinished, write_atomic
from capsexp.locks import locked

SOURCES = [Path(__file__).with_name(name) for name in ("em.cpp", "vb.cpp", "heinsen.cpp", "dynamic.cpp")]
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
# Apple's clang has no OpenMP: on a Mac the kernels run on one thread.
THREADS = ["-fopenmp"] if sys.platform.startswith("linux") else []
FLAGS = [
    *THREADS,
    "-O3",
    "-std=c++17",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
]
COMPILERS = ("g++", "clang++", "c++")


class NotBuiltError(RuntimeError):
    """The library is not available; the message says what is missing."""


def compiler() -> str | None:
    """The C++ compiler to build with: $CXX, or the first installed one of COMPILERS; None without any."""
    return next(
        (path for name in (os.environ.get("CXX"), *COMPILERS) if name and (path := shutil.which(name))), None
    )


def architecture() -> str:
    """The processors to build for, as the compiler's -march: $CAPSEXP_MARCH, or this one."""
    return os.environ.get("CAPSEXP_MARCH") or "native"


def library_path() -> Path:
    """Path of the library built from this source, with these flags, for these processors."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/capsexp/kernels"
    text = "".join(path.read_text() for path in (*SOURCES, *HEADERS))
    described = text + " ".join(FLAGS) + platform.machine() + architecture()
    if architecture() == "native":
        described += _processor()
    key = hashlib.sha256(described.encode()).hexdigest()[:16]
    return Path(folder).expanduser() / f"capsexp_{key}.so"


@functools.cache
def library() -> ctypes.CDLL:
    """Return the library; build it if it does not exist, or if its file is damaged.

    Raises:
        NotBuiltError: no compiler, no writable folder, a compiler error, a file that is no library.
    """
    path = library_path()
    if not _is_whole(path):
        _build(path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NotBuiltError(f"{path} cannot be loaded ({error}): remove it") from None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def library_problem(cost: str) -> str | None:
    """Why there is no library, or None. The first call prints it to stderr.

    Args: cost: what happens without the library, for the printed line.
    """
    return _library_problem(cost)


@functools.cache
def _library_problem(cost: str) -> str | None:
    try:
        library()
    except NotBuiltError as error:
        print(f"capsexp: {cost}: {error}", file=sys.stderr, flush=True)
        return str(error)
    return None


def _is_whole(path: Path) -> bool:
    """Whether the library is the file that was built. A shortened one would end the process with SIGBUS."""
    try:
        return _checksum(path) == read_regular(path.with_suffix(".sha256"), limit=64).decode()
    except (OSError, ValueError):
        return False


def _checksum(path: Path) -> str:
    return hashlib.sha256(read_regular(path)).hexdigest()


def _build(path: Path) -> None:
    cxx = compiler()
    if cxx is None:
        raise NotBuiltError("there is no C++ compiler: install g++, or name one in CXX")
    if not _works(cxx):
        raise NotBuiltError(f"{cxx} is no C++ compiler that works: name another one in CXX")
    if importlib.util.find_spec("ninja") is None:
        raise NotBuiltError("there is no ninja: pip install ninja")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock"), wait=True):
            if not _is_whole(path):  # another process may have built it by now
                _compile(path, cxx)
    except OSError as error:
        reason = error.strerror or error
        raise NotBuiltError(f"{path.parent} cannot be written ({reason}): set TORCH_EXTENSIONS_DIR") from None


def _works(cxx: str) -> bool:
    try:
        return subprocess.run([cxx, "--version"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _compile(path: Path, cxx: str) -> None:
    from torch.utils import cpp_extension

    print(f"capsexp: building the routing for this processor with {cxx}, once; about a minute …",
          file=sys.stderr, flush=True)  # fmt: skip
    start = time.monotonic()
    for leftover in path.parent.glob(f"{path.stem}-*"):  # of a build that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    sweep_unfinished(path.parent)
    with tempfile.TemporaryDirectory(prefix=f"{path.stem}-", dir=path.parent) as folder, _environment(cxx):
        try:
            cpp_extension.load(
                path.stem,
                [str(path) for path in SOURCES],
                extra_cflags=[*FLAGS, f"-march={architecture()}"],
                extra_ldflags=THREADS,
                build_directory=folder,
                is_python_module=False,
            )
        except (RuntimeError, subprocess.SubprocessError) as error:
            raise NotBuiltError(f"{cxx} failed: {_reason(error)}") from None
        built = next(Path(folder).glob("*.so")).read_bytes()
    # The checksum comes last: without it the library counts as damaged.
    write_atomic(path, lambda file: file.write(built))
    write_atomic(path.with_suffix(".sha256"), lambda file: file.write(_checksum(path).encode()))
    print(f"capsexp: built in {time.monotonic() - start:.0f} s: {path}", file=sys.stderr, flush=True)


def _reason(error: Exception) -> str:
    """Return the first line of the compiler's output that names an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[0] if lines else type(error).__name__)


@contextlib.contextmanager
def _environment(cxx: str) -> Iterator[None]:
    """Set CXX, and put ninja on the PATH even if the virtual environment is not activated."""
    import ninja

    before = {name: os.environ.get(name) for name in ("CXX", "PATH")}
    os.environ["CXX"] = cxx
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _processor() -> str:
    """The processor that -march=native builds for: machines may share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return " ".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
