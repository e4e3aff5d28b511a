import numpy as np
import pytest
import torch
from PIL import Image

from capsexp.data import image_reader
from capsexp.data.decode import decode
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


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    return path


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


DAMAGES = {
    "empty": lambda path: cut(path, 0),
    "no image": lambda path: path.write_text("no image") and path,
    "only a header": lambda path: cut(path, 40),
    "cut in the header": lambda path: cut(path, 12),
    "cut": lambda path: cut(path, 700),
    "a flipped bit": flip,
    "a broken link": lambda path: path.unlink() or path.symlink_to("nowhere") or path,
    "nan": lambda path: Image.fromarray(np.full((6, 8), np.nan, np.float32)).save(path, format="TIFF"),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("place", ["train/cat/1.png", "validation/dog/0.png", "test/cat/2.png"])
def test_a_damaged_image_of_any_split_is_named_before_training(tmp_path, kind, place):
    for split in ("train", "validation", "test"):
        write_classes(tmp_path / split, count=3, size=(30, 30))
    DAMAGES[kind](tmp_path / place)
    with pytest.raises(DataError, match=rf"{place} (cannot be read|is damaged|has pixels)") as caught:
        folder(tmp_path, validation=0.1).require_files()
    assert len(caught.value.problems) == 1


def test_all_damaged_images_are_named_at_once(tmp_path, capsexp):
    write_splits(tmp_path / "data", size=(30, 30))
    where = ["train/cat/0", "train/cat/1", "train/dog/0", "test/cat/0", "test/cat/1"]
    places = dict(zip(DAMAGES, where, strict=False))
    for kind, place in places.items():
        DAMAGES[kind](tmp_path / f"data/{place}.png")
    run = ["device=cpu", f"run={tmp_path / 'run'}"]
    code, out, error = capsexp("train", "dataset=image_folder", f"dataset.path={tmp_path / 'data'}", *run)
    assert (code, out, (tmp_path / "run").exists()) == (2, "", False)
    lines = error.splitlines()
    assert len(lines) == len(places)
    assert all(any(f"{place}.png" in line for line in lines) for place in places.values())
    assert all(line.startswith("capsexp: dataset: ") for line in lines)
    for kind in ("empty", "no image", "cut in the header", "only a header"):
        write_image(tmp_path / f"data/{places[kind]}.png", size=(30, 30))
    code, out, error = capsexp("data", "verify", "image_folder", f"dataset.path={tmp_path / 'data'}")
    assert (code, error) == (1, "")
    assert out.splitlines()[0] == "image_folder: train split: train, test split: test"
    damaged = [line for line in out.splitlines() if "is damaged and cannot be decoded" in line]
    assert [f"{places['cut']}.png" in line for line in damaged] == [True]


def test_images_are_decoded_once_for_the_check_and_the_training(tmp_path, monkeypatch):
    write_splits(tmp_path)
    decoded = []
    real = image_reader.decode
    monkeypatch.setattr(image_reader, "decode", lambda path, *rest: decoded.append(path) or real(path, *rest))
    checked = folder(tmp_path)
    checked.require_files()
    assert len(decoded) == len(set(decoded)) == 12
    training, _ = folder(tmp_path).read_training()  # the run's own object, while the first one lives
    assert (training.size, len(decoded)) == (6, 12)
    assert torch.equal(folder(tmp_path).read_training()[0].images, training.images)
    write_image(tmp_path / "train/cat/0.png", value=3)
    assert folder(tmp_path).read_training()[0].images[0].unique().tolist() == [3]


def test_images_without_contrast_are_refused_or_counted(tmp_path):
    write_splits(tmp_path, value=9)
    with pytest.raises(
        DataError, match=r"no image in .* has any contrast: all pixels of all 12 images have the"
    ):
        folder(tmp_path).require_files()
    write_image(tmp_path / "train/cat/0.png")
    dataset = folder(tmp_path)
    dataset.require_files()
    assert any("images that show only one color: 11 (" in line for line in dataset.notes())


def test_little_contrast_is_told(tmp_path):
    write_splits(tmp_path)
    for number, path in enumerate(sorted(tmp_path.glob("t*/*/*.png"))):
        Image.fromarray(np.random.default_rng(number).integers(0, 2, (6, 8), np.uint8)).save(path)
    dataset = folder(tmp_path)
    dataset.require_files()
    line = "image_folder: images have little contrast: no two pixels of one differ by more than 1"
    assert line in dataset.notes()


def test_copies_of_training_images_in_another_split_are_told(tmp_path):
    write_splits(tmp_path, size=(9, 9))
    for number, path in enumerate(sorted(tmp_path.glob("t*/*/*.png"))):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 9), np.uint8)).save(path)
    dataset = folder(tmp_path)
    dataset.require_files()
    assert not any("training images, too" in line for line in dataset.notes())
    with Image.open(tmp_path / "train/cat/1.png") as image:
        image.save(tmp_path / "test/dog/2.png", compress_level=0)
    dataset = folder(tmp_path)
    dataset.require_files()
    where = tmp_path / "test/dog/2.png"
    assert any(line.endswith(f"training images, too: 1 ({where})") for line in dataset.notes())


def test_a_folder_of_validation_images_validates(tmp_path):
    for split in ("train", "valid", "test"):
        write_classes(tmp_path / split, count=4)
    dataset = folder(tmp_path, validation=0.5)
    assert [split.size for split in dataset.read_training()] == [8, 8]
    assert names(dataset, "validation")[0] == "valid/cat/0.png"
    assert any("validation images come from valid; dataset.validation" in line for line in dataset.notes())
    dataset = folder(tmp_path, validation=0)
    assert [split.size for split in dataset.read_training()] == [8, 0]
    assert any("valid is not used: dataset.validation=0" in line for line in dataset.notes())


def test_with_training_and_validation_folders_the_test_images_are_drawn_from_training(tmp_path):
    for split in ("train", "val"):
        write_classes(tmp_path / split, count=8)
    dataset = folder(tmp_path, validation=0.1)
    assert len(names(dataset, "validation")) == 16
    assert len(names(dataset, "train")) + len(names(dataset, "test")) == 16
    assert all(name.startswith("train/") for name in names(dataset, "test"))
    assert any("test split: a share of 0.2 of each class in train" in line for line in dataset.notes())


def test_added_images_move_no_others(tmp_path):
    write_classes(tmp_path, count=40, size=(2, 2))
    before = folder(tmp_path, validation=0.2)
    for number in range(20):
        write_image(tmp_path / f"cat/new {number}.png", size=(2, 2))
    after = folder(tmp_path, validation=0.2)
    for split in ("train", "validation", "test"):
        kept = [name for name in names(after, split) if "new" not in name]
        assert kept == names(before, split)


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("top", [255, 4095, 65535])
def test_a_run_predicts_with_the_scale_of_its_training(tmp_path, ending, top):
    for name in ("a", "b"):
        for number in range(4):
            path = tmp_path / name / f"{number}.{ending}"
            path.parent.mkdir(exist_ok=True)
            pixels = np.full((4, 5), top // (number + 1), np.uint16)
            Image.fromarray(pixels).save(path)
    dataset = folder(tmp_path, test_share=0.5)
    dark = next(name for name in names(dataset, "train"))
    image = decode(str(tmp_path / dark), 1, dataset.reading)
    assert torch.equal(image, dataset.read("train").images[0])
    assert dataset.reading.white == top


def test_loose_images_and_other_files_are_told(tmp_path):
    write_image(write_splits(tmp_path) / "loose.png")
    write_image(tmp_path / "train/loose.png")
    (tmp_path / "train/cat/x.heic").write_text("no image")
    notes = " ".join(folder(tmp_path).notes())
    assert f"not used, being in no class folder: {tmp_path}/loose.png, {tmp_path}/train/loose.png" in notes
    assert "files passed over, whose endings are not those of images: 1 .heic" in notes


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
