import gzip
import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import urllib.error
import urllib.request
from email.message import Message

import pytest

from capsexp.data import download
from capsexp.data.checked_files import RemoteFile, StoredFile, missing_files, verify
from capsexp.data.download import download_all, fetch
from capsexp.errors import DataError

CONTENT = bytes(range(256)) * 100
URL = "https://example.org/data.bin"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def plain(content=CONTENT):
    stored = StoredFile("set/data.bin", f"sha256:{sha256(content)}")
    return RemoteFile("set/data.bin", URL, sha256(content), (stored,))


def zipped(content=CONTENT, *, packed=None):
    packed = packed or gzip.compress(content, mtime=0)
    stored = StoredFile("set/data.bin", f"sha256:{sha256(content)}")
    return RemoteFile("set/data.bin.gz", URL + ".gz", sha256(packed), (stored,)), packed


def tarred(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    packed = buffer.getvalue()
    contents = tuple(StoredFile(name, f"sha256:{sha256(content)}") for name, content in members.items())
    return RemoteFile("set.tar.gz", URL + ".tar.gz", sha256(packed), contents), packed


def serve(monkeypatch, answers):
    """Serve the given bytes for each address, as urllib would; return the list of requested addresses."""
    requested = []

    def open_url(url):
        requested.append(url)
        answer = io.BytesIO(answers[url])
        answer.headers = {"Content-Length": str(len(answers[url]))}
        return answer

    monkeypatch.setattr(download, "open_url", open_url)
    return requested


def ignore(activity, done, total):
    pass


def get(root, *files, online=True, progress=None, damaged=()):
    download_all(root, files, dataset="toy", online=online, progress=progress, damaged=damaged)


def names(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_a_file_is_downloaded_and_verified(tmp_path, monkeypatch):
    serve(monkeypatch, {URL: CONTENT})
    calls = []
    get(tmp_path, plain(), progress=lambda *call: calls.append(call))
    assert (tmp_path / "set/data.bin").read_bytes() == CONTENT
    assert names(tmp_path) == [".capsexp.lock", "set/data.bin"]
    assert calls[-1] == ("downloading set/data.bin", len(CONTENT), len(CONTENT))


def test_a_file_is_not_downloaded_twice(tmp_path, monkeypatch):
    requested = serve(monkeypatch, {URL: CONTENT})
    get(tmp_path, plain())
    get(tmp_path, plain())
    assert requested == [URL]


def test_a_gz_is_unpacked(tmp_path, monkeypatch):
    remote, packed = zipped()
    serve(monkeypatch, {remote.url: packed})
    get(tmp_path, remote)
    assert (tmp_path / "set/data.bin").read_bytes() == CONTENT


def test_a_tar_is_unpacked_and_old_temporary_folders_are_removed(tmp_path, monkeypatch):
    members = {"set/a": b"a" * 1000, "set/b": b"b" * 1000}
    remote, packed = tarred(members)
    serve(monkeypatch, {remote.url: packed})
    (tmp_path / ".unpack-killed/set").mkdir(parents=True)
    get(tmp_path, remote)
    assert {name: (tmp_path / name).read_bytes() for name in members} == members
    assert names(tmp_path) == [".capsexp.lock", "set.tar.gz", "set/a", "set/b"]
    assert not list(tmp_path.glob(".unpack-*"))


def test_an_archive_on_disk_is_unpacked_without_a_download(tmp_path, monkeypatch):
    requested = serve(monkeypatch, {})
    remote, packed = zipped()
    (tmp_path / "set").mkdir()
    (tmp_path / "set/data.bin.gz").write_bytes(packed)
    get(tmp_path, remote, online=False)
    assert (tmp_path / "set/data.bin").read_bytes() == CONTENT
    assert requested == []


def test_a_damaged_archive_on_disk_is_reported(tmp_path):
    remote, packed = zipped()
    (tmp_path / "set").mkdir()
    (tmp_path / "set/data.bin.gz").write_bytes(packed[:-5])
    message = (
        rf"missing set/data\.bin; damaged .*: set/data\.bin\.gz \({len(packed) - 5} bytes\); download it"
    )
    with pytest.raises(DataError, match=message):
        get(tmp_path, remote, online=False)
    assert missing_files(tmp_path, [remote])


def toy_forms():
    """Published files of each form, and their bytes: as they are, packed, and several in one archive."""
    remote, packed = zipped()
    yield "as it is", plain(), CONTENT
    yield "packed", remote, packed
    yield "archive", *tarred({"set/a": b"a" * 1000, "set/b": b"b" * 1000})


FORMS = {name: (remote, packed) for name, remote, packed in toy_forms()}
ERROR_PAGE = b"<html>404</html>\n"


@pytest.mark.parametrize("wrong", [ERROR_PAGE, b"", CONTENT[:100], b"\x1f\x8b\x08cut"], ids=repr)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_damaged_on_disk_is_downloaded_anew(form, wrong, tmp_path, monkeypatch):
    remote, packed = FORMS[form]
    requested = serve(monkeypatch, {remote.url: packed})
    (tmp_path / "set").mkdir()
    (tmp_path / remote.name).write_bytes(wrong)
    for stored in remote.contents:
        (tmp_path / stored.name).write_bytes(wrong)
    get(tmp_path, remote, damaged=[stored.name for stored in remote.contents])
    assert requested == [remote.url]
    for stored in remote.contents:
        verify(tmp_path / stored.name, stored.checksum)
    assert not missing_files(tmp_path, [remote])


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("damaged", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_file_whose_right_bytes_are_beside_it_needs_no_download(
    form, damaged, online, tmp_path, monkeypatch
):
    requested = serve(monkeypatch, {})
    remote, packed = FORMS[form]
    (tmp_path / "set").mkdir()
    (tmp_path / remote.name).write_bytes(packed)
    names = [stored.name for stored in remote.contents] if damaged and form != "as it is" else []
    for name in names:
        (tmp_path / name).write_bytes(ERROR_PAGE)
    get(tmp_path, remote, online=online, damaged=names)
    for stored in remote.contents:
        verify(tmp_path / stored.name, stored.checksum)
    assert requested == []


def tar_of(members):
    return gzip.decompress(tarred(members)[1])


@pytest.mark.parametrize(
    ("form", "name", "content"),
    [
        ("packed", "set/data.bin.gz", CONTENT),  # unpacked by the browser, and still called .gz
        ("packed", "set/data.bin", FORMS["packed"][1]),  # packed, without .gz
        ("as it is", "set/data.bin.gz", CONTENT),
        ("archive", "set.tar.gz", tar_of({"set/a": b"a" * 1000, "set/b": b"b" * 1000})),
        ("archive", "set.tar", tar_of({"set/a": b"a" * 1000, "set/b": b"b" * 1000})),
        ("archive", "set.tar", FORMS["archive"][1]),
    ],
)
def test_the_right_bytes_under_the_other_forms_name_are_taken(form, name, content, tmp_path, monkeypatch):
    requested = serve(monkeypatch, {})
    remote, _ = FORMS[form]
    (tmp_path / "set").mkdir()
    (tmp_path / name).write_bytes(content)
    get(tmp_path, remote, online=False, damaged=[name])
    for stored in remote.contents:
        verify(tmp_path / stored.name, stored.checksum)
    assert requested == []
    assert not list(tmp_path.rglob("*.part"))


def test_an_archive_of_other_files_in_the_other_form_is_not_taken(tmp_path):
    remote, _ = FORMS["archive"]
    (tmp_path / "set.tar").write_bytes(tar_of({"set/a": b"a" * 1000, "set/b": b"other"}))
    with pytest.raises(DataError, match="set/b is damaged or incomplete"):
        get(tmp_path, remote, online=False)
    assert missing_files(tmp_path, [remote])


def test_all_files_that_are_not_there_are_named_at_once_with_or_without_a_network(tmp_path, monkeypatch):
    def published(name):
        return plain()._replace(name=f"set/{name}", contents=(StoredFile(f"set/{name}", "sha256:0"),))

    files = [published(name) for name in "abcd"]
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a").write_bytes(ERROR_PAGE)
    message = r"missing set/b, set/c, set/d; damaged .*: set/a \(17 bytes\); download it"
    with pytest.raises(DataError, match=message):
        get(tmp_path, *files, online=False, damaged=["set/a"])

    def fail(url):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(download, "open_url", fail)
    message = r"cannot download .*set/a .*; not downloaded yet: set/b, set/c, set/d$"
    with pytest.raises(DataError, match=message):
        get(tmp_path, *files, damaged=["set/a"])
    assert (tmp_path / "set/a").read_bytes() == ERROR_PAGE


def test_a_file_that_is_not_an_archive_is_reported(tmp_path, monkeypatch):
    remote, packed = zipped(packed=b"not a gzip file")
    serve(monkeypatch, {remote.url: packed})
    with pytest.raises(DataError, match=r"data\.bin\.gz cannot be unpacked: Not a gzipped file"):
        get(tmp_path, remote)


def test_an_archive_with_wrong_content_leaves_no_file(tmp_path, monkeypatch):
    remote, packed = tarred({"set/a": b"a", "set/b": b"b"})
    remote = remote._replace(contents=(*remote.contents[:1], StoredFile("set/b", f"sha256:{sha256(b'c')}")))
    serve(monkeypatch, {remote.url: packed})
    with pytest.raises(DataError, match="set/b is damaged or incomplete"):
        get(tmp_path, remote)
    assert names(tmp_path) == [".capsexp.lock", "set.tar.gz"]


def test_an_archive_cannot_write_outside_its_folder(tmp_path, monkeypatch):
    remote, packed = tarred({"../../escaped": b"evil"})
    serve(monkeypatch, {remote.url: packed})
    root = tmp_path / "deep/root"
    with pytest.raises(DataError, match=r"cannot be unpacked: .*outside the destination"):
        get(root, remote)
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("wrong", [CONTENT[:-1], CONTENT + b"x", b"X" + CONTENT[1:], b""])
def test_a_wrong_download_is_reported_and_leaves_no_file(tmp_path, monkeypatch, wrong):
    serve(monkeypatch, {URL: wrong})
    expected = f"expected sha256 {sha256(CONTENT)}, found {sha256(wrong)} \\({len(wrong)} bytes\\)"
    with pytest.raises(DataError, match=expected):
        get(tmp_path, plain())
    assert names(tmp_path) == [".capsexp.lock"]


def test_a_partial_download_is_not_used(tmp_path, monkeypatch):
    serve(monkeypatch, {URL: CONTENT})
    (tmp_path / "set").mkdir()
    (tmp_path / "set/data.bin.part").write_bytes(CONTENT * 2)
    get(tmp_path, plain())
    assert names(tmp_path) == [".capsexp.lock", "set/data.bin"]


def test_the_error_without_download_names_files_address_root_and_settings(tmp_path):
    with pytest.raises(DataError) as caught:
        get(tmp_path, plain(), online=False)
    message = str(caught.value)
    for text in ("toy", "set/data.bin", URL, str(tmp_path), "data_root=", "CAPSEXP_DATA"):
        assert text in message
    assert "capsexp data prepare toy" in message
    assert "dataset.download=true" in message
    assert "\n" not in message
    assert names(tmp_path) == []


def test_only_missing_files_are_reported(tmp_path):
    other = RemoteFile("b", "https://example.org/b", "0", (StoredFile("b", "sha256:0"),))
    (tmp_path / "b").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        get(tmp_path, plain(), other, online=False)
    assert "example.org/b" not in str(caught.value)


@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("no route to host"),
        urllib.error.HTTPError(URL, 404, "Not Found", Message(), None),
        TimeoutError("timed out"),
        ConnectionResetError("reset"),
    ],
)
def test_an_address_that_does_not_respond_is_reported(tmp_path, monkeypatch, failure):
    def fail(url):
        raise failure

    monkeypatch.setattr(download, "open_url", fail)
    with pytest.raises(DataError, match=f"cannot download {URL}: .*; put the file at .*set/data.bin by hand"):
        get(tmp_path, plain())
    if isinstance(failure, urllib.error.HTTPError):
        failure.close()


@pytest.mark.parametrize("url", ["http://example.org/data.bin", "ftp://example.org/a", "file:///etc/hosts"])
def test_only_https_is_allowed(tmp_path, url):
    with pytest.raises(DataError, match=f"refusing to download over anything but https, got {url}"):
        fetch(plain()._replace(url=url), tmp_path, ignore)
    assert names(tmp_path) == []


def test_redirects_are_followed_only_to_https():
    handler, request = download._HttpsOnly(), urllib.request.Request(URL)
    arguments = (request, io.BytesIO(), 302, "Found", Message())
    assert handler.redirect_request(*arguments, "https://example.org/b").full_url == "https://example.org/b"
    with pytest.raises(DataError, match=r"anything but https, got http://example\.org/b"):
        handler.redirect_request(*arguments, "http://example.org/b")


def test_open_url_uses_the_handler_for_redirects(monkeypatch):
    openers = []
    real = urllib.request.build_opener
    monkeypatch.setattr(
        urllib.request.OpenerDirector, "open", lambda opener, *_, **__: openers.append(opener)
    )
    monkeypatch.setattr(urllib.request, "build_opener", real)
    download.open_url(URL)
    redirectors = [h for h in openers[0].handlers if isinstance(h, urllib.request.HTTPRedirectHandler)]
    assert [type(handler) for handler in redirectors] == [download._HttpsOnly]


def test_a_root_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=f"cannot prepare toy under {tmp_path}/file"):
        get(tmp_path / "file", plain())


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_verify_accepts_the_right_file_and_reports_a_flipped_bit(tmp_path, algorithm):
    path = tmp_path / "data.bin"
    path.write_bytes(CONTENT)
    right = hashlib.new(algorithm, CONTENT).hexdigest()
    verify(path, f"{algorithm}:{right}")
    flipped = bytearray(CONTENT)
    flipped[1234] ^= 1
    path.write_bytes(flipped)
    actual = hashlib.new(algorithm, flipped).hexdigest()
    message = f"data.bin is damaged or incomplete: expected {algorithm} {right}, found {actual}"
    with pytest.raises(DataError, match=message):
        verify(path, f"{algorithm}:{right}")


def test_verify_reports_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*absent: No such file"):
        verify(tmp_path / "absent", "sha256:0")


SLOW_DOWNLOAD = """
    import io, sys, time
    from pathlib import Path
    from capsexp.data import download
    from capsexp.data.checked_files import RemoteFile, StoredFile
    from capsexp.data.download import download_all

    class Slow(io.BytesIO):
        headers = {}
        def read(self, size):
            print("read", flush=True)
            time.sleep(0.2)
            return super().read(10)

    root, content = Path(sys.argv[1]), b"0123456789" * 5
    download.open_url = lambda url: Slow(content)
    stored = StoredFile("data.bin", "sha256:" + sys.argv[2])
    download_all(root, [RemoteFile("data.bin", "https://example.org", sys.argv[2], (stored,))],
           dataset="toy", online=True, progress=None)
"""


def python(code, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_download_leaves_neither_a_final_file_nor_a_lock(tmp_path, monkeypatch):
    content = b"0123456789" * 5
    process = python(SLOW_DOWNLOAD, tmp_path, sha256(content))
    assert [process.stdout.readline() for _ in range(3)] == ["read\n"] * 3
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert names(tmp_path) == [".capsexp.lock", "data.bin.part"]
    serve(monkeypatch, {URL: content})
    get(
        tmp_path,
        plain(content)._replace(
            name="data.bin", contents=(StoredFile("data.bin", f"sha256:{sha256(content)}"),)
        ),
    )
    assert (tmp_path / "data.bin").read_bytes() == content
    assert not (tmp_path / "data.bin.part").exists()


def test_of_two_processes_one_downloads_and_the_other_waits(tmp_path):
    content = b"0123456789" * 5
    processes = [python(SLOW_DOWNLOAD, tmp_path, sha256(content)) for _ in range(2)]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(output.count("read") for output in outputs) == [0, 6]
    assert (tmp_path / "data.bin").read_bytes() == content


def test_a_download_waits_for_the_lock(tmp_path, monkeypatch):
    serve(monkeypatch, {URL: CONTENT})
    code = """
        import sys, time
        from pathlib import Path
        from capsexp.data.download import LOCK
        from capsexp.locks import locked
        with locked(Path(sys.argv[1], LOCK), wait=True):
            print("locked", flush=True)
            time.sleep(0.5)
            Path(sys.argv[1], "slept").touch()
    """
    process = python(code, tmp_path)
    assert process.stdout.readline() == "locked\n"
    get(tmp_path, plain())
    assert (tmp_path / "slept").exists()
    process.communicate()
