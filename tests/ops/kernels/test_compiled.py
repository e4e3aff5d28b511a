import ctypes
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capsexp.ops.kernels import compiled
from capsexp.ops.kernels.compiled import NotBuiltError

LOAD = Path(__file__).with_name("load_library.py")
needs_compiler = pytest.mark.skipif(compiled.compiler() is None, reason="needs a C++ compiler")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """An empty cache of kernels, and a source that compiles fast."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    source = tmp_path / "em.cpp"
    source.write_text('extern "C" int em_forward(const void *) { return 7; }\n')
    monkeypatch.setattr(compiled, "SOURCES", [source])
    compiled.library.cache_clear()
    yield tmp_path / "cache"
    compiled.library.cache_clear()


def starting(source, cache, **environment):
    return subprocess.Popen(
        [sys.executable, LOAD, source],
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@needs_compiler
def test_the_library_is_built_once_and_says_so(empty_cache, capfd):
    assert compiled.library().em_forward(None) == 7
    progress = capfd.readouterr().err
    assert "building the routing" in progress
    assert str(compiled.library_path()) in progress
    compiled.library.cache_clear()
    assert compiled.library().em_forward(None) == 7
    assert capfd.readouterr().err == ""
    files = {compiled.library_path().with_suffix(suffix) for suffix in (".so", ".sha256", ".lock")}
    assert {*empty_cache.iterdir()} == files


@needs_compiler
def test_another_source_other_flags_or_another_architecture_are_another_library(empty_cache, monkeypatch):
    first = compiled.library_path()
    with monkeypatch.context() as patch:
        patch.setenv("CAPSEXP_MARCH", "x86-64-v4")
        assert compiled.library_path() != first
    monkeypatch.setattr(compiled, "FLAGS", [*compiled.FLAGS, "-DX"])
    second = compiled.library_path()
    compiled.SOURCES[0].write_text('extern "C" int em_forward(const void *) { return 8; }\n')
    assert len({first, second, compiled.library_path()}) == 3


@needs_compiler
def test_the_library_is_built_for_the_architecture_that_is_named(empty_cache, monkeypatch):
    monkeypatch.setenv("CAPSEXP_MARCH", "none-such")
    with pytest.raises(NotBuiltError, match="none-such"):
        compiled.library()


def test_a_library_for_a_named_architecture_is_shared_by_all_its_processors(monkeypatch):
    monkeypatch.setenv("CAPSEXP_MARCH", "x86-64-v3")
    path = compiled.library_path()
    monkeypatch.setattr(compiled, "_processor", lambda: "another")
    assert compiled.library_path() == path
    monkeypatch.setenv("CAPSEXP_MARCH", "native")
    assert compiled.library_path() != path


@needs_compiler
@pytest.mark.slow
def test_processes_that_start_at_once_build_once(empty_cache):
    processes = [starting(compiled.SOURCES[0], empty_cache) for _ in range(4)]
    outputs = [process.communicate(timeout=600) for process in processes]
    assert [out for out, _ in outputs] == ["loaded\n"] * 4
    assert sum("building" in err for _, err in outputs) == 1


@needs_compiler
@pytest.mark.slow
def test_a_build_that_was_killed_does_not_block_the_next(empty_cache, tmp_path):
    slow = tmp_path / "slow"
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *-c*) touch {tmp_path}/begun; sleep 600;; esac\nexec g++ "$@"\n'
    )
    slow.chmod(0o755)
    killed = starting(compiled.SOURCES[0], empty_cache, CXX=str(slow))
    deadline = time.monotonic() + 500
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    begun = time.monotonic()
    assert compiled.library().em_forward(None) == 7
    assert time.monotonic() - begun < 500  # less than the sleep
    assert not list(empty_cache.glob("*/"))


@pytest.fixture
def built(empty_cache, monkeypatch):
    """A library and its checksum, and lists of the builds and of what was loaded."""
    path, content, load = compiled.library_path(), bytes(5000), ctypes.CDLL

    def build(target, cxx):
        builds.append(cxx)
        write(target)

    def write(target):
        target.write_bytes(content)
        target.with_suffix(".sha256").unlink(missing_ok=True)
        target.with_suffix(".sha256").write_text(hashlib.sha256(content).hexdigest())

    builds, loaded = [], []
    empty_cache.mkdir()
    write(path)
    monkeypatch.setattr(compiled, "_compile", build)
    monkeypatch.setattr(compiled, "compiler", lambda: sys.executable)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: loaded.append(Path(name).read_bytes()) or load(None))
    return path, content, builds, loaded


def cut_short(path):
    path.write_bytes(path.read_bytes()[:4096])


def emptied(path):
    path.write_bytes(b"")


def one_bit_flipped(path):
    path.write_bytes(b"\1" + path.read_bytes()[1:])


def removed(path):
    path.unlink()


def of_a_version_without_checksums(path):
    path.with_suffix(".sha256").unlink()


def checksum_cut_short(path):
    path.with_suffix(".sha256").write_text("12")


def checksum_no_text(path):
    path.with_suffix(".sha256").write_bytes(b"\xff" * 64)


def checksum_a_pipe(path):
    path.with_suffix(".sha256").unlink()
    os.mkfifo(path.with_suffix(".sha256"))


DAMAGE = [cut_short, emptied, one_bit_flipped, removed, of_a_version_without_checksums, checksum_cut_short]


@pytest.mark.parametrize("damage", [*DAMAGE, checksum_no_text, checksum_a_pipe])
def test_a_damaged_library_is_built_anew_before_it_is_loaded(damage, built):
    path, content, builds, loaded = built
    damage(path)
    for _ in range(2):
        compiled.library()
        compiled.library.cache_clear()
    assert loaded == [content, content]
    assert len(builds) == 1


@pytest.mark.parametrize("cxx", ["/bin/false", "none-such", "a folder"])
def test_a_compiler_that_does_not_work_gives_one_line(cxx, empty_cache, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(compiled, "compiler", lambda: str(tmp_path) if cxx == "a folder" else cxx)
    compiled._library_problem.cache_clear()
    assert "is no C++ compiler that works: name another one in CXX" in compiled.library_problem("slow")
    assert "is no C++ compiler" in compiled.library_problem("slow")
    compiled._library_problem.cache_clear()
    assert capsys.readouterr().err.count("\n") == 1


def test_without_a_compiler_the_message_names_it(empty_cache, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(NotBuiltError, match=r"there is no C\+\+ compiler: install g\+\+, or name one in CXX"):
        compiled.library()


@needs_compiler
def test_an_error_of_the_compiler_is_printed(empty_cache):
    compiled.SOURCES[0].write_text("this is no C++\n")
    with pytest.raises(NotBuiltError, match="failed"):
        compiled.library()
    assert [path.suffix for path in empty_cache.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_is_named(empty_cache):
    empty_cache.write_text("a file")
    with pytest.raises(NotBuiltError, match=r"cannot be written .*: set TORCH_EXTENSIONS_DIR"):
        compiled.library()


def test_a_library_that_does_not_load_is_named(empty_cache):
    empty_cache.mkdir()
    path = compiled.library_path()
    path.write_text("no library")
    path.with_suffix(".sha256").write_text(hashlib.sha256(b"no library").hexdigest())
    with pytest.raises(NotBuiltError, match=r"cannot be loaded .*: remove it"):
        compiled.library()


def test_the_environment_is_as_it_was_after_a_build(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", "none-such")
    before = dict(os.environ)
    if compiled.compiler() is not None:
        assert isinstance(compiled.library(), ctypes.CDLL)
    assert dict(os.environ) == before
