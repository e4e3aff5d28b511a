"""A loss that ends its process in a configured way, unless the working folder contains a file `fixed`."""

import os
import signal
import sys
from pathlib import Path

import torch

from capsexp.loss.margin import Margin

FAIL_AT = 3


def exhaust_memory():
    torch.empty(2**58)


def raise_error():
    raise KeyError("a bug")


def preempt():
    Path("fixed").write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGUSR2)


WAYS = {
    "preempted": preempt,
    "raise": raise_error,
    "exit": lambda: sys.exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "memory": exhaust_memory,
    "silent": lambda: os._exit(0),
}


class Loss(Margin):
    def __init__(self, *, how: str, **settings):
        super().__init__(**settings)
        self.how = how

    def __call__(self, output, batch, step):
        if step.number == FAIL_AT and self.how in WAYS and not Path("fixed").exists():
            WAYS[self.how]()
        return super().__call__(output, batch, step)
