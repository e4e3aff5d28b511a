import pytest

from capsexp.data.image_files import Walk
from capsexp.data.image_splits import class_folders, find_layout, split_of
from capsexp.errors import DataError


def tree(root, *folders):
    """Make folders; those that end with `!` hold images."""
    for name in folders:
        folder = root / name.rstrip("!")
        folder.mkdir(parents=True, exist_ok=True)
        if name.endswith("!"):
            (folder / "0.png").write_bytes(b"x")
    return root


def layout(root, *folders):
    found = find_layout(Walk(tree(root, *folders)), root)
    places = {"train": found.train, "validation": found.validation, "test": found.test}
    return {split: str(path.relative_to(root)) for split, path in places.items() if path is not None}


def classes(*splits):
    """Class folders with images in each split."""
    return [f"{split}/{name}!" for split in splits for name in ("cat", "dog")]


@pytest.mark.parametrize(
    ("split", "names"),
    [
        (
            "train",
            "train TRAIN Train training Training_Set training-set seg_train Train_Data trainset traindata "
            "train2017 trainval train_val train_images imagesTrain TrainImages Train.Data",
        ),
        (
            "validation",
            "val Val valid VALIDATION validation_set dev eval Evaluation val2017 valset seg_val "
            "dev_set ValidImages images-val",
        ),
        ("test", "test Test testing TESTING test_set test-images seg_test testset testData Test.Set tests"),
    ],
)
def test_the_usual_names_of_splits(split, names):
    for name in names.split():
        assert split_of(name) == (split, ""), name
    assert split_of(names.split()[0] + " images") == (split, "")


@pytest.mark.parametrize(
    "name",
    [
        *("cat", "constraint", "strain", "attest", "latest", "contest", "value", "valley", ""),
        *("device", "medieval", "trained", "invalid", "tester", "trains", "developer"),
        *("Straße", "日本", "test_train"),
    ],
)
def test_other_names_are_those_of_classes(name):
    assert split_of(name) is None


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (classes("train", "test"), {"train": "train", "test": "test"}),
        (classes("Train", "Testing"), {"train": "Train", "test": "Testing"}),
        (classes("TRAIN", "TEST"), {"train": "TRAIN", "test": "TEST"}),
        (classes("training_set", "test_set"), {"train": "training_set", "test": "test_set"}),
        (classes("train", "dev"), {"train": "train", "validation": "dev"}),
        (
            classes("Train Data", "Val Data", "Test Data"),
            {"train": "Train Data", "validation": "Val Data", "test": "Test Data"},
        ),
        (
            classes("seg_train/seg_train", "seg_test/seg_test"),
            {"train": "seg_train/seg_train", "test": "seg_test/seg_test"},
        ),
        (
            classes("train/training/images", "test/test"),
            {"train": "train/training/images", "test": "test/test"},
        ),
        (classes("flowers_train", "flowers_test"), {"train": "flowers_train", "test": "flowers_test"}),
        (
            [*classes("train", "test"), "annotations", ".cache/train!", "__MACOSX/train!"],
            {"train": "train", "test": "test"},
        ),
        ([*classes("train"), "test/cat!"], {"train": "train", "test": "test"}),
        ([*classes("train"), "test/1!"], {"train": "train", "test": "test"}),
        (["cat!", "dog!"], {"train": "."}),
        (["cat!", "dog/valley!"], {"train": "."}),
        (["train!", "car!", "plane!"], {"train": "."}),
        (["test_tube!", "flask!"], {"train": "."}),
        (["train_station!", "bus_station!"], {"train": "."}),
        (["train_station!", "test_station!"], {"train": "."}),
    ],
)
def test_splits_are_taken(tmp_path, folders, expected):
    assert layout(tmp_path, *folders) == expected


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (classes("train", "Training", "test"), "several folders for the train split: Training, train; keep"),
        (classes("train", "val", "dev"), "several folders for the validation split: dev, val; keep one"),
        (classes("train", "test", "Test_Set"), "several folders for the test split"),
        (classes("test"), r"test exists but .*train does not; add it"),
        (classes("val", "test"), r"exists but .*train does not; add it"),
        (
            classes("train"),
            r"train exists but .*test does not; add it, or use .*, for example dataset\.path=",
        ),
        (["train!", "test!"], r"test holds images, but no class folders, so their classes are unknown"),
        ([*classes("train"), "test!"], r"test holds images, but no class folders"),
        ([*classes("train"), "val!", "test"], r"(val|test) holds (images|nothing)"),
        (["Test!", "cat!", "dog!"], "holds Test, named like splits, beside cat, dog; move them away"),
        (["val!", "test!", "cat!", "dog!"], "holds test, val, named like splits, beside cat, dog"),
        ([*classes("train", "test"), "cat!"], "holds the classes cat beside the splits test, train"),
        (["train!", "test!", "cat!"], "holds images, but no class folders"),
        (["cat/train!", "cat/test!", "dog/train!"], r"cat holds test, train, named like splits; the splits"),
    ],
)
def test_what_is_ambiguous_is_refused_in_one_line(tmp_path, folders, message):
    with pytest.raises(DataError, match=message) as caught:
        layout(tmp_path, *folders)
    assert "\n" not in str(caught.value)


def test_a_line_says_which_folder_is_which_split(tmp_path):
    root = tree(tmp_path, *classes("Test", "valid", "Train"), "extra!")
    assert find_layout(Walk(root), root).notes == (
        "train split: Train, validation split: valid, test split: Test",
        "not used, being neither a split nor a class: extra",
    )
    root = tree(tmp_path / "vehicles", "train!", "car!")
    assert find_layout(Walk(root), root).notes == ("train is a class, not a split: it holds no folders",)


def test_names_that_unicode_writes_in_two_ways_are_one_class(tmp_path):
    walk = Walk(tree(tmp_path, "Cafe\u0301!", "Bar!"))
    assert list(class_folders(walk, tmp_path)) == ["Bar", "Caf\u00e9"]
    walk = Walk(tree(tmp_path, "Caf\u00e9!"))
    with pytest.raises(DataError, match="has two folders that are both named Caf\u00e9; rename one"):
        class_folders(walk, tmp_path)
