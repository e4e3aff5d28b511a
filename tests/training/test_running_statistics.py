"""Running means of batch norms in a run: the moving average of weights, checkpoints, evaluation."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from capsexp.analysis.trained_run import TrainedRun
from capsexp.config.build import build_components
from capsexp.config.compose import compose, conf_dir, to_plain
from capsexp.config.targets import resolve
from capsexp.layer.capsule_norm import ChannelNorm
from capsexp.training.evaluate import evaluate
from capsexp.training.run_dir import RunDir
from capsexp.training.running_statistics import MovingAverage, kept_statistics, running_statistics
from capsexp.training.train import train

VB = (
    "model=vb",
    "model.conv_channels=8",
    "model.primary_types=4",
    "model.conv_types=[4]",
    "model.conv_kernels=[2]",
)
VB += ("model.conv_strides=[1]", "model.decoder=null", "trainer.max_epochs=1")
POOL = ("model=pool", "model.channels=[6,6]", "model.strides=[1,1]", "trainer.max_epochs=1")


@pytest.fixture
def trained(tmp_path, tiny_overrides):
    """`trained(*OVERRIDES)`: settings and directory of a run whose network has batch norms."""

    def run(*overrides):
        base = [override for override in tiny_overrides if not override.startswith("model.")]
        settings = to_plain(compose("train", [*base, *overrides], config_dir=None))
        directory = RunDir(tmp_path / "run")
        with directory.locked(), directory.track_status({}):
            train(build_components(settings, plugins=[]), directory, settings)
        return settings, directory.path

    return run


class Scaled(nn.Module):
    """A norm of scaled values: its statistics follow from the scale."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.norm = ChannelNorm(1, norm="batch", affine=False)
        self.register_buffer("place", torch.zeros(1))

    def forward(self, values):
        return self.norm(self.scale * values)


def test_the_averaged_statistics_fit_the_averaged_weights():
    model, values = Scaled(), torch.randn(4096, 1, 1, generator=torch.Generator().manual_seed(0)) + 5
    average = MovingAverage(model, 0.98)
    for step in range(400):
        with torch.no_grad():
            model.scale.fill_(1 + step / 100)
            model.place.fill_(step)
        model(values)
        average.update_parameters(model)
    averaged = average.module.eval().requires_grad_(False)
    normal = averaged(values)
    assert normal.mean().abs() < 0.2
    assert normal.std() == pytest.approx(1, abs=0.1)
    for name, statistic in model.norm.named_buffers():
        getattr(averaged.norm, name).copy_(statistic)
    assert averaged(values).mean().abs() > 0.3  # with the newest statistics
    assert averaged.place == 399  # other buffers are copied


def test_the_first_step_of_the_average_is_copied():
    model = Scaled()
    average = MovingAverage(model, 0.9)
    model(torch.randn(8, 1, 3) + 4)
    average.update_parameters(model)
    for ours, theirs in zip(running_statistics(average.module), running_statistics(model), strict=True):
        assert torch.equal(ours, theirs)


def test_a_network_without_batch_norms_is_averaged_as_before():
    model, before = nn.Linear(3, 2), None
    average = MovingAverage(model, 0.9)
    for _ in range(3):
        with torch.no_grad():
            model.weight.add_(1)
        before = None if before is None else 0.9 * before + 0.1 * model.weight
        before = model.weight.clone() if before is None else before
        average.update_parameters(model)
    torch.testing.assert_close(average.module.weight, before)


def test_statistics_can_be_kept():
    model = Scaled()
    with kept_statistics(model):
        model(torch.randn(8, 1, 3) + 4)
    assert [statistic.item() for statistic in running_statistics(model)] == [0, 1]


@pytest.mark.parametrize(
    "overrides", [VB, (*VB, "trainer.ema_decay=0.9"), POOL], ids=["vb", "average", "pool"]
)
def test_evaluation_reads_running_means_and_moves_none(overrides, trained):
    settings, path = trained(*overrides)
    components = build_components(settings, plugins=[])
    run = TrainedRun.restore(components, path, weights="last", limit=20)
    before = [statistic.clone() for statistic in running_statistics(run.model)]
    assert before
    assert all((statistic != 0).any() for statistic in before)
    images, _ = components.dataset.read("test")
    together = run.predict(images[:6])
    for number in range(6):
        alone = run.predict(images[number : number + 1])
        torch.testing.assert_close(
            alone.probabilities[0], together.probabilities[number], rtol=1e-4, atol=1e-5
        )
    run.model.train()  # `evaluate` and `outputs` do not rely on the mode that they find
    evaluate(
        run.model, components.batches(components.dataset.read("test"), limit=1), components.loss, run.step
    )
    list(run.outputs())
    run.model.eval()
    for old, new in zip(before, running_statistics(run.model), strict=True):
        assert torch.equal(old, new)


def test_checkpoints_hold_the_running_means_of_the_weights_and_of_their_average(trained, final_state):
    _, path = trained(*VB, "trainer.ema_decay=0.9", "trainer.max_steps=3", "trainer.test=none")
    saved, name = final_state(path), "norms.class_caps.scores.running_var"
    assert not torch.equal(saved["model"][name], torch.ones(10))
    assert not torch.equal(saved["average"][f"module.{name}"], saved["model"][name])


QUICK = {
    "attacks": {
        "epsilons": [0, 0.1],
        "targeted": [],
        "steps": 1,
        "pgd_steps": 1,
        "restarts": 1,
        "pictures": 1,
    },
    "routing": {},
    "equivariance": {},
}


@pytest.mark.parametrize("study", QUICK)
def test_studies_move_no_running_means(study, trained):
    settings, path = trained(*VB)
    run = TrainedRun.restore(build_components(settings, plugins=[]), path, weights="last", limit=60)
    before = [statistic.clone() for statistic in running_statistics(run.model)]
    node = yaml.safe_load((Path(conf_dir()) / "study" / f"{study}.yaml").read_text())
    resolve(node.pop("_target_"))(**node | QUICK[study])(run)
    assert not run.model.training
    for old, new in zip(before, running_statistics(run.model), strict=True):
        assert torch.equal(old, new)


def test_the_start_of_a_network_moves_no_running_means(monkeypatch, trained):
    from capsexp.training import start

    seen, real = [], start._calibrate

    def watched(model, batches):
        real(model, batches)
        seen.extend(statistic.clone() for statistic in running_statistics(model))

    monkeypatch.setattr(start, "_calibrate", watched)
    trained(*VB, "trainer.max_steps=1", "trainer.test=none")
    assert {statistic.unique().item() for statistic in seen} == {0, 1}


@pytest.mark.parametrize(("overrides", "count"), [(VB, 1), (("model=em_routing",), 0)], ids=["batch", "none"])
def test_pieces_of_a_batch_with_batch_norms_are_announced_once(overrides, count, trained, capsys):
    trained(*overrides, "trainer.accumulate=2", "trainer.max_steps=2", "trainer.test=none")
    line = "trainer.accumulate: each of the 2 pieces of a batch has its own means in the batch norms"
    assert " ".join(capsys.readouterr().out.split()).count(line) == count
