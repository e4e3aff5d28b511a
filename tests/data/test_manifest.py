"""The stored data of a run: written, read back from a file that anybody may have changed, compared."""

import dataclasses
import json
import os

import numpy as np
import pytest

from capsexp.data.manifest import FILE, ListedFile, Manifest, digest_of, hashed
from capsexp.errors import UserError

SHA = "0123456789abcdef" * 4
OTHER = "f" * 64


def listed(path, label=0, size=3, sha256=SHA):
    return ListedFile(path, label, size, sha256)


MANIFEST = Manifest(
    dataset="image_folder",
    classes=("cat", "[bold]", "Ü\udcff"),
    file_shape=(3, 6, 8),
    folder="/data/animals",
    reading={"white": None, "background": "white"},
    files={
        "train": (listed("cat/1.png"), listed("cat/2.png"), listed("Ü\udcff/a b.png", 2)),
        "validation": (),
        "test": (listed("cat/3.png"),),
    },
)
FIXED = Manifest("mnist", ("0", "1"), (1, 28, 28), fingerprints={"images": "sha256:1", "labels": "sha256:2"})


@pytest.mark.parametrize("manifest", [MANIFEST, FIXED])
def test_a_manifest_is_read_as_it_was_written(manifest, tmp_path):
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert (tmp_path / FILE).read_text().isascii()


def test_a_directory_without_a_manifest_has_none(tmp_path):
    assert Manifest.load(tmp_path) is None


def changed(**values):
    return {**json.loads(MANIFEST.to_json()), **values}


def with_file(*entry):
    return changed(files={"train": [list(entry)]})


BAD = [
    [],
    3,
    changed(format=None),
    changed(format=2),
    changed(classes=[]),
    changed(classes="ab"),
    changed(classes=["a", "a"]),
    changed(classes=["a", 3]),
    changed(classes=["a", ""]),
    changed(file_shape=[1, 2]),
    changed(file_shape=[1, 2, 0]),
    changed(file_shape=[1, 2, True]),
    changed(file_shape=[1, 2, 1e300]),
    changed(labels_per_image="2"),
    changed(dataset=None),
    changed(folder=7),
    changed(reading=[]),
    changed(fingerprints={"a": 1}),
    changed(files=[]),
    changed(files={"other": []}),
    changed(files={"train": {}}),
    {key: value for key, value in changed().items() if key != "files"},
    with_file("a.png", 0, 3),
    with_file("/etc/passwd", 0, 3, SHA),
    with_file("../a.png", 0, 3, SHA),
    with_file("a/../../b.png", 0, 3, SHA),
    with_file("a\0.png", 0, 3, SHA),
    with_file("", 0, 3, SHA),
    with_file(5, 0, 3, SHA),
    with_file("a.png", 3, 3, SHA),
    with_file("a.png", -1, 3, SHA),
    with_file("a.png", True, 3, SHA),
    with_file("a.png", 0, -3, SHA),
    with_file("a.png", 0, 3.5, SHA),
    with_file("a.png", 0, 3, SHA[1:]),
    with_file("a.png", 0, 3, None),
]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"[" * 100_000, b'{"format": NaN}', *(json.dumps(bad).encode() for bad in BAD)],
)
def test_a_damaged_manifest_is_one_line_that_names_it(content, tmp_path):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"data\.json is damaged: ") as caught:
        Manifest.load(tmp_path)
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_regular_file_is_not_read(make, tmp_path):
    make(tmp_path / FILE)
    with pytest.raises(UserError, match=r"data\.json cannot be read"):
        Manifest.load(tmp_path)


def test_equal_data_have_no_differences():
    assert list(MANIFEST.differences(MANIFEST)) == []
    part = dataclasses.replace(MANIFEST, files={"test": MANIFEST.files["test"]})
    assert list(MANIFEST.differences(part)) == []
    assert list(FIXED.differences(dataclasses.replace(FIXED, fingerprints={"images": "sha256:1"}))) == []


TRAIN, TEST = MANIFEST.files["train"], MANIFEST.files["test"]


@pytest.mark.parametrize(
    ("now", "line"),
    [
        ({"dataset": "mnist"}, "the dataset was image_folder, is mnist"),
        ({"classes": ("cat", "dog")}, "the classes are cat, dog; this run learned cat, "),
        ({"classes": ("[bold]", "cat", "Ü\udcff")}, "the classes are "),
        ({"files": {"train": TRAIN[1:], "test": TEST}}, "1 image is missing: cat/1.png"),
        ({"files": {"train": (), "test": TEST}}, "3 images are missing: "),
        (
            {"files": {"train": (listed("cat/1.png", sha256=OTHER), *TRAIN[1:])}},
            "1 image is changed: cat/1.png",
        ),
        ({"files": {"train": (listed("cat/1.png", size=4), *TRAIN[1:])}}, "1 image is changed: cat/1.png"),
        ({"files": {"train": (listed("cat/1.png", label=1), *TRAIN[1:])}}, "1 image is changed: cat/1.png"),
        ({"files": {"train": (*TRAIN, listed("new.png"))}}, "1 image is new: new.png"),
        ({"files": {"train": (*TRAIN, *TEST), "test": ()}}, "1 image is in another split: cat/3.png"),
    ],
)
def test_each_kind_of_difference_is_one_line(now, line):
    lines = list(MANIFEST.differences(dataclasses.replace(MANIFEST, **now)))
    assert len(lines) == 1
    assert line in lines[0]


def test_another_checksum_of_a_fixed_dataset_is_a_difference():
    now = dataclasses.replace(FIXED, fingerprints={"images": "sha256:1", "labels": "sha256:3"})
    assert list(FIXED.differences(now)) == [
        "mnist: labels is not what this run was trained with (another checksum)"
    ]


def test_many_files_are_counted():
    many = tuple(listed(f"cat/{number}.png") for number in range(1000))
    manifest = dataclasses.replace(MANIFEST, files={"train": many})
    now = dataclasses.replace(MANIFEST, files={"train": ()})
    (line,) = manifest.differences(now)
    assert line.endswith("1000 images are missing: cat/0.png, cat/1.png, cat/2.png and 997 more")


def test_the_digest_of_arrays_depends_on_values_type_and_shape():
    array = np.arange(6, dtype=np.uint8)
    others = [array + 1, array.astype(np.int8), array.reshape(2, 3), array.reshape(3, 2)]
    assert len({digest_of(array), *map(digest_of, others)}) == 5
    assert digest_of(array.reshape(2, 3).T) == digest_of(np.ascontiguousarray(array.reshape(2, 3).T))


def test_a_pipe_is_not_hashed(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert hashed(tmp_path / "file")[0] == 3
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        hashed(tmp_path / "pipe")
