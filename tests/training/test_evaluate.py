import pytest
import torch
from torch import nn

from capsexp.analysis.evaluate_run import evaluate_run
from capsexp.analysis.trained_run import TrainedRun, load_model
from capsexp.capsules import Output
from capsexp.config.build import build_components
from capsexp.config.compose import compose, to_plain
from capsexp.data.batches import Batches
from capsexp.data.preprocess import Preprocess
from capsexp.data.split import Split
from capsexp.dataset.digits import Digits
from capsexp.errors import UserError
from capsexp.schedule import Step
from capsexp.training import checkpoint
from capsexp.training.evaluate import evaluate, inference
from capsexp.training.metrics import autocast, pool_crops
from capsexp.training.per_class import balanced_accuracy, count_labels, macro_f1
from capsexp.training.run_dir import RunDir
from capsexp.training.state import State
from capsexp.training.train import train


def test_metrics_are_means_over_images_for_any_batch_size(tiny_components):
    components = tiny_components("trainer.batch_size=7")
    model = components.new_model()
    images, labels = components.dataset.read("test")
    split = Split(images[:17], labels[:17])  # batches of 7, 7 and 3
    in_three_batches = evaluate(model, components.batches(split, limit=None), components.loss, Step(0, 1))
    components.trainer.batch_size = 17
    in_one_batch = evaluate(model, components.batches(split, limit=None), components.loss, Step(0, 1))
    assert in_three_batches == pytest.approx(in_one_batch, rel=1e-5)


class ByBrightness(nn.Module):
    """A high probability of class 0 for a bright crop of one pixel, a low one of class 1 for a dark crop."""

    def forward(self, images, labels=None):
        bright, dark = torch.tensor([0.9, 0.6]), torch.tensor([0.1, 0.2])
        probabilities = torch.lerp(dark, bright, images[:, :, 0, 0])
        return Output(probabilities, probabilities)


def brightness(output, batch, step):
    return {"brightness": batch.pixels.mean()}


def crops(count):
    """Three images of which 0, 4 and 13 of the 13 crops, the center first, are bright."""
    preprocess = Preprocess.identity(crop=1, test_crops=count)
    images = torch.zeros(3, 1, 7, 7, dtype=torch.uint8)
    images[1, 0, range(4), range(4)] = 255
    images[2] = 255
    return Batches(
        Split(images, torch.tensor([1, 1, 0])),
        preprocess,
        batch_size=2,
        seed=0,
        device="cpu",
        memory_format=torch.contiguous_format,
        limit=None,
    )


def test_crops_have_equal_votes():
    # Without the scaling, the four bright crops of the second image would outvote its nine dark ones.
    together = evaluate(ByBrightness(), crops(13), brightness, Step(0, 1))
    assert together["accuracy"] == pytest.approx(1)
    assert together["brightness"] == together["loss"] == pytest.approx((0 + 4 / 13 + 1) / 3)
    center = evaluate(ByBrightness(), crops(1), brightness, Step(0, 1))
    assert center["accuracy"] == pytest.approx(2 / 3)
    assert center["brightness"] == pytest.approx(2 / 3)


def test_the_balanced_accuracy_is_the_mean_over_classes():
    together = evaluate(ByBrightness(), crops(13), brightness, Step(0, 1))
    assert together["balanced_accuracy"] == pytest.approx(1)
    center = evaluate(ByBrightness(), crops(1), brightness, Step(0, 1))
    assert center["balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)  # of three images two are right


def test_classes_without_images_do_not_count():
    scores = torch.eye(5)[[0, 0, 0, 3]]
    assert balanced_accuracy(count_labels(scores, torch.tensor([0, 0, 3, 3]))) == pytest.approx((1 + 0.5) / 2)


def test_macro_f1_is_the_mean_of_the_classes_f1():
    scores = torch.eye(4)[[0, 0, 1, 1, 0, 3]]
    counts = count_labels(scores, torch.tensor([0, 0, 0, 1, 1, 1]))
    first, second = 2 * 2 / (3 + 3), 2 * 1 / (3 + 2)  # 2 right / (labels + predictions)
    assert macro_f1(counts) == pytest.approx((first + second) / 2)  # class 3 is predicted, but has no label


def test_of_several_labels_each_counts():
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.1, 0.9, 0.8]])
    counts = count_labels(scores, torch.tensor([[0, 2], [1, 2]]))
    assert balanced_accuracy(counts) == pytest.approx((1 + 1 + 0.5) / 3)


def test_without_class_imbalance_it_is_the_accuracy(tmp_path, train_tiny):
    results = train_tiny(tmp_path, "trainer.max_epochs=1", "trainer.limit_eval_batches=null")
    assert results["test/balanced_accuracy"] == pytest.approx(results["test/accuracy"], abs=0.02)


def test_a_crop_with_zero_probabilities_has_no_vote():
    zero, certain = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 1e-4], [0.2, 0.1, 0.0]])
    assert pool_crops([zero, certain]).argmax(1).tolist() == [2, 0]
    assert pool_crops([zero, zero]).argmax(1).tolist() == [0, 0]


def test_inference_restores_the_mode_and_disables_gradients(tiny_components):
    model = tiny_components().new_model()
    for training in (True, False):
        model.train(training)
        with inference(model):
            assert not model.training
            assert not torch.is_grad_enabled()
        assert model.training is training


def test_autocast_is_off_for_float32():
    with autocast(torch.device("cpu"), torch.float32):
        assert not torch.is_autocast_enabled("cpu")
    with autocast(torch.device("cpu"), torch.bfloat16):
        assert torch.is_autocast_enabled("cpu")


def test_a_split_that_does_not_exist_or_is_empty_is_refused(tmp_path, train_tiny, tiny_components):
    train_tiny(tmp_path, "dataset.validation=0", "trainer.max_steps=2", "trainer.test=none")
    settings = {"run": str(tmp_path), "weights": "last"}
    with pytest.raises(
        UserError, match="split: must be 'test', 'familiar', 'validation' or 'train', got 'all'"
    ):
        evaluate_run(tiny_components("dataset.validation=0"), {**settings, "split": "all"})
    with pytest.raises(UserError, match="this run has no validation images"):
        evaluate_run(tiny_components("dataset.validation=0"), {**settings, "split": "validation"})
    with pytest.raises(UserError, match="split=familiar: digits has no familiar test images beside its test"):
        evaluate_run(tiny_components(), {**settings, "split": "familiar"})


def test_weights_of_another_network_are_refused(tmp_path, train_tiny, tiny_components):
    train_tiny(tmp_path, "trainer.max_steps=2", "trainer.test=none")
    with pytest.raises(UserError, match=r"are of another network: .*size mismatch"):
        load_model(tiny_components("model.conv_channels=9"), tmp_path, weights="last")


def test_a_step_can_be_named(tmp_path, train_tiny, tiny_components):
    train_tiny(tmp_path, "trainer.max_steps=4", "trainer.test=none")
    _, step = load_model(tiny_components(), tmp_path, weights="2")
    assert step == Step(2, 4)
    with pytest.raises(UserError, match=r"^no checkpoint at step 3; available: 2, 4$"):
        load_model(tiny_components(), tmp_path, weights="3")


def test_eval_repeats_the_runs_own_test_metrics(tmp_path, train_tiny, tiny_components):
    results = train_tiny(tmp_path)
    settings = {"run": str(tmp_path), "weights": "best", "split": "test"}
    values = evaluate_run(tiny_components(), settings)
    assert values["accuracy"] == results["test/accuracy"]
    assert values["margin"] == results["test/margin"]


EM = (
    "model=em_routing",
    "model.conv_types=[3,4]",
    "routing.iterations=2",
    "routing.inverse_temperature_ramp={_target_: capsexp.schedule.Linear, start: 1, end: 3000, steps: 1.0}",
)


@pytest.fixture
def em_run(tmp_path, tiny_overrides, monkeypatch):
    """A run whose lambda and margin change at every step, and whose first validation is the best."""
    first = State.note_validation
    monkeypatch.setattr(State, "note_validation", lambda s, *values: s.best_step or first(s, *values))
    shared = [text for text in tiny_overrides if not text.startswith("model.decoder")]

    def train_run(*overrides):
        settings = to_plain(compose("train", [*shared, *EM, *overrides], config_dir=None))
        components, directory = build_components(settings, plugins=[]), RunDir(tmp_path / "run")
        with directory.locked(), directory.track_status({}):
            return components, train(components, directory, settings)

    return train_run


@pytest.mark.parametrize("overrides", [(), ("trainer.ema_decay=0.5",), ("trainer.test=last",)], ids=str)
def test_the_final_test_has_the_schedules_of_the_weights_that_it_tests(overrides, tmp_path, em_run):
    components, results = em_run(*overrides)
    weights = components.trainer.test
    run = TrainedRun.restore(components, tmp_path / "run", weights=weights)
    assert run.step == Step(5 if weights == "best" else 15, 15)
    alone = run.evaluate()
    assert alone.keys() == {name.removeprefix("test/") for name in results if name.startswith("test/")}
    for name, value in alone.items():
        assert value == results[f"test/{name}"], name


@pytest.mark.parametrize("overrides", [(), ("trainer.ema_decay=0.5",)], ids=str)
def test_schedules_of_loaded_weights_are_at_their_own_step(overrides, tmp_path, em_run):
    components, _ = em_run(*overrides, "trainer.keep_every=2", "trainer.test=none")
    loss = components.loss
    for weights, number in {"2": 2, "8": 8, "best": 5, "last": 15}.items():
        run = TrainedRun.restore(components, tmp_path / "run", weights=weights)
        assert run.step == Step(number, 15)
        for name in ("conv_caps_1", "conv_caps_2", "class_caps"):
            ramp = getattr(run.model, name).routing.ramp.item()
            assert ramp == pytest.approx(1 + 2999 * number / 15)
        assert loss.scheduled(run.step)["margin"] == pytest.approx(0.2 + 0.7 * number / 15)


def test_an_older_checkpoint_takes_the_length_of_its_run_from_the_status(
    tmp_path, train_tiny, tiny_components
):
    train_tiny(tmp_path, "trainer.max_steps=4", "trainer.test=none")
    path = (tmp_path / "checkpoints" / "step-00000002.pt").resolve()
    saved = checkpoint.load(path)
    del saved["total"]
    checkpoint.save(path.parent, saved, step=2)
    assert load_model(tiny_components(), tmp_path, weights="2")[1] == Step(2, 4)
    for damaged in ("{}", '{"total": "many"}', '{"total": 1}'):
        (tmp_path / "status.json").write_text(damaged)
        assert load_model(tiny_components(), tmp_path, weights="2")[1] == Step(2, 2)


def test_caveats_are_printed_above_the_metrics(tmp_path, train_tiny, tiny_components, monkeypatch, capsys):
    monkeypatch.setattr(Digits, "caveats", lambda self: ["digits: drawn by the testers themselves"])
    train_tiny(tmp_path, "trainer.max_steps=2", "trainer.test=none")
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("digits: drawn by the testers themselves") == 1
    assert "parameters" in lines[lines.index("digits: drawn by the testers themselves") - 1]
    evaluate_run(tiny_components(), {"run": str(tmp_path), "weights": "last", "split": "test"})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "digits: drawn by the testers themselves"
    assert any("accuracy" in line for line in lines[1:])
