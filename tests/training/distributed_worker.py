"""The program of each process that tests/training/test_parallel.py starts.

Usage: python distributed_worker.py FOLDER. Writes FOLDER/RANK.json with the results of all checks, because
every start of several processes takes seconds.
"""

import contextlib
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from torch import nn

from capsexp.capsules import Batch
from capsexp.cli import torchrun
from capsexp.config.build import build_components
from capsexp.config.compose import compose, to_plain
from capsexp.errors import RunStopped
from capsexp.schedule import Step
from capsexp.training import timing
from capsexp.training.evaluate import evaluate
from capsexp.training.gradients import accumulate_gradients
from capsexp.training.parallel import SINGLE
from capsexp.training.run_dir import RunDir
from capsexp.training.train import train

CPU = ("device=cpu", "device.allocator=default", "device.threads=1")
DYNAMIC = (*CPU, "model.conv_channels=8", "model.primary_types=2", "model.decoder.hidden=[8,8]")
GRADIENTS = ((1, 33), (3, 33), (1, 2))  # trainer.accumulate, batch size
SHORT = (
    "trainer.batch_size=33",
    "trainer.limit_train_batches=5",
    "trainer.limit_eval_batches=2",
    "trainer.max_epochs=3",
    "trainer.log_every=1",
    "trainer.save_every=2",
)
BASELINE = (  # has dropout
    *CPU,
    *SHORT,
    "model=cnn_sabour",
    "model.conv_channels=[4,4]",
    "model.hidden=[8,8]",
    "loss._target_=signalling_loss.SignallingLoss",
    "plugins=[signalling_loss]",
    "trainer.accumulate=2",
    "trainer.ema_decay=0.9",
)
VB = (*CPU, "model=vb", "model.conv_types=[4]", "model.conv_kernels=[2]", "model.conv_strides=[1]")
EM = (*CPU, "model=em_routing", "model.conv_types=[4]", "model.conv_kernels=[2]", "model.conv_strides=[1]")


def composed(*overrides):
    return to_plain(compose("train", list(overrides), config_dir=None))


def setting(*overrides, dtype=torch.float32):
    """Return a run's components, a network that is the same in every process, a batch and all batches."""
    components = build_components(composed(*overrides), plugins=[])
    torch.manual_seed(1)
    model = components.new_model()
    batches = components.batches(components.dataset.read("train"), limit=None)
    if hasattr(model, "calibrate"):
        model.calibrate(next(batches.in_order()).images)
    batch = next(batches.training(0))
    batch = batch._replace(images=batch.images.to(dtype), pixels=batch.pixels.to(dtype))
    return components, model.to(dtype), batch, batches


def distance(ours, theirs):
    """Return the largest difference over all tensors, relative to the largest element of each."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


def gradient_of(model, components, batch, processes):
    metrics = accumulate_gradients(
        model, components.loss, batch, Step(0, 1), components.trainer, processes=processes
    )
    return metrics, [parameter.grad.clone() for parameter in model.parameters()]


def compare_gradients(group, accumulate, size, *overrides):
    """Compare gradients and metrics of all processes with those of one, in both precisions."""
    report, exact = {}, None
    for dtype in (torch.float64, torch.float32):
        components, model, batch, _ = setting(f"trainer.batch_size={size}", *overrides, dtype=dtype)
        expected, single = gradient_of(model, components, batch, SINGLE)
        components.trainer.accumulate = accumulate
        metrics, ours = gradient_of(model, components, batch, group)
        exact = exact or single
        sums = group.gather([gradient.double().sum().item() for gradient in ours])
        report[str(dtype)] = {
            "to one process": distance(ours, single),
            "to float64": distance([gradient.double() for gradient in ours], exact),
            "of one process to float64": distance([gradient.double() for gradient in single], exact),
            "metrics": {name: [metrics[name], expected[name]] for name in expected},
            "same in all": all(total == sums[0] for total in sums),
        }
    return report


class Branches(nn.Module):
    """Three matrices, as in a mixture of experts: each process uses another one, and the third is unused."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(3, 1, bias=False) for _ in range(3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


def missing_gradients(group):
    """Return the gradients of all matrices if each process uses another one."""
    torch.manual_seed(0)
    model = Branches()
    model.branches[group.rank](torch.ones(1, 3)).sum().backward()
    metrics = group.all_reduce_gradients(model, {"loss": 0.5 + group.rank})
    gradients = [branch.weight.grad for branch in model.branches]
    return {
        "metrics": metrics,
        "gradients": [None if gradient is None else gradient.tolist() for gradient in gradients],
    }


def broadcast_tensors(group):
    """Return parameters and buffers of all kinds that differed between processes, after the broadcast."""
    model, rank = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last), group.rank
    model.register_buffer("windows", torch.arange(4) + rank)
    model.register_buffer("seen", torch.tensor([rank == 0, True]))
    model.register_buffer("empty", torch.zeros(0))
    model.register_buffer("number", torch.tensor(0.5 + rank))
    group.broadcast_parameters(model)
    return {name: value.tolist() for name, value in model.state_dict().items()}


def slices_of(group):
    """Return the images and the share of this process in batches of several sizes."""
    slices = {}
    for size in (1, 2, 5):
        images, numbers = torch.zeros(size, 1, 2, 2), torch.arange(size)
        own, share = group.slice_of(Batch(images, numbers, images, numbers))
        slices[size] = [own.indices.tolist(), share]
    return slices


def evaluation(group, *overrides):
    """Evaluate a split in one process and in all of them; the last batch has one image."""
    components, model, _, _ = setting("trainer.batch_size=27", *overrides)
    batches = components.batches(components.dataset.read("test").take(torch.arange(55)), limit=None)
    single, all_processes = (
        evaluate(model, batches, components.loss, Step(0, 1), processes=processes)
        for processes in (SINGLE, group)
    )
    return {"single": single, "group": all_processes}


def trained(group, path, *overrides, trouble=""):
    """Train in a directory; return why the run stopped, and sums over the weights of this process."""
    settings, models = composed(*overrides), []
    components = build_components(settings, plugins=["signalling_loss"])
    new_model = components.new_model
    components = components._replace(new_model=lambda: models.append(new_model()) or models[0])
    run, reason = RunDir(path, writes=group.is_main), ""
    os.environ["TROUBLE"] = trouble
    try:
        with contextlib.ExitStack() as stack:
            if group.is_main:
                stack.enter_context(run.locked())
                run.check_config(settings, resume="auto", command=["capsexp", "train"])
                stack.enter_context(run.track_status({}))
            train(components, run, settings, group)
    except RunStopped as stopped:
        reason = str(stopped)
    return {
        "reason": reason,
        "weights": [tensor.double().sum().item() for tensor in models[0].state_dict().values()],
    }


def timed(group, path):
    """Train for two seconds; a step takes a quarter of one on the clock of rank 0, and three of rank 1."""
    ticks, real = itertools.count(step=(1 + 2 * group.rank) * 250_000_000), timing.now
    timing.now = lambda: next(ticks)
    try:
        return trained(group, path, *DYNAMIC, *SHORT, "trainer.max_seconds=2", "trainer.max_epochs=null")
    finally:
        timing.now = real


def main(folder):
    group, report = torchrun.processes(), {}
    report["slices"], report["missing"] = slices_of(group), missing_gradients(group)
    report["broadcast"] = broadcast_tensors(group)
    for name, overrides in (("dynamic", DYNAMIC), ("em", EM)):
        for accumulate, size in GRADIENTS:
            report[f"{name} {accumulate} {size}"] = compare_gradients(group, accumulate, size, *overrides)
    for size in (33, 2):
        report[f"norms 1 {size}"] = compare_gradients(group, 1, size, *VB)
    crops = ("dataset.preprocess.resize=12", "dataset.preprocess.crop=6", "dataset.preprocess.test_crops=13")
    report["evaluation"] = evaluation(group, *DYNAMIC)
    report["crops"] = evaluation(group, *DYNAMIC, *crops)
    report["capsnet"] = trained(group, folder / "capsnet", *DYNAMIC, *SHORT)
    report["timed"] = timed(group, folder / "timed")
    report["norms"] = trained(group, folder / "norms", *VB, *SHORT, "trainer.ema_decay=0.9")
    report["whole"] = trained(group, folder / "whole", *BASELINE)
    report["stopped"] = trained(group, folder / "stopped", *BASELINE, trouble="0:1:6:15")
    if group.is_main:
        shutil.copytree(folder / "stopped", folder / "to one")
        trained(SINGLE, folder / "to one", *BASELINE)
        trained(SINGLE, folder / "from one", *BASELINE, trouble="0:0:6:15")
        trained(SINGLE, folder / "capsnet single", *DYNAMIC, *SHORT)
        trained(SINGLE, folder / "norms single", *VB, *SHORT, "trainer.ema_decay=0.9")
    report["resumed"] = trained(group, folder / "stopped", *BASELINE)
    report["nan"] = trained(group, folder / "nan", *BASELINE, trouble="0:1:6:nan")
    report["from one"] = trained(group, folder / "from one", *BASELINE)
    (folder / f"{group.rank}.json").write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(torchrun.run_distributed(lambda: main(Path(sys.argv[1]))))
