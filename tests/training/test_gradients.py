import pytest
import torch

from capsexp.schedule import Step
from capsexp.training.gradients import accumulate_gradients


def test_metrics_of_layers_change_no_other_metric(tiny_components):
    components = tiny_components()
    batch = next(components.batches(components.dataset.read("train"), limit=None).training(0))
    metrics = []
    for layers in (True, False):
        torch.manual_seed(0)
        model = components.new_model()
        metrics.append(
            accumulate_gradients(model, components.loss, batch, Step(0, 1), components.trainer, layers=layers)
        )
    with_layers, without = metrics
    assert without == {name: with_layers[name] for name in without}
    assert {name.partition("/")[0] for name in with_layers.keys() - without.keys()} == {
        *("activation", "active", "coupling_entropy")
    }


def test_microbatches_give_the_gradient_of_the_whole_batch(tiny_components):
    components = tiny_components()
    components.trainer.batch_size = 101
    torch.manual_seed(0)
    model = components.new_model()
    batch = next(components.batches(components.dataset.read("train"), limit=None).training(0))
    metrics, gradients = [], []
    for count in (1, 3):
        components.trainer.accumulate = count
        metrics.append(accumulate_gradients(model, components.loss, batch, Step(0, 1), components.trainer))
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
    for whole, summed in zip(*gradients, strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-7)


def test_clipping_limits_the_gradient_and_the_metric_is_the_norm_before(
    tmp_path, train_tiny, metrics_of, final_state
):
    plain_sgd = ("optimizer=sgd", "optimizer.momentum=0", "optimizer.nesterov=false")
    train_tiny(tmp_path / "free", *plain_sgd)
    train_tiny(tmp_path / "clipped", *plain_sgd, "trainer.grad_clip=1e-8")
    free, clipped = metrics_of(tmp_path / "free"), metrics_of(tmp_path / "clipped")
    assert clipped[0]["train/gradient_norm"] == free[0]["train/gradient_norm"] > 1e-8
    assert clipped[4]["train/loss"] != free[4]["train/loss"]
    first, last = (final_state(tmp_path / name)["model"]["conv.weight"] for name in ("clipped", "free"))
    assert not torch.equal(first, last)
