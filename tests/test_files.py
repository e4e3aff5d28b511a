import os

import pytest

from capsexp.files import read_regular


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
