"""Layers, inputs and the loops of the paper, for the tests of EM routing."""

from typing import get_args

import pytest
import torch
from torch.distributions import Normal

from capsexp.ops.em_steps import EMOptions
from capsexp.ops.receptive_fields import Grid, receptive_fields
from capsexp.routing import em
from capsexp.routing.em import em_routing_and_cost
from capsexp.schedule import Saturating

PAPER = {
    "variance_floor": 0.0005,
    "cost_scale": 1.0,
    "normalisation": "paper",
    "initial_coupling": "paper",
    "activation": "logistic",
    "mean_smoothing": 0.0,
    "detach": False,
}
MODULE = {  # keywords of `EMRouting`
    **{name: value for name, value in PAPER.items() if name != "cost_scale"},
    "iterations": 3,
    "inverse_temperature": Saturating(limit=0.01, decay=0.95),
    "inverse_temperature_ramp": 1.0,
    "class_factor": 0.25,
    "beta_u": 0.0,
    "beta_a": "balanced",
    "beta_a_gain": 250,
    "cost_norm": None,
    "implementation": "auto",
}
PAPERS_LAMBDA = (5.0e-4, 9.75e-4, 1.426e-3)
STRONG = (0.3, 0.5, 0.4)  # activations and their competition count

# rows, columns, child types, kernel, stride, parent types
WINDOWS = [
    (5, 5, 2, (3, 3), 1, 2),
    (6, 6, 1, (3, 3), 2, 2),
    (5, 7, 2, (3, 2), 2, 2),
    (4, 3, 1, (2, 3), 1, 3),
    (7, 4, 1, (2, 2), 3, 2),
    (4, 5, 2, (1, 1), 2, 2),
    (3, 3, 2, (3, 3), 1, 1),
    (1, 1, 1, (1, 1), 1, 2),
]
DENSE = [(7, 3), (1, 3), (5, 1), (1, 1)]  # children, parents
LAYERS = [*WINDOWS, *DENSE]
SWITCHES = [
    {"normalisation": "types"},
    {"normalisation": "official_v1"},
    {"initial_coupling": "official"},
    {"activation": "mixing"},
    {"mean_smoothing": 0.1},
    {"cost_scale": 2.5},
    {"variance_floor": 0.3},
    {"detach": True},
    {"detach": True, "mean_smoothing": 0.3, "normalisation": "types"},
]
EVERY_LAYER = pytest.mark.parametrize("layer", LAYERS, ids=str)
EVERY_WINDOW = pytest.mark.parametrize("layer", WINDOWS, ids=str)
NORMALISATION = pytest.mark.parametrize("normalisation", get_args(em.Normalisation))


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fields_of(layer):
    if len(layer) == 2:
        return None
    rows, columns, types, kernel, stride, _ = layer
    return receptive_fields(Grid(rows, columns), types, kernel, stride)


def seen_by(layer):
    """Children of each position, place by place."""
    if len(layer) == 2:
        return [list(range(layer[0]))]
    return windows_by_loops(*layer[:-1])


def windows_by_loops(rows, columns, types, kernel, stride):
    """Children of each position of a convolutional layer, place by place."""
    return [
        [
            ((row + r) * columns + column + c) * types + kind
            for r in range(kernel[0])
            for c in range(kernel[1])
            for kind in range(types)
        ]
        for row in range(0, rows - kernel[0] + 1, stride)
        for column in range(0, columns - kernel[1] + 1, stride)
    ]


def example(layer, *, batch=2, dim=3, seed=0):
    """Votes, activations, beta_u, beta_a."""
    windows, types = seen_by(layer), layer[-1]
    children = layer[0] if len(layer) == 2 else layer[0] * layer[1] * layer[2]
    votes = random(batch, len(windows), len(windows[0]), types, dim, seed=seed)
    activations = random(batch, children, seed=seed + 1).sigmoid()
    return votes, activations, random(types, seed=seed + 2), random(types, seed=seed + 3)


def route(layer, votes, activations, beta_u, beta_a, temperatures=STRONG, **changes):
    """Poses, activations, coupling [B, P, K, J], cost."""
    routed, cost = em_routing_and_cost(
        votes,
        activations,
        EMOptions(**{**PAPER, **changes}),
        fields=fields_of(layer),
        beta_u=beta_u,
        beta_a=beta_a,
        inverse_temperature=torch.tensor(temperatures, dtype=torch.float64).to(beta_a.dtype),
    )
    return routed.poses, routed.activations, routed.coupling.view(votes.shape[:4]), cost


def procedure_1(layer, votes, activations, beta_u, beta_a, temperatures=STRONG, **changes):
    """What `route` returns, by the loops of the paper."""
    switches = {**PAPER, **changes}
    windows, types = seen_by(layer), range(votes.shape[3])
    parents = [(p, j) for p in range(len(windows)) for j in types]
    seen = {i: [p for p, window in enumerate(windows) if i in window] for i in range(activations.shape[1])}
    official = switches["initial_coupling"] == "official"
    coupling = {
        (i, p, j): votes.new_tensor(1 / (len(types) * (1 if official else len(seen[i])))).expand(len(votes))
        for p, j in parents
        for i in windows[p]
    }
    mean = {parent: torch.zeros_like(votes[:, 0, 0, 0]) for parent in parents}
    for iteration, temperature in enumerate(temperatures):
        active, log_density, costs, masses = {}, {}, {}, {}
        for p, j in parents:
            r = torch.stack([coupling[i, p, j] * activations[:, i] for i in windows[p]], 1).unsqueeze(2)
            v = votes[:, p, :, j]
            before, smoothing = mean[p, j], switches["mean_smoothing"]
            if switches["detach"]:
                before = before.detach()
            mu = (1 - smoothing) * (r * v).sum(1) / r.sum(1) + smoothing * before
            variance = (r * (v - mu.unsqueeze(1)) ** 2).sum(1) / r.sum(1) + switches["variance_floor"]
            sigma, mass = variance.sqrt(), r.sum((1, 2))
            cost = switches["cost_scale"] * sum((beta_u[j] + s.log()) * mass for s in sigma.unbind(1))
            density = Normal(mu.unsqueeze(1), sigma.unsqueeze(1), validate_args=False)
            for k, i in enumerate(windows[p]):
                log_density[i, p, j] = density.log_prob(v).sum(2)[:, k]
            mean[p, j], costs[p, j], masses[p, j] = mu, cost, mass
            active[p, j] = 1 / (1 + (-temperature * (beta_a[j] - cost)).exp())
        if switches["activation"] == "mixing":
            active = {parent: masses[parent] / sum(masses.values()) for parent in parents}
        if iteration + 1 == len(temperatures):
            break
        rivals = {
            "paper": lambda parent, other: True,
            "types": lambda parent, other: parent[0] == other[0],
            "official_v1": lambda parent, other: len(windows) == 1 or parent[1] == other[1],
        }[switches["normalisation"]]
        for i in seen:
            logs = {(p, j): active[p, j].log() + log_density[i, p, j] for p in seen[i] for j in types}
            for parent in logs:
                total = torch.stack([logs[other] for other in logs if rivals(parent, other)]).logsumexp(0)
                share = (logs[parent] - total).exp()
                coupling[(i, *parent)] = share.detach() if switches["detach"] else share
    shares = [[[coupling[i, p, j] for j in types] for i in window] for p, window in enumerate(windows)]
    return (
        torch.stack([mean[parent] for parent in parents], 1),
        torch.stack([active[parent] for parent in parents], 1),
        torch.stack([torch.stack([torch.stack(k, 1) for k in p], 1) for p in shares], 1),
        torch.stack([costs[parent] for parent in parents], 1).view(len(votes), len(windows), -1),
    )


def values_and_gradients(run, inputs):
    """Results, then gradients of a random linear function of them."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    results = run(*inputs)
    loss = sum((tensor * random(*tensor.shape, seed=9).to(tensor)).sum() for tensor in results)
    return [tensor.detach() for tensor in results], torch.autograd.grad(loss, inputs, materialize_grads=True)


def assert_all_close(expected, got, **tolerances):
    for tensor, other in zip(expected, got, strict=True):
        torch.testing.assert_close(other, tensor, **tolerances)


def mean_log_ratio(errors, slack=1e-7):
    """Return for each tensor the mean over draws of log2 of the ratio of two relative errors.

    1 means that the second error is typically twice the first. One draw near a tie, where both errors are
    large and differ by chance, weighs little in this mean.

    Args:
        errors: [draws, tensors, 2].
        slack: an error that is as good as 0; a number, or one for each tensor.
    """
    allowed, got = torch.as_tensor(errors, dtype=torch.float64).unbind(2)
    return ((got + slack / 2) / (allowed + slack / 2)).log2().mean(0)
