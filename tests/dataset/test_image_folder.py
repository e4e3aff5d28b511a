import struct

import numpy as np
import pytest
import torch
from PIL import Image

from capsexp.data.preprocess import Preprocess
from capsexp.dataset.image_folder import ImageFolder
from capsexp.errors import DataError


def write_image(path, *, mode="RGB", size=(6, 8), value=None):
    """Write an image of height and width `size`, random or of one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path.name))).integers(0, 256, (*size, 3), dtype=np.uint8)
    if value is not None:
        pixels[:] = value
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def write_classes(root, classes=("cat", "dog"), count=10, **keywords):
    for name in classes:
        for number in range(count):
            write_image(root / name / f"{number}.png", **keywords)
    return root


def write_splits(root, **keywords):
    for split in ("train", "test"):
        write_classes(root / split, count=3, **keywords)
    return root


SETTINGS = {
    "test_share": 0.2,
    "test_seed": 0,
    "background": "auto",
    "white_level": None,
    "validation": 0,
    "split_seed": 0,
}


def folder(path, *, resize=None, crop=None, **settings):
    preprocess = Preprocess.identity(resize=resize, crop=crop)
    return ImageFolder(path=str(path), preprocess=preprocess, **SETTINGS | settings)


def names(dataset, split):
    return [file.path for file in dataset.found.files[split]]


def test_classes_shape_and_images_come_from_the_files(tmp_path):
    dataset = folder(write_splits(tmp_path))
    assert dataset.classes == ("cat", "dog")
    assert dataset.image_shape == dataset.raw_shape == (3, 6, 8)
    train, test = dataset.read("train"), dataset.read("test")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 0, 1, 1, 1],) * 2
    expected = np.asarray(Image.open(tmp_path / "train/dog/2.png")).transpose(2, 0, 1)
    assert (train.images[5].numpy() == expected).all()


def test_without_a_test_folder_a_share_of_each_class_is_set_aside(tmp_path):
    write_classes(tmp_path, count=100, size=(2, 2))
    first, again, other = (folder(tmp_path, test_seed=seed) for seed in (0, 0, 1))
    train, test = first.read("train"), first.read("test")
    # A fixed draw: 20 of 100 with a standard deviation of 4.
    assert all(12 <= count <= 28 for count in test.labels.bincount().tolist())
    assert (train.labels.bincount() + test.labels.bincount()).tolist() == [100, 100]
    assert names(first, "test") == names(again, "test") != names(other, "test")
    assert not set(names(first, "train")) & set(names(first, "test"))


def test_many_classes_keep_their_alphabetical_order(tmp_path):
    names = [f"class{number:03d}" for number in range(120)]
    write_classes(tmp_path, classes=reversed(names), count=2, size=(2, 2))
    dataset = folder(tmp_path)
    assert dataset.classes == tuple(names)
    assert dataset.read("test").labels.tolist() == list(range(120))


def test_subfolders_of_a_class_are_read_and_other_files_are_skipped(tmp_path):
    write_image(write_classes(tmp_path) / "cat/more/inside.jpg")
    for name in ("notes.txt", "cat/notes.txt", "cat/._0.png", ".hidden/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    dataset = folder(tmp_path)
    assert dataset.classes == ("cat", "dog")
    assert dataset.read("train").size + dataset.read("test").size == 21


def test_resize_allows_images_of_different_sizes(tmp_path):
    write_classes(tmp_path)
    write_image(tmp_path / "cat/large.png", size=(60, 50), value=200)
    dataset = folder(tmp_path, resize=[12, 10], crop=9)
    assert (dataset.raw_shape, dataset.image_shape) == ((3, 12, 10), (3, 9, 9))
    assert tuple(dataset.read("train").images.shape[1:]) == (3, 12, 10)


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("1", 1), ("LA", 1), ("RGB", 3), ("RGBA", 3), ("P", 3)]
)
def test_channels_depend_on_the_mode_of_the_images(tmp_path, mode, channels):
    dataset = folder(write_classes(tmp_path, mode=mode))
    assert dataset.image_shape == (channels, 6, 8)
    assert tuple(dataset.read("train").images.shape[1:]) == (channels, 6, 8)


def test_gray_images_among_color_images_get_three_channels(tmp_path):
    write_classes(tmp_path, mode="RGB")
    write_image(tmp_path / "cat/gray.png", mode="L", value=77)
    dataset = folder(tmp_path)
    everything = [*names(dataset, "train"), *names(dataset, "test")]
    images = torch.cat([dataset.read("train").images, dataset.read("test").images])
    gray = images[everything.index("cat/gray.png")]
    assert torch.equal(gray, torch.full((3, 6, 8), 77, dtype=torch.uint8))


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


def test_transparent_areas_become_white(tmp_path):
    write_classes(tmp_path, mode="RGBA")
    for path in tmp_path.rglob("*.png"):
        Image.new("RGBA", (8, 6), (10, 20, 30, 0)).save(path)
    assert folder(tmp_path).read("test").images.unique().tolist() == [255]


def test_the_exif_orientation_of_a_photograph_is_applied(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    for path in write_classes(tmp_path).rglob("*.png"):
        with Image.open(path) as image:
            pixels = image.copy()
        path.unlink()
        pixels.save(path.with_suffix(".jpg"), exif=turned)
    dataset = folder(tmp_path)
    assert dataset.image_shape == (3, 8, 6)
    assert tuple(dataset.read("test").images.shape[1:]) == (3, 8, 6)


def test_images_of_different_sizes_are_reported_with_the_setting_that_helps(tmp_path):
    write_classes(tmp_path)
    write_image(tmp_path / "dog/odd.png", size=(7, 9))
    message = r"cat/\d\.png is 6x8, .*dog/odd\.png is 7x9; set dataset\.preprocess\.resize=\[HEIGHT,WIDTH\]"
    with pytest.raises(DataError, match=message):
        folder(tmp_path)


@pytest.mark.parametrize("keep", [200, 700])
def test_a_truncated_image_is_reported(tmp_path, keep):
    write_classes(tmp_path, size=(30, 30))
    path = tmp_path / "cat/3.png"
    path.write_bytes(path.read_bytes()[:keep])
    dataset = folder(tmp_path)
    assert [path.name in problem for problem in dataset.problems()] == [True]
    with pytest.raises(DataError, match=r"cat/3\.png is damaged and cannot be decoded: "):
        [dataset.read(split) for split in ("train", "test")]


def test_a_flipped_bit_in_a_png_is_reported(tmp_path):
    path = write_classes(tmp_path, size=(30, 30)) / "cat/3.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert [path.name in problem for problem in folder(tmp_path).problems()] == [True]


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13)])
def test_a_file_that_is_not_an_image_is_reported(tmp_path, content):
    (write_classes(tmp_path) / "cat/3.png").write_bytes(content)
    with pytest.raises(DataError, match=r"cat/3\.png cannot be read as an image: "):
        folder(tmp_path)


def nothing(root):
    return root / "absent"


def a_file(root):
    return write_image(root / "file.png")


def no_class(root):
    return root


def one_class(root):
    return write_classes(root, classes=["cat"])


def an_empty_class(root):
    (write_classes(root) / "owl").mkdir()
    return root


def a_class_of_other_files(root):
    (root / "owl").mkdir()
    (write_classes(root) / "owl/animation.mp4").write_bytes(b"a film")
    return root


def only_train(root):
    write_classes(root / "train")
    return root


def only_test(root):
    write_classes(root / "test")
    return root


def a_class_only_in_test(root):
    write_image(write_splits(root) / "test/owl/0.png")
    return root


def an_empty_class_in_test(root):
    (write_splits(root) / "test/cat").rename(root / "away")
    (root / "test/cat").mkdir()
    return root


def a_class_of_one(root):
    write_image(write_classes(root) / "owl/0.png")
    return root


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nothing, "path .*absent does not exist; it must hold one folder of images per class"),
        (a_file, r"path .*file\.png is not a folder; it must hold"),
        (no_class, "has no class folder; at least two are needed, one folder per class"),
        (one_class, "has only the class cat; at least two are needed"),
        (an_empty_class, r"no images in .*owl \(looked for \.apng, "),
        (a_class_of_other_files, r"no images in .*owl \(looked for \.apng, "),
        (only_train, "train exists but .*test does not; add it, or use .*/CLASS/"),
        (only_test, "test exists but .*train does not; add it, or use .*/CLASS/"),
        (a_class_only_in_test, "test has classes that .*train does not have: owl"),
        (an_empty_class_in_test, "no images in .*test/cat"),
        (a_class_of_one, r"a test share of 0\.2 leaves no image of the class owl for training"),
    ],
)
def test_a_wrong_folder_is_reported_in_one_line(tmp_path, make, message):
    with pytest.raises(DataError, match=message) as caught:
        folder(make(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_test_share_out_of_range_is_refused(tmp_path, share):
    with pytest.raises(ValueError, match=rf"test_share must be in \(0, 1\), got {share}"):
        folder(write_classes(tmp_path), test_share=share)
