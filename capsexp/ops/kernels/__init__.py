"""Fused implementations of the routing algorithms. Tests compare each with its reference."""

import importlib.util

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether the CUDA kernels can be imported. Triton is built for Linux only."""
