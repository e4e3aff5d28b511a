"""Fast paths of the routing algorithms, each held by tests to the plain one."""

import importlib.util

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether the kernels for CUDA can be imported; there are builds of Triton for Linux alone."""
