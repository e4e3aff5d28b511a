"""A loss that makes a run fail at a certain step, for the tests of distributed runs."""

import math
import os
import signal
import time

import torch

from capsexp.loss.cross_entropy import CrossEntropy


class SignallingLoss(CrossEntropy):
    """Cross-entropy that fails once as the variable TROUBLE says, a list of ATTEMPT:RANK:STEP:FAILURE.

    FAILURE is `bug`, `nan`, `stop-torchrun` (send it SIGTERM), or the number of a signal for this process.
    """

    def __call__(self, output, batch, step):
        terms = super().__call__(output, batch, step)
        attempt, rank = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "RANK"))
        for entry in os.environ.get("TROUBLE", "").split():
            when, failure = entry.rsplit(":", 1)
            if when == f"{attempt}:{rank}:{step.number}" and torch.is_grad_enabled():
                del os.environ["TROUBLE"]
                terms["cross_entropy"] = terms["cross_entropy"] * self.fail(failure)
        return terms

    def fail(self, failure):
        """Return the factor of the loss, unless the failure ends this process."""
        if failure == "bug":
            raise RuntimeError("this is a bug")
        if failure == "stop-torchrun":
            os.kill(os.getppid(), signal.SIGTERM)
            stop_signal = signal.getsignal(signal.SIGTERM).__self__
            while stop_signal.number is None:  # until torchrun has sent it to this process
                time.sleep(0.01)
        elif failure != "nan":
            os.kill(os.getpid(), int(failure))
        return math.nan if failure == "nan" else 1.0
