import pytest
import torch

from capsexp.data import Split
from capsexp.errors import UserError
from capsexp.evaluate import autocast, evaluate, evaluate_run, inference, load_model
from capsexp.schedule import Step


def test_figures_are_means_over_pictures_whatever_the_batches(tiny_parts):
    parts = tiny_parts("trainer.batch_size=7")
    model = parts.new_model()
    images, labels = parts.dataset.read("test")
    split = Split(images[:17], labels[:17])  # batches of 7, 7 and 3
    values = evaluate(model, parts.batches(split, limit=None), parts.loss, Step(0, 1))
    parts.trainer.batch_size = 17
    at_once = evaluate(model, parts.batches(split, limit=None), parts.loss, Step(0, 1))
    assert values == pytest.approx(at_once, rel=1e-5)


def test_evaluation_leaves_the_mode_as_it_was_and_no_gradients(tiny_parts):
    model = tiny_parts().new_model()
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


def test_a_part_that_does_not_exist_or_is_empty_is_refused(tmp_path, train_tiny, tiny_parts):
    train_tiny(tmp_path, "dataset.validation=0", "trainer.max_steps=2", "trainer.test=none")
    told = {"run": str(tmp_path), "weights": "last"}
    with pytest.raises(UserError, match="part: must be 'test', 'validation' or 'train', got 'all'"):
        evaluate_run(tiny_parts("dataset.validation=0"), {**told, "part": "all"})
    with pytest.raises(UserError, match="this run had no validation pictures"):
        evaluate_run(tiny_parts("dataset.validation=0"), {**told, "part": "validation"})


def test_weights_of_another_network_are_refused(tmp_path, train_tiny, tiny_parts):
    train_tiny(tmp_path, "trainer.max_steps=2", "trainer.test=none")
    with pytest.raises(UserError, match=r"are of another network: .*size mismatch"):
        load_model(tiny_parts("model.conv_channels=9"), tmp_path, weights="last")


def test_a_step_can_be_named(tmp_path, train_tiny, tiny_parts):
    train_tiny(tmp_path, "trainer.max_steps=4", "trainer.test=none")
    _, step = load_model(tiny_parts(), tmp_path, weights="4")
    assert step.number == 4
    with pytest.raises(UserError, match=r"step-00000003\.pt: refused, there is no such file"):
        load_model(tiny_parts(), tmp_path, weights="3")


def test_eval_repeats_the_runs_own_test_figures(tmp_path, train_tiny, tiny_parts):
    results = train_tiny(tmp_path)
    told = {"run": str(tmp_path), "weights": "best", "part": "test"}
    values = evaluate_run(tiny_parts(), told)
    assert values["accuracy"] == results["test/accuracy"]
    assert values["margin"] == results["test/margin"]
