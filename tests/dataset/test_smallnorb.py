import gzip
import hashlib
import itertools
import os
import re
import struct
import urllib.error

import numpy as np
import pytest
import torch

from capsexp.data import download
from capsexp.data.batches import Batches
from capsexp.data.checked_files import RemoteFile, StoredFile
from capsexp.data.image_ops import resized
from capsexp.data.prepare import prepare, verify
from capsexp.data.preprocess import Preprocess
from capsexp.dataset.smallnorb import FACTORS, FOLDER, STEM, Setup, SmallNORB
from capsexp.errors import DataError

SETUP = Setup(
    instances={"train": (4, 9), "test": (0, 5)},
    elevations=(0, 2, 3),
    azimuths=(0, 4, 6, 30),
    lightings=(0, 1),
    side=12,
)
COUNT = 5 * 2 * 3 * 4 * 2
OF_THE_PAPER = {
    "resize": 48,
    "shift": 0,
    "shift_fill": "zeros",
    "rotation": 0,
    "scale": None,
    "shear": 0,
    "elastic": 0,
    "mixup": 0,
    "crop": 32,
    "flip": False,
    "brightness": 63,
    "contrast": [0.2, 1.8],
    "contrast_mean": "image",
    "standardise": "last",
    "test_crops": 1,
}
SMALL = {**OF_THE_PAPER, "resize": 6, "crop": 4}


def rows_of(split):
    """Label and factors of each image, in random order."""
    rows = np.array(list(itertools.product(range(5), *SETUP.values(split))), "<i4")
    return np.random.default_rng(len(split)).permutation(rows)


def images_of(rows):
    """Constant gray pairs that encode their row: class and instance on the left, the view on the right."""
    left = 20 * rows[:, 0] + rows[:, 1]
    right = 50 * rows[:, 2] + rows[:, 3] + 40 * rows[:, 4]
    grays = np.stack([left, right], axis=1).astype(np.uint8)
    return np.broadcast_to(grays[..., None, None], (len(rows), 2, SETUP.side, SETUP.side)).copy()


def norb(array):
    magic = {"uint8": 0x1E3D4C55, "int32": 0x1E3D4C54}[array.dtype.name]
    header = [magic, array.ndim, *array.shape, *[1] * (3 - array.ndim)]
    return struct.pack(f"<{len(header)}I", *header) + array.tobytes()


def contents_of(rows):
    """The three files of a split."""
    return {
        "dat": norb(images_of(rows)),
        "cat": norb(np.ascontiguousarray(rows[:, 0])),
        "info": norb(np.ascontiguousarray(rows[:, 1:])),
    }


def publish(root, *, packed=False, **splits):
    """Write a small dataset in the published format; return a class with its checksums."""
    (root / FOLDER).mkdir()
    files = []
    for split, stem in STEM.items():
        for kind, content in contents_of(splits.get(split, rows_of(split))).items():
            zipped, name = gzip.compress(content, mtime=0), f"{FOLDER}{stem}{kind}.mat"
            stored = StoredFile(name, f"md5:{hashlib.md5(content).hexdigest()}")
            sha256 = hashlib.sha256(zipped).hexdigest()
            files.append(RemoteFile(f"{name}.gz", f"https://example.invalid/{name}.gz", sha256, (stored,)))
            (root / (f"{name}.gz" if packed else name)).write_bytes(zipped if packed else content)
    return type("World", (SmallNORB,), {"setup": SETUP, "files": tuple(files)})


def build(kind, root, *, preprocess=SMALL, **changes):
    keywords = {
        "cameras": "stereo",
        "validation_instance": 9,
        "viewpoint": None,
        "test_views": "all",
    }
    return kind(
        root=str(root), download=False, preprocess=Preprocess(**preprocess), **{**keywords, **changes}
    )


@pytest.fixture
def world(tmp_path):
    kind = publish(tmp_path)
    return lambda **changes: build(kind, tmp_path, **changes)


@pytest.fixture
def real():
    root = os.environ.get("CAPSEXP_DATA")
    if root is None or build(SmallNORB, root, preprocess=OF_THE_PAPER).missing_files():
        pytest.skip("smallNORB is not under CAPSEXP_DATA")
    return lambda **changes: build(SmallNORB, root, preprocess=OF_THE_PAPER, **changes)


def path_of(dataset, split="train", kind="dat"):
    return dataset.root / FOLDER / f"{STEM[split]}{kind}.mat"


def training_factors(dataset):
    """The factors of both splits of `read_training`."""
    factors = dataset.factors("train")
    is_validation = torch.isin(factors[:, 0], torch.tensor(dataset.held_out))
    return factors[~is_validation], factors[is_validation]


def silent(activity, done, total):
    pass


def not_resized(*arguments):
    raise AssertionError("the images were resized again")


def grays(split):
    """Both cameras' gray value of each image."""
    assert (split.images == split.images[:, :, :1, :1]).all()
    return split.images[:, :, 0, 0].long()


def grays_of(labels, factors):
    instance, elevation, azimuth, lighting = factors.T
    return torch.stack([20 * labels + instance, 50 * elevation + azimuth + 40 * lighting], dim=1)


@pytest.mark.parametrize("resize", [6, None, 12, [4, 6]])
@pytest.mark.parametrize("split", ["train", "test"])
def test_images_labels_and_factors_belong_together(world, split, resize):
    dataset = world(preprocess={**SMALL, "resize": resize})
    images, factors = dataset.read(split), dataset.factors(split)
    rows = torch.from_numpy(rows_of(split).astype(np.int64))
    assert torch.equal(images.labels, rows[:, 0])
    assert torch.equal(factors, rows[:, 1:])
    assert torch.equal(grays(images), grays_of(images.labels, factors))
    assert tuple(images.images.shape) == (COUNT, *dataset.raw_shape)


def test_cached_images_equal_resized_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("capsexp.dataset.smallnorb.RESIZE_CHUNK", 50)
    kind = publish(tmp_path)
    path = path_of(build(kind, tmp_path))
    noise = np.random.default_rng(0).integers(0, 256, (COUNT, 2, 12, 12), dtype=np.uint8)
    path.write_bytes(norb(noise))
    assert torch.equal(build(kind, tmp_path).read("train").images, resized(torch.from_numpy(noise), (6, 6)))


@pytest.mark.parametrize(("cameras", "channels"), [("stereo", [0, 1]), ("left", [0]), ("right", [1])])
def test_cameras_are_channels(world, cameras, channels):
    split = world(cameras=cameras).read("test")
    assert world(cameras=cameras).image_shape == (len(channels), 4, 4)
    assert split.images.is_contiguous()
    assert torch.equal(split.images, world().read("test").images[:, channels])


def test_exactly_one_instance_of_every_class_is_set_aside(world):
    dataset = world(validation_instance=4)
    splits, factors = dataset.read_training(), training_factors(dataset)
    assert [split.size for split in splits] == [COUNT // 2] * 2
    assert [rows[:, 0].unique().tolist() for rows in factors] == [[9], [4]]
    for split, rows in zip(splits, factors, strict=True):
        assert split.labels.bincount().tolist() == [COUNT // 10] * 5
        assert torch.equal(grays(split), grays_of(split.labels, rows))


def test_a_list_of_one_instance_is_that_instance(world):
    for ours, theirs in zip(
        world(validation_instance=[4]).read_training(),
        world(validation_instance=4).read_training(),
        strict=True,
    ):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)


@pytest.mark.parametrize("chosen", [[4, 6], [9, 7, 4, 8]])
def test_several_instances_of_every_class_are_set_aside_together(chosen, tmp_path):
    instances = torch.tensor([4, 6, 7, 8, 9]).repeat(3)
    factors = torch.stack([instances, *torch.zeros(3, 15, dtype=torch.int64)], dim=1)
    training, validation = build(SmallNORB, tmp_path, validation_instance=chosen)._split_rows(factors)
    assert sorted(instances[validation].tolist()) == sorted(3 * chosen)
    assert sorted([*training.tolist(), *validation.tolist()]) == [*range(15)]


def test_without_a_validation_instance_all_is_for_training(world):
    training, validation = world(validation_instance=None).read_training()
    assert (training.size, validation.size) == (COUNT, 0)
    assert [len(rows) for rows in training_factors(world(validation_instance=None))] == [COUNT, 0]


@pytest.mark.parametrize(
    ("viewpoint", "familiar", "novel"),
    [("azimuth", {0, 4, 30}, {6}), ("elevation", {0, 2}, {3})],
)
def test_training_has_familiar_views_and_the_test_split_the_selected_views(world, viewpoint, familiar, novel):
    column = FACTORS.index(viewpoint)
    expected_values = {"familiar": familiar, "novel": novel, "all": familiar | novel}
    for views, expected in expected_values.items():
        dataset = world(viewpoint=viewpoint, test_views=views)
        for rows in training_factors(dataset):
            assert set(rows[:, column].tolist()) == familiar
        test, factors = dataset.read("test"), dataset.factors("test")
        assert set(factors[:, column].tolist()) == expected
        assert torch.equal(grays(test), grays_of(test.labels, factors))
        assert test.size == COUNT * len(expected) // len(familiar | novel)


def test_familiar_views_are_available_beside_novel_ones(world):
    novel = world(viewpoint="azimuth", test_views="novel")
    familiar = world(viewpoint="azimuth", test_views="familiar")
    assert torch.equal(novel.familiar().images, familiar.read("test").images)
    assert novel.with_test_views("all").read("test").size == world().read("test").size
    assert novel.test_views == "novel"
    assert world().familiar() is None


INSTANCES = "^validation_instance must be null, one of 4, 9, or a list of some of them"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_instance": 5}, f"{INSTANCES}, got 5$"),
        ({"validation_instance": []}, rf"{INSTANCES}, got \[\]$"),
        ({"validation_instance": [4, 5]}, rf"{INSTANCES}, got \[4, 5\]$"),
        ({"validation_instance": [4, 4]}, rf"{INSTANCES}, got \[4, 4\]$"),
        ({"validation_instance": [4, 9]}, rf"{INSTANCES}, got \[4, 9\]$"),
        ({"test_views": "novel"}, "test_views must be 'all' where viewpoint is null, got 'novel'"),
        ({"preprocess": {**SMALL, "crop": 7}}, "crop must be <= the image's 6x6, got 7"),
    ],
)
def test_invalid_settings_are_refused_before_reading(world, changes, message):
    with pytest.raises(ValueError, match=message):
        world(**changes)


def test_resized_images_are_read_from_the_cache(world, monkeypatch):
    first = world().read("train")
    monkeypatch.setattr(SmallNORB, "_resize", not_resized)
    assert torch.equal(world().read("train").images, first.images)
    assert torch.equal(world(cameras="right").read("train").images, first.images[:, 1:])


def test_each_size_has_its_own_cache(world, monkeypatch):
    small, large = world(), world(preprocess={**SMALL, "resize": 9})
    assert small.read("test").images.shape[-1] == 6
    assert large.read("test").images.shape[-1] == 9
    monkeypatch.setattr(SmallNORB, "_resize", not_resized)
    assert small.read("test").images.shape[-1] == 6


def test_a_damaged_cache_is_rewritten(world):
    expected = world().read("test").images
    path = world().folder / "cache-test-6x6.bytes"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert torch.equal(world().read("test").images, expected)
    assert path.read_bytes() == whole


def test_a_cache_of_other_images_is_rewritten(world):
    dataset = world()
    before = dataset.read("test").images
    path = path_of(dataset, "test")
    stat = path.stat()
    path.write_bytes(norb(255 - images_of(rows_of("test"))))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert torch.equal(dataset.read("test").images, 255 - before)


def test_images_at_full_size_are_not_cached(world):
    dataset = world(preprocess={**SMALL, "resize": None})
    dataset.read("train")
    assert not list(dataset.folder.glob("cache-*"))


def test_a_read_only_folder_is_read_without_a_cache(world, monkeypatch):
    def refuse(path, write):
        raise PermissionError("read-only")

    monkeypatch.setattr("capsexp.data.cache.write_atomic", refuse)
    for dataset in (world(), world()):
        assert dataset.read("train").size == COUNT
        assert dataset.caveats() == []
    assert not list(world().folder.glob("cache-*"))


def test_only_images_that_are_not_the_published_ones_have_a_caveat(world):
    dataset = world()
    assert dataset.caveats() == []
    path_of(dataset, "test").write_bytes(norb(255 - images_of(rows_of("test"))))
    message = (
        r"smallnorb: the test images are not the published ones \(checksum differs: a converted copy\?\)"
    )
    assert [bool(re.match(message, line)) for line in dataset.caveats()] == [True]
    path_of(dataset, "train").write_bytes(norb(255 - images_of(rows_of("train"))))
    assert "the training and test images are not" in world().caveats()[0]
    assert dataset.read("train").size == COUNT


def test_the_checksum_of_the_images_is_cached(world, monkeypatch):
    path_of(world(), "test").write_bytes(norb(255 - images_of(rows_of("test"))))
    first = world().caveats()

    def hashed_again(*arguments):
        raise AssertionError("the images were hashed again")

    monkeypatch.setattr("capsexp.dataset.smallnorb.digest", hashed_again)
    assert world().caveats() == first != []


def test_prepare_writes_the_caches_and_verifies(world, monkeypatch):
    lines = []
    assert prepare(world(), print_line=lines.append, progress=silent) == 0
    assert lines == [f"smallnorb: verified in {world().folder}"]
    monkeypatch.setattr(SmallNORB, "_resize", not_resized)
    assert world().read("train").size == world().read("test").size == COUNT


def test_a_converted_copy_is_reported_as_usable(world):
    path = path_of(world(), "train")
    path.write_bytes(norb(255 - images_of(rows_of("train"))))
    lines = []
    assert verify(world(), print_line=lines.append) == 1
    assert len(lines) == 1
    assert lines[0].startswith(f"smallnorb: {path} does not hold the published images (checksum differs")
    assert "it can be used, but report this beside any metric" in lines[0]
    assert prepare(world(), print_line=lines.append, progress=silent) == 1
    assert lines[1] == lines[0]


def test_a_truncated_image_file_is_refused_by_readers_and_fetched_anew_by_prepare(world, monkeypatch):
    path = path_of(world(), "train")
    path.write_bytes(path.read_bytes()[:-1])
    size = 24 + COUNT * 2 * 12 * 12
    message = f"{path}: must have {size} bytes, got {size - 1}"
    assert world().problems() == [message]
    with pytest.raises(DataError, match=message):
        world().read("train")
    requested = []

    def open_url(url):
        requested.append(url)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(download, "open_url", open_url)
    assert world().damaged_files() == [f"{FOLDER}{path.name}"]
    with pytest.raises(DataError, match=f"cannot download .*{path.name}"):
        world().prepare(silent)
    assert [url.rpartition("/")[2] for url in requested] == [f"{path.name}.gz"]
    assert world().read("test").size == COUNT


@pytest.mark.parametrize("kind", ["cat", "info"])
def test_classes_and_factors_must_be_the_published_ones(world, kind):
    path = path_of(world(), "train", kind)
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"train.*-{kind}.mat is damaged or incomplete: expected md5"):
        world().read("train")
    assert [f"-{kind}.mat is damaged" in problem for problem in world().problems()] == [True]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, 5, r"-cat\.mat: the values of class must be \[0, 1, 2, 3, 4\], got \[0, 1, 2, 3, 4, 5\]"),
        (0, -1, r"-cat\.mat: the values of class must be .* got \[-1, 0, 1, 2, 3, 4\]"),
        (1, 5, r"-info\.mat: the values of instance must be \[4, 9\], got \[4, 5, 9\]"),
        (2, 1, r"-info\.mat: the values of elevation must be \[0, 2, 3\], got \[0, 1, 2, 3\]"),
        (3, 5, r"-info\.mat: the values of azimuth must be \[0, 4, 6, 30\], got \[0, 4, 5, 6, 30\]"),
        (4, 2, r"-info\.mat: the values of lighting must be \[0, 1\], got \[0, 1, 2\]"),
    ],
)
def test_a_value_out_of_range_is_reported(tmp_path, column, value, message):
    rows = rows_of("train")
    rows[7, column] = value
    kind = publish(tmp_path, train=rows)
    with pytest.raises(DataError, match=message):
        build(kind, tmp_path).read("train")


def test_a_duplicate_combination_is_reported(tmp_path):
    rows = rows_of("train")
    rows[7] = rows[8]
    kind = publish(tmp_path, train=rows)
    message = (
        rf"-info\.mat: must have each combination of class, instance, .* once, {COUNT} .* got {COUNT - 1}"
    )
    with pytest.raises(DataError, match=message):
        build(kind, tmp_path).read("train")


def test_gz_files_alone_are_enough(tmp_path):
    dataset = build(publish(tmp_path, packed=True), tmp_path)
    assert len(dataset.missing_files()) == 6
    assert dataset.read("train").size == COUNT
    assert dataset.missing_files() == dataset.problems() == []


@pytest.mark.parametrize("kind", ["dat", "cat", "info"])
def test_a_missing_file_is_reported_with_its_address_and_folder(world, kind):
    path = path_of(world(), "test", kind)
    path.unlink()
    expected = rf"missing smallnorb/.*-testing-{kind}\.mat; .*https://example\.invalid/.*-{kind}\.mat\.gz\)"
    message = rf"{expected}, or put these files into {path.parent} by hand, packed or unpacked"
    with pytest.raises(DataError, match=message):
        world().read("test")
    assert world().problems() == [f"{path} is missing"]


def test_the_files_are_the_authors_and_use_https():
    assert len(SmallNORB.files) == 6
    for remote in SmallNORB.files:
        assert remote.url.startswith("https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/smallnorb-5x")
        assert remote.url.endswith(".mat.gz")
        assert remote.name == f"{remote.contents[0].name}.gz"


def test_the_published_dataset_is_read(real):
    training, validation = real().read_training()
    test = real().read("test")
    assert (training.size, validation.size, test.size) == (19_440, 4_860, 24_300)
    assert training.labels.bincount().tolist() == [3_888] * 5
    assert validation.labels.bincount().tolist() == [972] * 5
    assert test.labels[:7].tolist() == [0, 1, 2, 3, 4, 0, 1]
    training_rows, validation_rows = training_factors(real())
    assert (training_rows[:, 0].unique().tolist(), validation_rows[:, 0].unique().tolist()) == (
        [4, 6, 7, 8],
        [9],
    )
    assert real().factors("test")[:, 0].unique().tolist() == [0, 1, 2, 3, 5]
    assert all("smallnorb: the " in line for line in real().caveats())


@pytest.mark.parametrize("viewpoint", ["azimuth", "elevation"])
def test_a_third_of_the_published_images_have_familiar_views(real, viewpoint):
    for views, count in (("familiar", 8_100), ("novel", 16_200), ("all", 24_300)):
        dataset = real(viewpoint=viewpoint, test_views=views)
        assert len(dataset.factors("test")) == count
        assert [len(rows) for rows in training_factors(dataset)] == [6_480, 1_620]
    column = FACTORS.index(viewpoint)
    familiar = real(viewpoint=viewpoint, test_views="familiar").factors("test")[:, column].unique()
    assert familiar.tolist() == ([0, 2, 4, 30, 32, 34] if viewpoint == "azimuth" else [0, 1, 2])


def test_the_network_gets_standardised_published_images(real):
    options = {"batch_size": 64, "seed": 0, "device": "cpu", "memory_format": torch.contiguous_format}
    batches = Batches(real().read("test"), real().preprocess, limit=2, **options)
    for batch in (*batches.training(0), *batches.in_order()):
        assert tuple(batch.images.shape) == (64, 2, 32, 32)
        flat = batch.images.flatten(1)
        torch.testing.assert_close(flat.mean(1), torch.zeros(64), rtol=0, atol=1e-4)
        torch.testing.assert_close(flat.std(1, correction=0), torch.ones(64), rtol=1e-4, atol=0)


def test_published_images_of_the_two_cameras_correlate(real):
    # Detects a wrong order of the dimensions.
    images = real().read("test").images[::100].double().flatten(2)
    centred = images - images.mean(2, keepdim=True)
    left, right = centred[:, 0], centred[:, 1]
    correlation = (left * right).sum(1) / (left.norm(dim=1) * right.norm(dim=1))
    assert correlation.median() > 0.8


@pytest.mark.parametrize("changes", [{}, {"validation_instance": None}, {"viewpoint": "azimuth"}])
def test_the_groups_of_a_split_are_its_toys(world, changes):
    dataset = world(**changes)
    training, validation = dataset.read_training()
    for name, split in (("train", training), ("validation", validation), ("test", dataset.read("test"))):
        groups = dataset.groups(name)
        assert groups.kind == "toy"
        assert len(groups.of) == split.size
        grays = split.images[:, 0, 0, 0] if split.size else torch.empty(0)
        for gray, label, group in zip(grays.tolist(), split.labels.tolist(), groups.of.tolist(), strict=True):
            assert groups.names[group] == f"{dataset.classes[label]} {gray - 20 * label}"
    assert dataset.groups("test").names[:3] == ("animal 0", "animal 5", "human 0")
