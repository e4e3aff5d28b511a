"""Inputs of the numeric examples in tests of routings: numbers that any language can make."""

import math

import torch


def wave(shape, phase=0.0, scale=1.0):
    """scale * sin(1 + 0.7 k + ((0.3 k^2) mod 5) + phase) for k = 0, 1, …, in C order, float64."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(1 + 0.7 * k + (0.3 * k**2) % 5 + phase)).view(shape)
