"""A loss that gets a run into trouble at a certain step, for the tests of runs of several processes."""

import math
import os
import signal
import time

import torch

from capsexp.loss.cross_entropy import CrossEntropy


class SignallingLoss(CrossEntropy):
    """Cross-entropy that once does what TROUBLE says: words of ATTEMPT:RANK:STEP:WHAT."""

    def __call__(self, output, batch, step):
        terms = super().__call__(output, batch, step)
        attempt, rank = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "RANK"))
        for word in os.environ.get("TROUBLE", "").split():
            when, what = word.rsplit(":", 1)
            if when == f"{attempt}:{rank}:{step.number}" and torch.is_grad_enabled():
                del os.environ["TROUBLE"]
                terms["cross_entropy"] = terms["cross_entropy"] * self.make_trouble(what)
        return terms

    def make_trouble(self, what):
        if what == "bug":
            raise RuntimeError("this is a bug")
        if what == "stop-torchrun":
            os.kill(os.getppid(), signal.SIGTERM)
            noted = signal.getsignal(signal.SIGTERM).__self__
            while noted.number is None:  # until torchrun has passed it on
                time.sleep(0.01)
        elif what != "nan":
            os.kill(os.getpid(), int(what))
        return math.nan if what == "nan" else 1.0
