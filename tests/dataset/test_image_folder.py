import struct

import numpy as np
import pytest
import torch
from PIL import Image

from capsexp.data.preprocess import Preprocess
from capsexp.dataset.image_folder import ImageFolder
from capsexp.errors import DataError


def picture(path, *, mode="RGB", size=(6, 8), value=None):
    """A picture of height and width `size`, random or of one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path.name))).integers(0, 256, (*size, 3), dtype=np.uint8)
    if value is not None:
        pixels[:] = value
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def sliced(root, classes=("cat", "dog"), count=10, **keywords):
    for name in classes:
        for number in range(count):
            picture(root / name / f"{number}.png", **keywords)
    return root


def divided(root, **keywords):
    for part in ("train", "test"):
        sliced(root / part, count=3, **keywords)
    return root


def folder(path, *, resize=None, crop=None, test_share=0.2, test_seed=0, validation=0):
    preprocess = Preprocess(
        resize=resize,
        shift=0,
        crop=crop,
        flip=False,
        brightness=0,
        contrast=None,
        light="window",
        standardise=None,
        test_crops=1,
    )
    return ImageFolder(
        path=str(path),
        test_share=test_share,
        test_seed=test_seed,
        validation=validation,
        split_seed=0,
        preprocess=preprocess,
    )


def test_classes_shape_and_pictures_come_from_the_files(tmp_path):
    dataset = folder(divided(tmp_path))
    assert dataset.classes == ("cat", "dog")
    assert dataset.image_shape == dataset.raw_shape == (3, 6, 8)
    train, test = dataset.read("train"), dataset.read("test")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 0, 1, 1, 1],) * 2
    expected = np.asarray(Image.open(tmp_path / "train/dog/2.png")).transpose(2, 0, 1)
    assert (train.images[5].numpy() == expected).all()


def test_without_a_test_folder_a_share_of_each_class_is_set_aside(tmp_path):
    sliced(tmp_path, count=10)
    first, again, other = (folder(tmp_path, test_seed=seed) for seed in (0, 0, 1))
    train, test = first.read("train"), first.read("test")
    assert train.labels.bincount().tolist() == [8, 8]
    assert test.labels.bincount().tolist() == [2, 2]
    assert first._pictures == again._pictures != other._pictures
    assert not set(first._pictures["train"]) & set(first._pictures["test"])


def test_many_classes_keep_their_alphabetical_order(tmp_path):
    names = [f"class{number:03d}" for number in range(120)]
    sliced(tmp_path, classes=reversed(names), count=2, size=(2, 2))
    dataset = folder(tmp_path)
    assert dataset.classes == tuple(names)
    assert dataset.read("test").labels.tolist() == list(range(120))


def test_folders_inside_a_class_count_and_other_files_do_not(tmp_path):
    picture(sliced(tmp_path) / "cat/more/inside.jpg")
    for name in ("notes.txt", "cat/notes.txt", "cat/._0.png", ".hidden/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no picture")
    dataset = folder(tmp_path)
    assert dataset.classes == ("cat", "dog")
    assert dataset.read("train").size + dataset.read("test").size == 21


def test_resize_brings_pictures_of_all_sizes_to_one(tmp_path):
    sliced(tmp_path)
    picture(tmp_path / "cat/large.png", size=(60, 50), value=200)
    dataset = folder(tmp_path, resize=[12, 10], crop=9)
    assert (dataset.raw_shape, dataset.image_shape) == ((3, 12, 10), (3, 9, 9))
    assert tuple(dataset.read("train").images.shape[1:]) == (3, 12, 10)


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("1", 1), ("LA", 1), ("RGB", 3), ("RGBA", 3), ("P", 3)]
)
def test_channels_come_from_the_kind_of_pictures(tmp_path, mode, channels):
    dataset = folder(sliced(tmp_path, mode=mode))
    assert dataset.image_shape == (channels, 6, 8)
    assert tuple(dataset.read("train").images.shape[1:]) == (channels, 6, 8)


def test_grey_among_colour_becomes_colour(tmp_path):
    sliced(tmp_path, mode="RGB")
    path = picture(tmp_path / "cat/grey.png", mode="L", value=77)
    dataset = folder(tmp_path)
    everything = [p for part in ("train", "test") for p in dataset._pictures[part]]
    images = torch.cat([dataset.read("train").images, dataset.read("test").images])
    grey = images[[p.path for p in everything].index(str(path))]
    assert torch.equal(grey, torch.full((3, 6, 8), 77, dtype=torch.uint8))


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bits_are_cut_to_the_upper_8(tmp_path, suffix):
    for name in ("a", "b"):
        for number in range(3):
            path = tmp_path / name / f"{number}.{suffix}"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((4, 5), 0xABCD, dtype=np.uint16)).save(path)
    dataset = folder(tmp_path)
    assert dataset.image_shape == (1, 4, 5)
    assert dataset.read("train").images.unique().tolist() == [0xAB]


def test_transparent_parts_become_white(tmp_path):
    sliced(tmp_path, mode="RGBA")
    for path in tmp_path.rglob("*.png"):
        Image.new("RGBA", (8, 6), (10, 20, 30, 0)).save(path)
    assert folder(tmp_path).read("test").images.unique().tolist() == [255]


def test_a_photograph_is_turned_as_its_exif_data_say(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    for path in sliced(tmp_path).rglob("*.png"):
        with Image.open(path) as image:
            pixels = image.copy()
        path.unlink()
        pixels.save(path.with_suffix(".jpg"), exif=turned)
    dataset = folder(tmp_path)
    assert dataset.image_shape == (3, 8, 6)
    assert tuple(dataset.read("test").images.shape[1:]) == (3, 8, 6)


def test_pictures_of_different_sizes_name_two_of_them_and_the_setting(tmp_path):
    sliced(tmp_path)
    picture(tmp_path / "dog/odd.png", size=(7, 9))
    message = r"cat/\d\.png is 6x8, .*dog/odd\.png is 7x9; set dataset\.preprocess\.resize=\[HEIGHT,WIDTH\]"
    with pytest.raises(DataError, match=message):
        folder(tmp_path)


@pytest.mark.parametrize("keep", [200, 700])
def test_a_truncated_picture_is_named(tmp_path, keep):
    sliced(tmp_path, size=(30, 30))
    path = tmp_path / "cat/3.png"
    path.write_bytes(path.read_bytes()[:keep])
    dataset = folder(tmp_path)
    assert [path.name in problem for problem in dataset.problems()] == [True]
    with pytest.raises(DataError, match=r"cat/3\.png is damaged and cannot be decoded: "):
        [dataset.read(part) for part in ("train", "test")]


def test_a_flipped_byte_in_a_png_is_noticed(tmp_path):
    path = sliced(tmp_path, size=(30, 30)) / "cat/3.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert [path.name in problem for problem in folder(tmp_path).problems()] == [True]


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13)])
def test_a_file_that_is_no_picture_is_named(tmp_path, content):
    (sliced(tmp_path) / "cat/3.png").write_bytes(content)
    with pytest.raises(DataError, match=r"cat/3\.png cannot be read as a picture: "):
        folder(tmp_path)


def test_numbers_that_are_no_bytes_are_named(tmp_path):
    Image.fromarray(np.ones((6, 8), dtype=np.float32)).save(sliced(tmp_path) / "cat/3.tiff")
    with pytest.raises(DataError, match=r"3\.tiff has pixels of kind F; convert it to 8 or 16 bits"):
        folder(tmp_path)


def nothing(root):
    return root / "absent"


def a_file(root):
    return picture(root / "file.png")


def no_class(root):
    return root


def one_class(root):
    return sliced(root, classes=["cat"])


def an_empty_class(root):
    (sliced(root) / "owl").mkdir()
    return root


def a_class_of_other_files(root):
    (root / "owl").mkdir()
    (sliced(root) / "owl/animation.gif").write_bytes(b"GIF89a")
    return root


def only_train(root):
    sliced(root / "train")
    return root


def only_test(root):
    sliced(root / "test")
    return root


def a_class_only_in_test(root):
    picture(divided(root) / "test/owl/0.png")
    return root


def an_empty_class_in_test(root):
    (divided(root) / "test/cat").rename(root / "away")
    (root / "test/cat").mkdir()
    return root


def a_class_of_one(root):
    picture(sliced(root) / "owl/0.png")
    return root


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nothing, "path .*absent does not exist; it must hold one folder of pictures per class"),
        (a_file, r"path .*file\.png is not a folder; it must hold"),
        (no_class, "has no class folder; at least two are needed, one folder per class"),
        (one_class, "has only the class cat; at least two are needed"),
        (an_empty_class, r"no pictures in .*owl \(looked for \.jpg, "),
        (a_class_of_other_files, r"no pictures in .*owl \(looked for \.jpg, "),
        (only_train, "train exists but .*test does not; give both, or .*/CLASS/"),
        (only_test, "test exists but .*train does not; give both, or .*/CLASS/"),
        (a_class_only_in_test, "test has classes that .*train has not: owl"),
        (an_empty_class_in_test, "no pictures in .*test/cat"),
        (a_class_of_one, r"a test share of 0\.2 leaves no picture of the class owl for training"),
    ],
)
def test_a_folder_that_is_not_as_described_is_one_clear_line(tmp_path, make, message):
    with pytest.raises(DataError, match=message) as caught:
        folder(make(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_test_share_out_of_range_is_refused(tmp_path, share):
    with pytest.raises(ValueError, match=rf"test_share must be in \(0, 1\), got {share}"):
        folder(sliced(tmp_path), test_share=share)
