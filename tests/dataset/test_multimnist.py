import json

import numpy as np
import pytest
import torch
from PIL import Image

from capsexp.analysis.evaluate_run import evaluate_run
from capsexp.analysis.predict import predict
from capsexp.analysis.speed.measure import random_batches
from capsexp.analysis.trained_run import load_model
from capsexp.capsules import Batch
from capsexp.config.build import build, build_components
from capsexp.config.compose import compose, to_plain
from capsexp.data.batches import Batches
from capsexp.data.pairs import OverlaidPairs
from capsexp.dataset.digits import Digits
from capsexp.errors import RunStopped, UserError
from capsexp.schedule import Step
from capsexp.training.evaluate import evaluate
from capsexp.training.gradients import accumulate_gradients
from capsexp.training.non_finite import refuse_non_finite
from capsexp.training.parallel import ProcessGroup
from capsexp.training.run_dir import RunDir

SMALL = ("dataset=multimnist", "dataset@dataset.source=digits", "dataset.shift=2", "dataset.pad=2")


def of_digits(*overrides):
    overrides = [*SMALL, *overrides]
    return build(to_plain(compose("train", overrides, config_dir=None))["dataset"], at="dataset")


def joined(batches):
    return [torch.cat(fields) for fields in zip(*(batch[:4] for batch in batches), strict=True)]


def test_the_source_is_mnist_by_default():
    node = to_plain(compose("train", ["dataset=multimnist", "data_root=nowhere"], config_dir=None))["dataset"]
    assert node["source"]["_target_"] == "capsexp.dataset.mnist.MNIST"
    dataset = build(node, at="dataset")
    assert dataset.image_shape == dataset.raw_shape == (1, 36, 36)
    assert (dataset.labels_per_image, dataset.classes) == (2, tuple("0123456789"))
    assert len(dataset.missing_files()) == 4
    assert isinstance(of_digits().source, Digits)
    assert of_digits().image_shape == (1, 12, 12)
    assert of_digits("dataset.source.preprocess.resize=10").image_shape == (1, 14, 14)


def test_images_and_splits_are_the_sources():
    dataset = of_digits("dataset.source.validation=100", "dataset.source.split_seed=3")
    for ours, theirs in zip(
        (*dataset.read_training(), dataset.read("test")),
        (*dataset.source.read_training(), dataset.source.read("test")),
        strict=True,
    ):
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.images[:, :, 2:-2, 2:-2], theirs.images)
        assert ours.images.sum() == theirs.images.sum()
    assert (dataset.validation, dataset.split_seed) == (100, 3)
    assert dataset.folder is dataset.familiar() is None
    assert dataset.missing_files() == dataset.problems() == []


def test_the_sources_augmentation_changes_nothing(tiny_components):
    other = "dataset.source.preprocess"
    split = of_digits().read("test")
    plain, augmented = (
        tiny_components(*SMALL, *overrides).batches(split, limit=2)
        for overrides in ((), (f"{other}.shift=3", f"{other}.flip=true", f"{other}.standardise=last"))
    )
    for first, second in zip(plain.training(0), augmented.training(0), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))


def test_training_has_one_pair_per_image_and_evaluation_has_test_partners(tiny_components):
    components = tiny_components(*SMALL, "dataset.test_partners=3")
    training, validation = components.dataset.read_training()
    assert components.batches(training, limit=None, training=True).count == training.size
    assert components.batches(validation, limit=None).count == 3 * validation.size
    assert isinstance(components.batches(validation, limit=None), OverlaidPairs)
    (caveat,) = components.dataset.caveats()
    assert caveat == "multimnist of digits, pairs per test image: 3; in the paper: 1,000"
    assert of_digits("dataset.test_partners=1000").caveats() == []


@pytest.mark.parametrize(
    "run", [("seed=1",), ("trainer.batch_size=37",), ("trainer.batch_size=64", "seed=9")]
)
def test_the_test_split_is_the_same_in_every_run(run, tiny_components):
    first, other = (
        joined(components.batches(components.dataset.read("test"), limit=None).in_order())
        for components in (tiny_components(*SMALL), tiny_components(*SMALL, *run))
    )
    assert len(first[1]) == 359
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.shift=-1"], "dataset: shift must be >= 0, got -1"),
        (["dataset.pad=-1"], "dataset: pad must be >= 0, got -1"),
        (["dataset.pair_seed=-1"], "dataset: pair_seed must be an integer from 0 to 2^63 - 1, got -1"),
        (["dataset.test_partners=0"], "dataset: test_partners must be >= 1, got 0"),
        (["dataset.shift=10"], "dataset: shift must be < pad + the image's 8x8, got 10"),
        (
            ["dataset@dataset.source=cifar10"],
            "dataset: source must have images with one channel and one label, got cifar10, which has 3 and 1",
        ),
        (
            ["dataset@dataset.source=multimnist"],
            "dataset: source must have images with one channel and one label, got multimnist, "
            "which has 1 and 2",
        ),
        (
            ["loss=spread"],
            "loss: Spread takes one label per image, and multimnist has 2: choose loss=margin or "
            "loss=sigmoid_cross_entropy",
        ),
        (
            ["loss=cross_entropy"],
            "loss: CrossEntropy takes one label per image, and multimnist has 2: choose loss=margin or "
            "loss=sigmoid_cross_entropy",
        ),
    ],
)
def test_invalid_settings_are_one_line(overrides, message, tiny_config):
    key = overrides[0].partition("=")[0]
    small = [override for override in SMALL if not override.startswith(f"{key}=")]
    with pytest.raises(UserError) as caught:
        build_components(tiny_config(*small, *overrides), plugins=[])
    assert caught.value.problems == (message,)


def test_a_run_trains_and_is_evaluated(tmp_path, train_tiny, tiny_components, capsys):
    results = train_tiny(tmp_path, *SMALL)
    assert "multimnist of digits, pairs per test image: 1; in" in capsys.readouterr().out
    assert 0 <= results["test/accuracy"] <= results["test/digit_accuracy"] <= 1
    values = evaluate_run(tiny_components(*SMALL), {"run": str(tmp_path), "weights": "best", "split": "test"})
    for name in ("accuracy", "digit_accuracy", "margin", "reconstruction"):
        assert values[name] == results[f"test/{name}"]
    with Image.open(tmp_path / "figures" / "reconstruction.png") as shown:
        # 16 images, each with its two sources and their two reconstructions.
        assert shown.size == (16 * 13 + 1, 5 * 13 + 1)


def test_predict_lists_and_decodes_the_likeliest_classes(tmp_path, train_tiny, tiny_components, capsys):
    train_tiny(tmp_path, *SMALL, "trainer.max_steps=2", "trainer.test=none")
    components = tiny_components(*SMALL)
    overlay = next(components.batches(components.dataset.read("test"), limit=1).in_order()).images[0, 0]
    Image.fromarray((overlay * 255).byte().numpy()).save(tmp_path / "input.png")
    settings = {"run": str(tmp_path), "weights": "last", "top": 2, "reconstructions": True}
    settings["output"] = str(tmp_path)
    predict(components, settings, [str(tmp_path / "input.png")])
    model, _ = load_model(components, tmp_path, weights="last")
    best = model(overlay[None, None]).scores.topk(2)
    listed = capsys.readouterr().out
    for label, score in zip(best.indices[0].tolist(), best.values[0].tolist(), strict=True):
        assert f"{label} {score:.3f}" in listed
    with Image.open(tmp_path / "input.png.reconstruction.png") as written:
        actual = torch.from_numpy(np.array(written.convert("L"))).float() / 255
    decoded = model(overlay[None, None], best.indices).reconstruction[0, :, 0]
    torch.testing.assert_close(actual, torch.cat([overlay, *decoded], dim=1), atol=0.51 / 255, rtol=0)


def test_both_images_of_a_non_finite_pair_are_named(tmp_path):
    indices = torch.tensor([[1, 2], [3, 40]])
    pixels = torch.zeros(2, 2, 1, 4, 4)
    batch = Batch(pixels[:, 0], torch.tensor([[0, 1], [2, 3]]), pixels, indices)
    with pytest.raises(RunStopped, match=r"loss is nan, with training images 1 \+ 2, 3 \+ 40, … "):
        refuse_non_finite({"loss": float("nan")}, batch, 7, RunDir(tmp_path))
    assert json.loads((tmp_path / "non_finite.json").read_text())["indices"] == [[1, 2], [3, 40]]


def test_accumulated_microbatches_add_up(tiny_components):
    values = []
    for accumulate in (1, 3):
        torch.manual_seed(0)
        components = tiny_components(*SMALL, f"trainer.accumulate={accumulate}")
        batch = next(components.batches(components.dataset.read("train"), limit=1, training=True).training(0))
        values.append(
            accumulate_gradients(
                components.new_model(), components.loss, batch, Step(0, 1), components.trainer
            )
        )
    assert values[1] == pytest.approx(values[0], rel=1e-4)


def test_processes_divide_a_batch_of_pairs(tiny_components):
    components = tiny_components(*SMALL)
    batch = next(components.batches(components.dataset.read("test"), limit=1).in_order())
    slices, shares = zip(*(ProcessGroup(rank, 3).slice_of(batch) for rank in range(3)), strict=True)
    assert sum(shares) == pytest.approx(1)
    assert all(map(torch.equal, joined(slices), batch))


def test_benchmark_batches_are_random_pairs(tiny_components):
    batch = next(random_batches(tiny_components(*SMALL)).training(0))
    assert (batch.images.shape, batch.labels.shape) == ((100, 1, 12, 12), (100, 2))
    assert batch.pixels.shape == (100, 2, 1, 12, 12)


@pytest.mark.parametrize(
    "model",
    [
        "em_routing",
        "cnn_multimnist model.conv_channels=[4,4] model.hidden=[8] loss=sigmoid_cross_entropy",
    ],
)
def test_other_networks_train_on_pairs(model, em_config):
    name, *overrides = model.split()
    shallow = ["model.conv_types=[4]", "model.conv_kernels=[2]", "model.conv_strides=[1]", "loss=margin"]
    overrides = overrides or [*shallow, "model.primary_types=2"]
    components = build_components(em_config(f"model={name}", *SMALL, *overrides), plugins=[])
    batch = next(components.batches(components.dataset.read("test"), limit=1, training=True).training(0))
    metrics = accumulate_gradients(
        components.new_model(), components.loss, batch, Step(0, 1), components.trainer
    )
    assert 0 <= metrics["accuracy"] <= metrics["digit_accuracy"] <= 1


def test_overfitting_uses_the_first_pairs(tmp_path, train_tiny, metrics_of):
    overrides = [
        "trainer.overfit=true",
        "trainer.batch_size=20",
        "trainer.max_steps=2",
        "dataset.test_partners=1",
    ]
    train_tiny(tmp_path, *SMALL, *overrides)
    assert "validation/digit_accuracy" in metrics_of(tmp_path)[-2] | metrics_of(tmp_path)[-1]


def test_accuracy_counts_pairs_and_digit_accuracy_counts_digits(tiny_components):
    components = tiny_components(*SMALL)
    model = components.new_model()
    batches = components.batches(components.dataset.read("test"), limit=None)
    both = each = 0
    for batch in batches.in_order():
        best = model(batch.images).scores.topk(2).indices.tolist()
        matches = [len({*a} & {*b}) for a, b in zip(best, batch.labels.tolist(), strict=True)]
        both, each = both + matches.count(2), each + sum(matches)
    values = evaluate(model, batches, components.loss, Step(0, 1))
    assert values["accuracy"] == pytest.approx(both / 359)
    assert values["digit_accuracy"] == pytest.approx(each / 718)


def test_a_split_of_one_class_is_refused(tiny_components):
    components = tiny_components(*SMALL)
    test = components.dataset.read("test")
    with pytest.raises(UserError, match=r"^pairs need images of two classes, and all"):
        components.batches(test.take((test.labels == 3).nonzero().flatten()), limit=None)


def test_other_datasets_have_one_label_per_image(tiny_components):
    components = tiny_components()
    assert components.dataset.labels_per_image == 1
    batches = components.batches(components.dataset.read("test"), limit=None, training=True)
    assert type(batches) is Batches
    assert next(batches.in_order()).labels.shape == (100,)
