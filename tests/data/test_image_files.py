import os

import pytest

from capsexp.data.image_files import ENDINGS, Walk
from capsexp.errors import DataError


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


@pytest.fixture
def root(tmp_path):
    """A dataset of two classes with two files each, beside another folder."""
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        touch(tmp_path / "root" / name)
    touch(tmp_path / "outside/2.png")
    touch(tmp_path / "outside/deep/3.png")
    return tmp_path / "root"


def found(root):
    walk = Walk(root)
    folders = walk.listing(root).folders
    return walk, [os.path.relpath(entry.path, root) for folder in folders for entry in walk.images(folder)]


OWN = ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]


@pytest.mark.parametrize(
    ("place", "target"),
    [
        ("a/loop", ".."),
        ("a/loop", "../../root"),
        ("a/loop", "../.."),
        ("a/loop", "/"),
        ("a/loop", "."),
        ("a/loop", "../b"),
        ("b/loop", "../a"),
        ("loop", "a"),
        ("loop", "."),
        ("a/9.png", "0.png"),
        ("a/9.png", "../b/0.png"),
    ],
)
def test_a_link_to_what_the_dataset_holds_or_that_holds_it_is_not_followed(root, place, target):
    (root / place).symlink_to(target)
    walk, paths = found(root)
    assert paths == OWN
    assert walk.links == [str(root / place)]
    assert walk.notes()[0].startswith("not followed, because they lead nowhere, or to what the dataset holds")


def test_many_loops_end(root):
    for number in range(6):
        for name in "ab":
            (root / name / f"loop{number}").symlink_to("..")
            (root / name / f"other{number}").symlink_to("../../outside")
    (root.parent / "outside/back").symlink_to(root)
    _, paths = found(root)
    assert sorted(paths) == sorted([*OWN, "a/other0/2.png", "a/other0/deep/3.png"])


@pytest.mark.parametrize(
    ("place", "target", "more"),
    [
        ("b/more", "../../outside", ["b/more/2.png", "b/more/deep/3.png"]),
        ("c", "../outside", ["c/2.png", "c/deep/3.png"]),
        ("b/9.png", "../../outside/2.png", ["b/9.png"]),
    ],
)
def test_a_link_to_the_outside_is_followed(root, place, target, more):
    (root / place).symlink_to(target)
    walk, paths = found(root)
    assert sorted(paths) == sorted([*OWN, *more])
    assert walk.notes() == []


def test_what_is_outside_is_read_once(root):
    for place in ("a/more", "b/more", "a/inner"):
        (root / place).symlink_to(root.parent / ("outside/deep" if place == "a/inner" else "outside"))
    for name in "ab":
        (root / name / "9.png").symlink_to(root.parent / "outside/2.png")
    _, paths = found(root)
    assert len(paths) == len({os.path.realpath(root / path) for path in paths})


@pytest.mark.parametrize(
    "name",
    [
        *(".hidden.png", "._0.png", ".thumbs/0.png", ".ipynb_checkpoints/0.png", "deep/.git/0.png"),
        *("__MACOSX/0.png", "@eaDir/0.png", "Thumbs.db", "desktop.ini", ".DS_Store"),
    ],
)
def test_hidden_files_and_folders_are_passed_over_in_silence(root, name):
    touch(root / "a" / name)
    walk, paths = found(root)
    assert (paths, walk.notes()) == (OWN, [])


def test_files_with_other_endings_are_counted(root):
    for name in ("a/x.heic", "a/y.HEIC", "b/z.txt", "b/README", "b/image.png.part"):
        touch(root / name)
    walk, paths = found(root)
    assert paths == OWN
    note = "files passed over, whose endings are not those of images: "
    assert walk.notes() == [note + "2 .heic, 1 without an ending, 1 .part, 1 .txt"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_case_of_an_ending_does_not_matter(root, ending):
    touch(root / f"b/9{ending}")
    touch(root / f"b/9{ending.upper()}x{ending.upper()}")
    assert len(found(root)[1]) == len(OWN) + 2


def test_only_regular_files_are_images(root):
    os.mkfifo(root / "a/pipe.png")
    (root / "b/zero.png").symlink_to("/dev/zero")
    (root / "b/folder.png").mkdir()
    walk, paths = found(root)
    assert paths == OWN
    assert walk.special == [str(root / "a/pipe.png"), str(root / "b/zero.png")]


def test_a_link_that_leads_nowhere_is_an_image_that_cannot_be_read_if_it_is_named_like_one(root):
    (root / "b/9.png").symlink_to("nowhere")
    (root / "b/notes").symlink_to("nowhere")
    walk, paths = found(root)
    assert (paths, walk.links) == ([*OWN, "b/9.png"], [str(root / "b/notes")])


def test_names_are_shown_on_one_line(root):
    touch(root / "a/x.\x1b[31m\n")
    (root / "a/l\noop").symlink_to("..")
    walk, _ = found(root)
    assert all(note.isprintable() for note in walk.notes())


def test_a_folder_that_cannot_be_listed_is_an_error(root):
    with pytest.raises(DataError, match=r"a/0\.png cannot be listed: Not a directory"):
        Walk(root).listing(root / "a/0.png")
