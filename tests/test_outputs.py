"""Files that the user names, as with -o: written through links, into devices and pipes, or not at all."""

import io
import os
import sys
import threading

import pytest

from capsexp import files
from capsexp.cli import entry
from capsexp.errors import UserError
from capsexp.outputs import require_output, write_output


def test_a_link_is_written_through_and_stays(tmp_path):
    (tmp_path / "folder").mkdir()
    for name, target in (("a", "folder/new"), ("b", "folder/old"), ("c", "b")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "folder" / "old").write_bytes(b"old")
    for name in ("a", "c"):
        write_output(tmp_path / name, b"content")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_bytes() == b"content"
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["new", "old"]


def test_a_pipe_is_written_into_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_output(tmp_path / "pipe", b"x" * 100_000)
    reader.join()
    assert received == [b"x" * 100_000]
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("link", [False, True])
def test_a_device_is_written_into_and_stays(link, tmp_path):
    path = tmp_path / "null"
    path.symlink_to(os.devnull)
    write_output(path if link else files.Path(os.devnull), b"x")
    assert files.Path(os.devnull).is_char_device()
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"):
        write_output(files.Path("/dev/full"), b"x" * 10**6)


def places(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere/x")
    names = ("folder", "missing/x", "file/x", "loop", "gone", "n" * 300)
    return [
        *(tmp_path / name for name in names),
        files.Path("/proc/report.html"),
        files.Path("/proc/version"),
    ]


@pytest.mark.parametrize("index", range(8))
def test_a_place_that_cannot_be_written_is_one_line_and_stays_as_it_is(index, tmp_path):
    path = places(tmp_path)[index]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        write_output(path, b"content")
    (line,) = error.value.problems
    assert line.startswith(f"cannot write {path}: ")
    assert "\n" not in line
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_file_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="Permission denied"):
        require_output(tmp_path / "file")


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"file: No space left on device"):
        write_output(tmp_path / "file", b"content")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("option", ["report -o", "compare --plot"])
def test_no_option_writes_where_it_cannot(option, write_run, capsexp, tmp_path):
    write_run("outputs/one", validation=[0.5])
    for place in ("/proc/a.png", tmp_path / "missing" / "a.png", tmp_path / "outputs.png"):
        (tmp_path / "outputs.png").mkdir(exist_ok=True)
        code, _, error = capsexp(*option.split(), place)
        assert code == 2
        assert error.count("\n") == 1
        assert error.startswith("capsexp: ")
        assert str(place) in error or str(tmp_path / "missing") in error


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize(
    "command", [["--help"], ["runs"], ["compare"], ["compare", "--md"], ["compare", "--csv"], ["report"]]
)
def test_a_terminal_without_utf8_gets_other_signs(encoding, command, write_run, tmp_path, monkeypatch):
    for name in ("größe", "犬", b"\xff".decode(errors="surrogateescape")):
        write_run(
            f"outputs/{name}", {"loss.name": name}, choices={"model": name}, status="failed", error=name
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAPSEXP_OUTPUTS", raising=False)
    monkeypatch.setattr(sys, "argv", ["capsexp", *command])
    outputs = [io.BytesIO(), io.BytesIO()]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(outputs[0], encoding=encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(outputs[1], encoding=encoding))
    assert entry.main() == 0
    sys.stdout.flush()
    shown = outputs[0].getvalue().decode(encoding)
    if command[0] in ("runs", "compare"):
        assert ("größe" in shown) == (encoding != "ascii")
        assert ("犬" in shown) == (encoding == "utf-8")
        assert shown.count("\\udcff") >= 1
