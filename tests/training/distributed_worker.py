"""What each process does that tests/test_parallel.py starts: everything that one start can show.

Usage: python distributed_worker.py FOLDER. Writes FOLDER/RANK.json.
"""

import contextlib
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
from capsexp.training.evaluate import evaluate
from capsexp.training.gradients import gradients
from capsexp.training.parallel import SINGLE
from capsexp.training.run_dir import RunDir
from capsexp.training.train import train

CPU = ("device=cpu", "device.allocator=default", "device.threads=1")
DYNAMIC = (*CPU, "model.conv_channels=8", "model.primary_types=2", "model.decoder.hidden=[8,8]")
GRADIENTS = ((1, 33), (3, 33), (1, 2))  # accumulate and size of the batch
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
EM = (*CPU, "model=em_routing", "model.conv_types=[4]", "model.conv_kernels=[2]", "model.conv_strides=[1]")


def composed(*overrides):
    return to_plain(compose("train", list(overrides), config_dir=None))


def setting(*overrides, dtype=torch.float32):
    """Components of a run, a network that starts alike in every process, and the data set's first batch."""
    components = build_components(composed(*overrides), plugins=[])
    torch.manual_seed(1)
    model = components.new_model()
    batches = components.batches(components.dataset.read("train"), limit=None)
    if hasattr(model, "calibrate"):
        model.calibrate(next(batches.in_order()).images)
    batch = next(batches.training(0))
    pictures = {"images": batch.images.to(dtype), "pixels": batch.pixels.to(dtype)}
    return components, model.to(dtype), batch._replace(**pictures), batches


def distance(ours, theirs):
    """Largest difference over all tensors, each relative to its largest element."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


def gradient_of(model, components, batch, processes):
    told = gradients(model, components.loss, batch, Step(0, 1), components.trainer, processes=processes)
    return told, [parameter.grad.clone() for parameter in model.parameters()]


def gradients_agree(together, accumulate, size, *overrides):
    """How far gradients and figures of all processes are from those of one, for both precisions."""
    report, exact = {}, None
    for dtype in (torch.float64, torch.float32):
        components, model, batch, _ = setting(f"trainer.batch_size={size}", *overrides, dtype=dtype)
        expected, alone = gradient_of(model, components, batch, SINGLE)
        components.trainer.accumulate = accumulate
        told, ours = gradient_of(model, components, batch, together)
        exact = exact or alone
        sums = together.gather([gradient.double().sum().item() for gradient in ours])
        report[str(dtype)] = {
            "to one process": distance(ours, alone),
            "to the truth": distance([gradient.double() for gradient in ours], exact),
            "of one process to the truth": distance([gradient.double() for gradient in alone], exact),
            "figures": {name: [told[name], expected[name]] for name in expected},
            "same in all": all(one == sums[0] for one in sums),
        }
    return report


class Branches(nn.Module):
    """One matrix for each of two classes, as a mixture of experts has them, and one that nobody uses."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(3, 1, bias=False) for _ in range(3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


def missing_gradients(together):
    """Which matrices have a gradient in the end, if each process used another one."""
    torch.manual_seed(0)
    model = Branches()
    model.branches[together.rank](torch.ones(1, 3)).sum().backward()
    told = together.all_reduce_gradients(model, {"loss": 0.5 + together.rank})
    found = [branch.weight.grad for branch in model.branches]
    return {"told": told, "gradients": [None if one is None else one.tolist() for one in found]}


def aligned(together):
    """Parameters and buffers of all kinds that differed between processes, after `align`."""
    model, rank = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last), together.rank
    model.register_buffer("windows", torch.arange(4) + rank)
    model.register_buffer("seen", torch.tensor([rank == 0, True]))
    model.register_buffer("empty", torch.zeros(0))
    model.register_buffer("number", torch.tensor(0.5 + rank))
    together.broadcast_parameters(model)
    return {name: value.tolist() for name, value in model.state_dict().items()}


def slices(together):
    """Pictures and share of this process in batches of several sizes."""
    found = {}
    for size in (1, 2, 5):
        pictures, numbers = torch.zeros(size, 1, 2, 2), torch.arange(size)
        part, share = together.slice_of(Batch(pictures, numbers, pictures, numbers))
        found[size] = [part.indices.tolist(), share]
    return found


def evaluation(together, *overrides):
    """Figures over a split by one process and by all; the last batch holds one picture."""
    components, model, _, _ = setting("trainer.batch_size=27", *overrides)
    batches = components.batches(components.dataset.read("test").take(torch.arange(55)), limit=None)
    figures = [
        evaluate(model, batches, components.loss, Step(0, 1), processes=one) for one in (SINGLE, together)
    ]
    return dict(zip(("alone", "together"), figures, strict=True))


def trained(together, path, *overrides, trouble=""):
    """Train in a directory; why it stopped, if it did, and sums over the weights of this process."""
    settings, models = composed(*overrides), []
    components = build_components(settings, plugins=["signalling_loss"])
    new_model = components.new_model
    components = components._replace(new_model=lambda: models.append(new_model()) or models[0])
    run, reason = RunDir(path, writes=together.is_main), ""
    os.environ["TROUBLE"] = trouble
    try:
        with contextlib.ExitStack() as stack:
            if together.is_main:
                stack.enter_context(run.locked())
                run.check_config(settings, resume="auto", command=["capsexp", "train"])
                stack.enter_context(run.track_status({}))
            train(components, run, settings, together)
    except RunStopped as stopped:
        reason = str(stopped)
    return {
        "reason": reason,
        "weights": [one.double().sum().item() for one in models[0].state_dict().values()],
    }


def main(folder):
    together, report = torchrun.processes(), {}
    report["slices"], report["missing"] = slices(together), missing_gradients(together)
    report["aligned"] = aligned(together)
    for name, overrides in (("dynamic", DYNAMIC), ("em", EM)):
        for accumulate, size in GRADIENTS:
            found = gradients_agree(together, accumulate, size, *overrides)
            report[f"{name} {accumulate} {size}"] = found
    crops = ("dataset.preprocess.resize=12", "dataset.preprocess.crop=6", "dataset.preprocess.test_crops=13")
    report["evaluation"], report["crops"] = (
        evaluation(together, *DYNAMIC),
        evaluation(together, *DYNAMIC, *crops),
    )
    report["capsnet"] = trained(together, folder / "capsnet", *DYNAMIC, *SHORT)
    report["whole"] = trained(together, folder / "whole", *BASELINE)
    report["stopped"] = trained(together, folder / "stopped", *BASELINE, trouble="0:1:6:15")
    if together.is_main:
        shutil.copytree(folder / "stopped", folder / "to one")
        trained(SINGLE, folder / "to one", *BASELINE)
        trained(SINGLE, folder / "from one", *BASELINE, trouble="0:0:6:15")
        trained(SINGLE, folder / "capsnet alone", *DYNAMIC, *SHORT)
    report["resumed"] = trained(together, folder / "stopped", *BASELINE)
    report["nan"] = trained(together, folder / "nan", *BASELINE, trouble="0:1:6:nan")
    report["from one"] = trained(together, folder / "from one", *BASELINE)
    (folder / f"{together.rank}.json").write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(torchrun.run_distributed(lambda: main(Path(sys.argv[1]))))
