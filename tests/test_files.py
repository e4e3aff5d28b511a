import contextlib
import io
import os
import socket
import time

import numpy as np
import pytest
from full_disk import largest_file
from PIL import Image

from capsexp.errors import UserError
from capsexp.files import (
    WriteError,
    append_line,
    open_own,
    own_folder,
    read_regular,
    require_own,
    require_writable,
    sweep_unfinished,
    write_atomic,
)


def test_a_regular_file_is_read_also_through_a_link(tmp_path):
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link") == b"text"


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "too large", "missing"])
def test_what_is_no_readable_file_is_an_error_at_once(tmp_path, kind):
    path = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "too large":
        path.write_bytes(bytes(11))
    with pytest.raises(OSError, match=r"regular|larger|directory|No such"):
        read_regular(path, limit=10)


# What capsexp does not write into


@pytest.fixture
def victim(tmp_path):
    """A file that nothing may change."""
    path = tmp_path / "victim"
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious"


def make_link(path, victim):
    path.symlink_to(victim)


def make_dangling_link(path, victim):
    path.symlink_to(victim.with_name("new"))


def make_hard_link(path, victim):
    path.hardlink_to(victim)


def make_pipe(path, victim):
    os.mkfifo(path)


def make_device(path, victim):
    path.symlink_to("/dev/full")


def make_socket(path, victim):
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
        server.bind(path.name)


NOT_OWN = [make_link, make_dangling_link, make_hard_link, make_pipe, make_device, make_socket]
not_own = pytest.mark.parametrize("make", NOT_OWN)


@not_own
@pytest.mark.parametrize(
    "write", [lambda path: append_line(path, "line"), lambda path: open_own(path, "a+"), require_own]
)
def test_nothing_but_a_file_with_one_name_is_written_into(make, write, tmp_path, victim):
    make(tmp_path / "name", victim)
    with pytest.raises(WriteError, match=f"^cannot write into {tmp_path}/name: .*(remove|replace) it"):
        write(tmp_path / "name")
    assert not (tmp_path / "new").exists()


@not_own
def test_an_atomic_write_replaces_the_name_and_not_what_it_leads_to(make, tmp_path, victim):
    make(tmp_path / "name", victim)
    write_atomic(tmp_path / "name", lambda file: file.write(b"own"))
    assert (tmp_path / "name").read_bytes() == b"own"
    assert not (tmp_path / "name").is_symlink()
    assert not (tmp_path / "new").exists()


def test_an_atomic_write_follows_no_link_at_its_temporary_name(tmp_path, victim):
    (tmp_path / f".name.{os.getpid()}.tmp").symlink_to(victim)
    write_atomic(tmp_path / "name", lambda file: file.write(b"own"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["name", "victim"]


def test_a_file_that_will_be_replaced_may_have_another_name(tmp_path, victim):
    (tmp_path / "name").hardlink_to(victim)
    require_own(tmp_path / "name", replaced=True)


def test_a_folder_that_is_a_link_or_a_file_is_refused(tmp_path, victim):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    assert own_folder(tmp_path / "new").is_dir()
    assert own_folder(tmp_path / "new").is_dir()
    for name, reason in [("link", "it is a link to elsewhere"), ("victim", "it is a file, not a folder")]:
        with pytest.raises(WriteError, match=f"^cannot write into {tmp_path}/{name}: {reason}"):
            own_folder(tmp_path / name)


def test_a_folder_that_is_gone_is_not_made_anew(tmp_path):
    with pytest.raises(WriteError, match="No such file"):
        own_folder(tmp_path / "gone" / "tb")


# A full disk: the system refuses to write more than so many bytes into a file.


def save_in_pieces(file):
    for _ in range(100):
        file.write(bytes(1000))


def save_an_image(file):
    Image.fromarray(np.random.default_rng(0).integers(256, size=(99, 99), dtype=np.uint8)).save(file, "png")


def save_an_array(file):
    np.save(file, np.ones(9999))


def save_and_hide_the_error(file):
    try:
        save_in_pieces(file)
    except OSError:
        raise RuntimeError("unexpected pos 6592 vs 6486") from None


@pytest.mark.parametrize(
    "save",
    [save_in_pieces, save_an_image, save_an_array, save_and_hide_the_error, lambda f: f.write(bytes(9999))],
)
def test_a_full_disk_is_told_as_such_and_leaves_nothing(save, tmp_path):
    (tmp_path / "name").write_text("before")
    with largest_file(5000), pytest.raises(WriteError, match=f"{tmp_path}/name: File too large .*ulimit"):
        write_atomic(tmp_path / "name", save)
    assert [path.name for path in tmp_path.iterdir()] == ["name"]
    assert (tmp_path / "name").read_text() == "before"
    write_atomic(tmp_path / "name", save_in_pieces)
    assert (tmp_path / "name").read_bytes() == bytes(100_000)


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    append_line(tmp_path / "lines", "a" * 10)
    with largest_file(20), pytest.raises(WriteError, match="File too large"):
        append_line(tmp_path / "lines", "b" * 30)
    append_line(tmp_path / "lines", "c")
    assert (tmp_path / "lines").read_text() == "a" * 10 + "\nc\n"


@pytest.mark.parametrize("number", [28, 122, 30, 13, 5])  # no space, quota, read-only, permission, I/O
def test_every_refusal_of_the_system_is_one_line_with_its_reason(number, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError) as caught:
        write_atomic(tmp_path / "name", lambda file: file.write(b"x"))
    assert caught.value.problems == (f"cannot write into {tmp_path}/name: {os.strerror(number)}",)
    assert (caught.value.errno, caught.value.strerror) == (number, os.strerror(number))
    assert list(tmp_path.iterdir()) == []


def test_another_error_while_writing_stays_what_it_is(tmp_path):
    def fail(file):
        raise KeyError("oops")

    with pytest.raises(KeyError):
        write_atomic(tmp_path / "name", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_known_before_the_work(tmp_path):
    require_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WriteError, match="No such file"):
        require_writable(tmp_path / "missing")


# What killed writes leave


def test_only_leftovers_of_own_writes_are_swept(tmp_path, victim):
    (tmp_path / ".status.json.123.tmp").write_text("half")
    (tmp_path / ".last.7.tmp").symlink_to(victim)
    for name in (".notes.tmp", "a.1.tmp", ".a.b.tmp", ".123.tmp"):
        (tmp_path / name).write_text("mine")
    (tmp_path / ".folder.1.tmp").mkdir()
    sweep_unfinished(tmp_path)
    names = {".notes.tmp", "a.1.tmp", ".a.b.tmp", ".123.tmp", ".folder.1.tmp", "victim"}
    assert {path.name for path in tmp_path.iterdir()} == names
    sweep_unfinished(tmp_path / "missing")


def test_a_write_sweeps_old_leftovers_of_its_own_file(tmp_path):
    old = time.time() - 7200
    for name in (".page.html.1.tmp", ".page.html.2.tmp", ".other.html.1.tmp"):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (old, old))
    os.utime(tmp_path / ".page.html.2.tmp")  # another process may be writing it now
    write_atomic(tmp_path / "page.html", lambda file: file.write(b"x"))
    assert {path.name for path in tmp_path.iterdir()} == {
        ".page.html.2.tmp",
        ".other.html.1.tmp",
        "page.html",
    }


def test_a_file_can_be_written_with_seeks(tmp_path):
    def write(file):
        file.write(b"0123456789")
        file.seek(2)
        file.write(b"x")
        file.seek(0, io.SEEK_END)
        assert file.tell() == 10

    write_atomic(tmp_path / "name", write)
    assert (tmp_path / "name").read_bytes() == b"01x3456789"
