"""Triton's kernels are compiled for a GPU that need not be there, with the arguments of real calls."""

import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed: it is built for Linux only")

# In a process of its own: the driver is Triton's for good, and kernels are compiled instead of launched.
PROGRAM = """
import importlib, inspect, sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class AbsentH100:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0
    def get_active_torch_device(self): return torch.device("cpu")

def compiling(self, grid):
    def call(*arguments, **keywords):
        kernel = self.run(*arguments, grid=grid, warmup=True, **keywords)
        assert len(kernel.asm["cubin"]) > 0
        compiled.add(self.fn.__name__)
    return call

compiled = set()
driver.set_active(AbsentH100())
JITFunction.__getitem__ = compiling
dtype = getattr(torch, sys.argv[1])

from capsexp.ops.kernels import dynamic_triton, em_triton
from capsexp.ops.receptive_fields import Grid, receptive_fields

fields = receptive_fields(Grid(6, 6), 2, (3, 3), 2)
positions, places = fields.children.shape
given = (
    torch.randn(2, fields.in_caps, 16, dtype=dtype), torch.randn(places, 16, 4, 4, dtype=dtype),
    torch.rand(2, fields.in_caps, dtype=dtype), torch.zeros(16), torch.zeros(16), torch.ones(3),
    torch.full((positions, places), 1 / 16), fields.children, torch.arange(places), None,
)
switches = (0.001, 1.0, 0.1, "paper", False)
poses, activations, *saved = em_triton.em_forward(*given, *switches, True)
em_triton.em_backward(poses, activations, None, *given, *saved, *switches)

votes = torch.randn(2, 10, 50, 16, dtype=dtype)
passes = dynamic_triton.dynamic_forward(votes, torch.zeros(50, 10), None, 3, False)
dynamic_triton.dynamic_backward(votes, passes, passes[-1], None, True)
print(*sorted(compiled))
"""
LAUNCHED = {"_fit", "_softmax", "_softmax_backward", "_fit_backward", "_products", "_sum_of_children"}
LAUNCHED |= {"_route", "_route_backward", "_add_outer"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kernel_compiles_for_a_gpu_that_is_not_there(dtype):
    child = subprocess.run([sys.executable, "-c", PROGRAM, dtype], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert set(child.stdout.split()) == LAUNCHED
