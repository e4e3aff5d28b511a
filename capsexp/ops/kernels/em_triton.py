"""EM routing of one layer of matrix capsules in Triton: forward, and backward through all iterations.

The formulas, and the tensors saved for the backward pass, are those of em.cpp. Votes are computed again
wherever they are needed and never stored. One program owns the parents of some types at one position of one
image; the softmax of a child gathers over the places at which it occurs. Only the sum of matrices that
several places share depends on the order in which programs run.

Sizes: B images, I children, P positions, K places of a window, J types (padded to Jp), D = rows * side
numbers of a pose, T iterations. A tile of votes is [places, rows, columns, types], each padded to a power of
two. Inputs in half precision and in float32 are computed in float32, those in float64 in float64.
"""
# ruff: noqa: N803 - Triton writes a kernel's constants in capitals.

from typing import Any, NamedTuple, no_type_check

import torch
import torch.nn.functional as F
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

SMALLEST_MASS = tl.constexpr(1e-8)  # as in capsexp/ops/em_steps.py
MOST_TYPES = 16  # in a tile; more would leave no room for places
VOTES = 2048  # in a tile: 16 numbers for each of 128 threads, with two or three such tiles in registers
PRODUCTS = 4096  # in a tile of pose times gradient: 16 for each of 256 threads
GROUPED = 1024  # in a tile of a softmax, or of a sum over the places of a child
SEEN = 16  # places of a child at a time: one step for a 3x3 window at stride 1, where there are 9
PROGRAMS = 1024  # for the gradient of the matrices: about 8 for each of the 132 processors of an H100
WARPS, PRODUCT_WARPS = 4, 8

# `no_type_check` keeps jaxtyping's import hook away: Triton reads a function's own source and globals.


@triton.jit
@no_type_check
def _tile(
    poses, weight, offsets, activations, initial, coupling, child, matrix, at, start, j, children, positions,
    places, types, ROWS: tl.constexpr, SIDE: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, FIRST: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Place k, whether it exists; a_i; R_ij [k, j]; votes [k, row, column, j]. Past the window: 0."""
    k = start + tl.arange(0, BLOCK_K)
    there = k < places
    row, column = tl.arange(0, R), tl.arange(0, S)
    i = at // positions * children + tl.load(child + at % positions * places + k, mask=there, other=0)
    active = tl.load(activations + i, mask=there, other=0).to(ACC)
    if FIRST:
        share = tl.load(initial + at % positions * places + k, mask=there, other=0).to(ACC)
        share = tl.where((j < types)[None, :], share[:, None], 0)
    else:
        slots_of_places = (at * places + k)[:, None] * PADDED + j[None, :]
        share = tl.load(coupling + slots_of_places, mask=there[:, None], other=0)
    entries = weight + tl.load(matrix + k, mask=there, other=0) * (SIDE * SIDE * PADDED)
    entries = entries[:, None, None] + column[None, :, None] * PADDED + j[None, None, :]
    numbers = poses + (i * (ROWS * SIDE))[:, None] + row[None, :] * SIDE
    votes = tl.zeros([BLOCK_K, R, S, BLOCK_J], ACC)
    for n in tl.range(SIDE, loop_unroll_factor=4):  # 16 at once would not fit in the registers
        mask = there[:, None, None] & (column < SIDE)[None, :, None]
        w = tl.load(entries + n * SIDE * PADDED, mask=mask, other=0).to(ACC)
        pose = tl.load(numbers + n, mask=there[:, None] & (row < ROWS)[None, :], other=0).to(ACC)
        votes += pose[:, :, None, None] * w[:, None, :, :]
    if offsets is not None:
        h = row[None, :, None] * SIDE + column[None, None, :]
        mask = there[:, None, None] & (row < ROWS)[None, :, None] & (column < SIDE)[None, None, :]
        added = tl.load(offsets + (k * (ROWS * SIDE))[:, None, None] + h, mask=mask, other=0).to(ACC)
        votes += added[:, :, :, None]
    return k, there, active, share, votes


@triton.jit
@no_type_check
def _over_pose(numbers):
    """[..., rows, columns, types] summed over rows and columns, for tiles with a place and without."""
    if len(numbers.shape) == 4:
        return tl.sum(tl.sum(numbers, 2), 1)
    else:
        return tl.sum(tl.sum(numbers, 1), 0)


@triton.jit
@no_type_check
def _as_divisor(mass, BLOCK_J: tl.constexpr, ACC: tl.constexpr):
    """A mass as a divisor."""
    return tl.maximum(mass, tl.full([BLOCK_J], SMALLEST_MASS, ACC))  # a plain number would be float32


@triton.jit
@no_type_check
def _logistic(z):
    """sigmoid(z), sigmoid(-z), log sigmoid(z)."""
    e = tl.exp(-tl.abs(z))
    u = 1 + e
    log1p = tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1, u - 1)))
    large, small = 1 / u, e / u
    on = tl.where(z > 0, large, small)
    off = tl.where(z > 0, small, large)
    return on, off, tl.minimum(z, 0) - log1p


@triton.jit
@no_type_check
def _fit(
    poses, weight, offsets, activations, initial, coupling, child, matrix, beta_u, beta_a, temperatures,
    before, mean, variance, stats, density, out_poses, out_activations, t, children, positions, places, types,
    FLOOR: tl.constexpr, SCALE: tl.constexpr, SMOOTH: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    ROWS: tl.constexpr, SIDE: tl.constexpr, R: tl.constexpr, S: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """M-step of the parents at one position; densities of the E-step, not yet normalized, or the results."""
    at = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    row, column = tl.arange(0, R)[:, None, None], tl.arange(0, S)[None, :, None]
    inside = (row < ROWS) & (column < SIDE) & (j >= 0)[None, None, :]
    real = inside & (j < types)[None, None, :]
    h = (at * (ROWS * SIDE) + row * SIDE + column) * PADDED + j[None, None, :]

    masses = tl.zeros([BLOCK_K, BLOCK_J], ACC)
    sums = tl.zeros([BLOCK_K, R, S, BLOCK_J], ACC)
    for start in range(0, places, BLOCK_K):
        k, there, active, share, votes = _tile(
            poses, weight, offsets, activations, initial, coupling, child, matrix, at, start, j, children,
            positions, places, types, ROWS, SIDE, R, S, PADDED, BLOCK_J, BLOCK_K, FIRST, ACC,
        )  # fmt: skip
        r = share * active[:, None]
        masses += r
        sums += r[:, None, None, :] * votes
    mass = tl.sum(masses, 0)
    divisor = _as_divisor(mass, BLOCK_J, ACC)[None, None, :]
    middle = tl.sum(sums, 0) / divisor
    if SMOOTH != 0:
        middle = (1 - SMOOTH) * middle
        if not FIRST:
            middle += SMOOTH * tl.load(before + h, mask=inside, other=0)

    sums = tl.zeros([BLOCK_K, R, S, BLOCK_J], ACC)
    for start in range(0, places, BLOCK_K):
        k, there, active, share, votes = _tile(
            poses, weight, offsets, activations, initial, coupling, child, matrix, at, start, j, children,
            positions, places, types, ROWS, SIDE, R, S, PADDED, BLOCK_J, BLOCK_K, FIRST, ACC,
        )  # fmt: skip
        d = votes - middle[None, :, :, :]
        sums += (share * active[:, None])[:, None, None, :] * (d * d)
    spread = tl.sum(sums, 0) / divisor
    whole = tl.where(real, spread + FLOOR, 1)
    log_deviation = 0.5 * _over_pose(tl.log(whole))
    bias_u = tl.load(beta_u + j, mask=j < types, other=0).to(ACC)
    bias_a = tl.load(beta_a + j, mask=j < types, other=0).to(ACC)
    cost = SCALE * (ROWS * SIDE * bias_u + log_deviation) * mass
    logit = tl.load(temperatures + t).to(ACC) * (bias_a - cost)
    on, _off, log_on = _logistic(logit)
    tl.store(mean + h, middle, mask=inside)
    tl.store(variance + h, spread, mask=inside)
    stats_at = stats + at * (3 * PADDED) + j
    tl.store(stats_at, mass)
    tl.store(stats_at + PADDED, log_deviation)
    tl.store(stats_at + 2 * PADDED, logit)
    if LAST:
        parent = at * types + j
        number = parent[None, None, :] * (ROWS * SIDE) + row * SIDE + column
        tl.store(out_poses + number, middle, mask=real)
        tl.store(out_activations + parent, on, mask=j < types)
    else:
        precision = 1 / whole
        for start in range(0, places, BLOCK_K):
            k, there, active, share, votes = _tile(
                poses, weight, offsets, activations, initial, coupling, child, matrix, at, start, j, children,
                positions, places, types, ROWS, SIDE, R, S, PADDED, BLOCK_J, BLOCK_K, FIRST, ACC,
            )  # fmt: skip
            d = votes - middle[None, :, :, :]
            distance = _over_pose(d * d * precision[None, :, :, :])
            to = density + (at * places + k)[:, None] * PADDED + j[None, :]
            tl.store(to, (log_on - log_deviation)[None, :] - 0.5 * distance, mask=there[:, None])


@triton.jit
@no_type_check
def _of_groups(order, begin, count, start, types, PADDED: tl.constexpr, BLOCK_M: tl.constexpr):
    """Offsets of slots `start` and up of each group, [g, m, j]; which exist; which are not padding."""
    m = (start + tl.arange(0, BLOCK_M))[None, :]
    here = m < count[:, None]
    slot = tl.load(order + begin[:, None] + m, mask=here, other=0)
    j = tl.arange(0, PADDED)[None, None, :]
    return slot[:, :, None] * PADDED + j, here[:, :, None] & (j >= 0), here[:, :, None] & (j < types)


@triton.jit
@no_type_check
def _softmax(
    shares, order, begins, groups, slots, types, ACROSS_TYPES: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Logarithms of densities [B, slots, Jp] to R, in place, over slots order[begins[g] : begins[g + 1]]."""
    g = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    begin = tl.load(begins + g, mask=g < groups, other=0)
    count = tl.load(begins + g + 1, mask=g < groups, other=0) - begin
    most = tl.max(count, 0)
    image = shares + tl.program_id(0).to(tl.int64) * slots * PADDED
    highest = tl.full([BLOCK_I, BLOCK_M, PADDED], -float("inf"), ACC)
    for start in range(0, most, BLOCK_M):
        at, here, real = _of_groups(order, begin, count, start, types, PADDED, BLOCK_M)
        highest = tl.maximum(highest, tl.load(image + at, mask=real, other=-float("inf")))
    top = tl.max(highest, 1)
    if ACROSS_TYPES:
        top = tl.max(top, 1)[:, None]
    totals = tl.zeros([BLOCK_I, BLOCK_M, PADDED], ACC)
    for start in range(0, most, BLOCK_M):
        at, here, real = _of_groups(order, begin, count, start, types, PADDED, BLOCK_M)
        above = tl.where(real, tl.load(image + at, mask=real, other=0) - top[:, None, :], 0)
        totals += tl.where(real, tl.exp(above), 0)
    total = tl.sum(totals, 1)
    if ACROSS_TYPES:
        total = tl.sum(total, 1)[:, None]
    for start in range(0, most, BLOCK_M):
        at, here, real = _of_groups(order, begin, count, start, types, PADDED, BLOCK_M)
        above = tl.where(real, tl.load(image + at, mask=real, other=0) - top[:, None, :], 0)
        share = tl.exp(above) / tl.where(real, total[:, None, :], 1)
        tl.store(image + at, tl.where(real, share, 0), mask=here)


@triton.jit
@no_type_check
def _softmax_backward(
    gradient, shares, order, begins, groups, slots, types, ACROSS_TYPES: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of R to that of the logarithms, in place: R (gR - sum of R gR over the competitors)."""
    g = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    begin = tl.load(begins + g, mask=g < groups, other=0)
    count = tl.load(begins + g + 1, mask=g < groups, other=0) - begin
    most = tl.max(count, 0)
    image = tl.program_id(0).to(tl.int64) * slots * PADDED
    balances = tl.zeros([BLOCK_I, BLOCK_M, PADDED], ACC)
    for start in range(0, most, BLOCK_M):
        at, here, real = _of_groups(order, begin, count, start, types, PADDED, BLOCK_M)
        share = tl.load(shares + image + at, mask=real, other=0)
        balances += share * tl.load(gradient + image + at, mask=real, other=0)
    balance = tl.sum(balances, 1)
    if ACROSS_TYPES:
        balance = tl.sum(balance, 1)[:, None]
    for start in range(0, most, BLOCK_M):
        at, here, real = _of_groups(order, begin, count, start, types, PADDED, BLOCK_M)
        share = tl.load(shares + image + at, mask=real, other=0)
        g_share = tl.load(gradient + image + at, mask=real, other=0)
        tl.store(gradient + image + at, share * (g_share - balance[:, None, :]), mask=here)


@triton.jit
@no_type_check
def _fit_backward(
    poses, weight, offsets, activations, initial, coupling, child, matrix, beta_u, temperatures, before, mean,
    variance, stats, g_logits, g_poses, g_activations, g_coupling, slope, curve, carry, betas, active_parts,
    g_shares, t, parents, children, positions, places, types,
    FLOOR: tl.constexpr, SCALE: tl.constexpr, SMOOTH: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    ROWS: tl.constexpr, SIDE: tl.constexpr, R: tl.constexpr, S: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of one position's M-step t, and of the densities of the E-step after it.

    Writes `slope` and `curve`, from which a vote's gradient is computed, and the gradient of R, unless
    `g_shares` is None. Adds to the gradients of the betas and of the activations.
    """
    at = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    row, column = tl.arange(0, R)[:, None, None], tl.arange(0, S)[None, :, None]
    inside = (row < ROWS) & (column < SIDE) & (j >= 0)[None, None, :]
    real = inside & (j < types)[None, None, :]
    h = (at * (ROWS * SIDE) + row * SIDE + column) * PADDED + j[None, None, :]

    middle = tl.load(mean + h, mask=inside, other=0)
    spread = tl.load(variance + h, mask=inside, other=0)
    precision = 1 / tl.where(real, spread + FLOOR, 1)
    stats_at = stats + at * (3 * PADDED) + j
    mass = tl.load(stats_at)
    log_deviation = tl.load(stats_at + PADDED)
    on, off, _log_on = _logistic(tl.load(stats_at + 2 * PADDED))
    divisor = _as_divisor(mass, BLOCK_J, ACC)
    parent = at * types + j
    g_mean = tl.zeros([R, S, BLOCK_J], ACC)
    if LAST:
        g_logit = tl.zeros([BLOCK_J], ACC)
        if g_activations is not None:
            g_logit = tl.load(g_activations + parent, mask=j < types, other=0).to(ACC) * on * off
        if g_poses is not None:
            number = parent[None, None, :] * (ROWS * SIDE) + row * SIDE + column
            g_mean = tl.load(g_poses + number, mask=real, other=0).to(ACC)
        g_deviation = tl.zeros([BLOCK_J], ACC)
        second = tl.zeros([R, S, BLOCK_J], ACC)
    else:
        totals = tl.zeros([BLOCK_K, BLOCK_J], ACC)
        firsts = tl.zeros([BLOCK_K, R, S, BLOCK_J], ACC)
        seconds = tl.zeros([BLOCK_K, R, S, BLOCK_J], ACC)
        for start in range(0, places, BLOCK_K):
            k, there, active, share, votes = _tile(
                poses, weight, offsets, activations, initial, coupling, child, matrix, at, start, j, children,
                positions, places, types, ROWS, SIDE, R, S, PADDED, BLOCK_J, BLOCK_K, FIRST, ACC,
            )  # fmt: skip
            slots_of_places = g_logits + (at * places + k)[:, None] * PADDED + j[None, :]
            g_log = tl.load(slots_of_places, mask=there[:, None], other=0)
            d = votes - middle[None, :, :, :]
            part = g_log[:, None, None, :] * d
            totals += g_log
            firsts += part
            seconds += part * d
        total = tl.sum(totals, 0)
        g_logit = total * off
        g_deviation = -total
        g_mean = tl.sum(firsts, 0) * precision
        second = tl.sum(seconds, 0) * precision
    temperature = tl.load(temperatures + t).to(ACC)
    g_cost = -temperature * g_logit
    beta = betas + at * (2 * PADDED) + j
    tl.store(beta, tl.load(beta) + ROWS * SIDE * SCALE * mass * g_cost)
    tl.store(beta + PADDED, tl.load(beta + PADDED) + temperature * g_logit)
    g_deviation += SCALE * mass * g_cost
    bias_u = tl.load(beta_u + j, mask=j < types, other=0).to(ACC)
    constant = SCALE * (ROWS * SIDE * bias_u + log_deviation) * g_cost

    g_variance = 0.5 * precision * (second + g_deviation[None, None, :])
    fresh = middle  # the mean before smoothing
    if SMOOTH != 0:
        g_mean += tl.load(carry + h, mask=inside, other=0)
        if not FIRST:
            fresh -= SMOOTH * tl.load(before + h, mask=inside, other=0)
        fresh = fresh / (1 - SMOOTH)
    # 0 but for smoothing or hardly any mass.
    g_mean -= 2 * g_variance * (fresh - middle * (mass / divisor)[None, None, :])
    if SMOOTH != 0:
        tl.store(carry + h, SMOOTH * g_mean, mask=inside)
    alpha = (1 - SMOOTH) * g_mean / divisor[None, None, :]
    gamma = g_variance / divisor[None, None, :]
    tl.store(slope + h, alpha, mask=inside)
    tl.store(curve + h, 2 * gamma, mask=inside)
    enough = (mass > SMALLEST_MASS)[None, None, :]
    constant += _over_pose(tl.where(enough, alpha * (middle - fresh) - gamma * spread, alpha * middle))

    for start in range(0, places, BLOCK_K):
        k, there, active, share, votes = _tile(
            poses, weight, offsets, activations, initial, coupling, child, matrix, at, start, j, children,
            positions, places, types, ROWS, SIDE, R, S, PADDED, BLOCK_J, BLOCK_K, FIRST, ACC,
        )  # fmt: skip
        d = votes - middle[None, :, :, :]
        g = constant[None, :] + _over_pose(d * (alpha[None, :, :, :] + gamma[None, :, :, :] * d))
        g = tl.where((j < types)[None, :], g, 0)
        to = active_parts + (tl.program_id(1).to(tl.int64) * parents + at) * places + k
        tl.store(to, tl.load(to, mask=there, other=0) + tl.sum(share * g, 1), mask=there)
        if g_shares is not None:
            slots_of_places = (at * places + k)[:, None] * PADDED + j[None, :]
            g = g * active[:, None]
            if g_coupling is not None:
                mask = there[:, None] & (j < types)[None, :]
                g += tl.load(g_coupling + slots_of_places, mask=mask, other=0).to(ACC)
            tl.store(g_shares + slots_of_places, g, mask=there[:, None])


@triton.jit
@no_type_check
def _products(
    poses, weight, offsets, activations, initial, coupling, child, matrix, mean, variance, slope, curve,
    g_logits, pose_parts, weight_parts, parents, most_parents, children, positions, places, types,
    FLOOR: tl.constexpr, BEGIN: tl.constexpr, ITERATIONS: tl.constexpr, ROWS: tl.constexpr,
    SIDE: tl.constexpr, R: tl.constexpr, S: tl.constexpr, PADDED: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of the votes, summed over the iterations, into those of poses and matrices.

    A program owns the matrices of some places and types, for some of the positions of all images.
    The axis n of a product, [k, row, n, column, j], is the column of the pose and the row of the matrix.
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    row, column = tl.arange(0, R), tl.arange(0, S)
    there = k < places
    inside = (row < ROWS)[:, None, None] & (column < SIDE)[None, :, None] & (j >= 0)[None, None, :]
    real = inside & (j < types)[None, None, :]
    h = (row[:, None, None] * SIDE + column[None, :, None]) * PADDED + j[None, None, :]
    entry = (column[:, None, None] * SIDE + column[None, :, None]) * PADDED + j[None, None, :]
    in_matrix = (column < SIDE)[:, None, None] & (column < SIDE)[None, :, None] & (j >= 0)[None, None, :]
    of_matrix = there[:, None, None, None] & in_matrix[None, :, :, :]
    entries = tl.load(matrix + k, mask=there, other=0) * (SIDE * SIDE * PADDED)
    w = tl.load(weight + entries[:, None, None, None] + entry[None, :, :, :], mask=of_matrix, other=0).to(ACC)
    in_pose = there[:, None, None] & (row < ROWS)[None, :, None] & (column < SIDE)[None, None, :]
    number = row[None, :, None] * SIDE + column[None, None, :]
    added = tl.zeros([BLOCK_K, R, S], ACC)
    if offsets is not None:
        added += tl.load(offsets + k[:, None, None] * (ROWS * SIDE) + number, mask=in_pose, other=0).to(ACC)

    g_w = tl.zeros([BLOCK_K, R, S, S, BLOCK_J], ACC)
    first = tl.program_id(2).to(tl.int64) * most_parents
    for step in range(0, tl.minimum(most_parents, parents - first)):
        at = first + step
        i = at // positions * children + tl.load(child + at % positions * places + k, mask=there, other=0)
        active = tl.load(activations + i, mask=there, other=0).to(ACC)
        pose = tl.load(poses + i[:, None, None] * (ROWS * SIDE) + number, mask=in_pose, other=0).to(ACC)
        votes = tl.sum(pose[:, :, :, None, None] * w[:, None, :, :, :], 2) + added[:, :, :, None]
        g = tl.zeros([BLOCK_K, R, S, BLOCK_J], ACC)
        for t in tl.static_range(BEGIN, ITERATIONS):
            slot = (at + t * parents) * (ROWS * SIDE * PADDED) + h
            d = votes - tl.load(mean + slot, mask=inside, other=0)[None, :, :, :]
            if t == 0:
                share = tl.load(initial + at % positions * places + k, mask=there, other=0).to(ACC)[:, None]
            else:
                slots_of_places = ((at + (t - 1) * parents) * places + k)[:, None] * PADDED + j[None, :]
                share = tl.load(coupling + slots_of_places, mask=there[:, None], other=0)
            r = (share * active[:, None])[:, None, None, :]
            alpha = tl.load(slope + slot, mask=real, other=0)[None, :, :, :]
            g += r * (alpha + tl.load(curve + slot, mask=real, other=0)[None, :, :, :] * d)
            if t + 1 < ITERATIONS:
                precision = 1 / tl.where(real, tl.load(variance + slot, mask=inside, other=0) + FLOOR, 1)
                slots_of_places = ((at + t * parents) * places + k)[:, None] * PADDED + j[None, :]
                g_log = tl.load(g_logits + slots_of_places, mask=there[:, None], other=0)
                g -= g_log[:, None, None, :] * (d * precision[None, :, :, :])
        g_w += pose[:, :, :, None, None] * g[:, :, None, :, :]
        g_pose = tl.sum(tl.sum(g[:, :, None, :, :] * w[:, None, :, :, :], 4), 3)
        to = (tl.program_id(1).to(tl.int64) * parents + at) * places + k
        tl.store(pose_parts + to[:, None, None] * (ROWS * SIDE) + number, g_pose, mask=in_pose)
    to = (tl.program_id(2).to(tl.int64) * places + k)[:, None, None, None] * (SIDE * SIDE * PADDED)
    tl.store(weight_parts + to + entry[None, :, :, :], tl.sum(g_w, 1), mask=of_matrix)


@triton.jit
@no_type_check
def _sum_of_children(
    parts, out, order, begins, groups, slots, images, WIDTH: tl.constexpr, C: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Parts [blocks of types, B, slots, width], summed over the blocks and the places of a child."""
    image = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    begin = tl.load(begins + g, mask=g < groups, other=0)
    count = tl.load(begins + g + 1, mask=g < groups, other=0) - begin
    c = tl.arange(0, C)
    total = tl.zeros([BLOCK_I, BLOCK_M, C], ACC)
    for start in range(0, tl.max(count, 0), BLOCK_M):
        m = (start + tl.arange(0, BLOCK_M))[None, :]
        slot = tl.load(order + begin[:, None] + m, mask=m < count[:, None], other=0)
        mask = (m < count[:, None])[:, :, None] & (c < WIDTH)[None, None, :]
        for block in tl.static_range(BLOCKS):
            at = ((block * images + image) * slots + slot)[:, :, None] * WIDTH + c[None, None, :]
            total += tl.load(parts + at, mask=mask, other=0)
    to = out + (image * groups + g)[:, None] * WIDTH + c[None, :]
    tl.store(to, tl.sum(total, 1), mask=(g < groups)[:, None] & (c < WIDTH)[None, :])


class _Groups(NamedTuple):
    """Places order[begins[g] : begins[g + 1]], of all P * K, belong together."""

    order: Tensor
    begins: Tensor
    most: int
    """Slots of a group in one step."""

    @property
    def number(self) -> int:
        return len(self.begins) - 1


class _Layer:
    """Sizes of a layer, and the arguments that all kernels take."""

    def __init__(self, poses: Tensor, weight: Tensor, child: Tensor, temperatures: Tensor) -> None:
        self.batch, self.children, self.dim = poses.shape
        self.positions, self.places = child.shape
        self.types, side = weight.shape[1], weight.shape[2]
        self.iterations = len(temperatures)
        self.dtype = torch.promote_types(poses.dtype, torch.float32)
        self.padded, self.side, self.rows = triton.next_power_of_2(self.types), side, self.dim // side
        self.acc = tl.float64 if self.dtype == torch.float64 else tl.float32
        self.block_j = min(MOST_TYPES, self.padded)
        self.blocks = self.padded // self.block_j
        self.device = poses.device

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.children, self.positions, self.places, self.types

    def options(self, tile: int, *, product: bool = False) -> dict[str, Any]:
        """Constants of a kernel whose tiles have `tile` numbers."""
        r, s = triton.next_power_of_2(self.rows), triton.next_power_of_2(self.side)
        room = tile // (r * s * self.block_j * (s if product else 1))
        return {
            "ROWS": self.rows,
            "SIDE": self.side,
            "R": r,
            "S": s,
            "PADDED": self.padded,
            "BLOCK_J": self.block_j,
            "BLOCK_K": max(1, min(room, triton.next_power_of_2(self.places))),
            "ACC": self.acc,
        }

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


def em_forward(
    poses: Tensor,
    weight: Tensor,
    activations: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    temperatures: Tensor,
    initial: Tensor,
    child: Tensor,
    matrix: Tensor,
    offsets: Tensor | None,
    variance_floor: float,
    cost_scale: float,
    mean_smoothing: float,
    normalisation: str,
    detach: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Route one layer. Arguments and results are those of `em_routing_op`; half precision returns float32."""
    layer = _Layer(poses, weight, child, temperatures)
    batch, positions, iterations = layer.batch, layer.positions, layer.iterations
    read = _readable(layer, poses, weight, offsets, activations, initial, child, matrix)
    groups = _competitors(child, layer, normalisation)
    # Without keep, two slots alternate between this iteration and the one before.
    slots, steps = (iterations, iterations - 1) if keep else (min(2, iterations), min(2, iterations - 1))
    out_poses = layer.empty(batch, positions * layer.types, layer.dim)
    out_activations = layer.empty(batch, positions * layer.types)
    coupling = layer.empty(steps, batch, positions, layer.places, layer.padded)
    mean, variance = (layer.empty(slots, batch, positions, layer.dim, layer.padded) for _ in range(2))
    stats = layer.empty(slots, batch, positions, 3, layer.padded)
    options = layer.options(VOTES)
    with torch.cuda.device_of(poses):
        for t in range(iterations if batch * positions else 0):
            first, last = t == 0, t + 1 == iterations
            before = None if first or mean_smoothing == 0 else mean[(t - 1) % slots]
            density = None if last else coupling[t % steps]
            _fit[(batch * positions, layer.blocks)](
                *read[:5],
                None if first else coupling[(t - 1) % steps],
                *read[5:],
                beta_u.contiguous(),
                beta_a.contiguous(),
                temperatures.contiguous(),
                before,
                mean[t % slots],
                variance[t % slots],
                stats[t % slots],
                density,
                out_poses,
                out_activations,
                t,
                *layer.sizes,
                FLOOR=variance_floor,
                SCALE=cost_scale,
                SMOOTH=mean_smoothing,
                FIRST=first,
                LAST=last,
                **options,
                num_warps=WARPS,
            )
            if density is not None:
                _over_groups(_softmax, groups, layer, normalisation, density)
    if not keep:
        now = (iterations - 1) % slots
        mean, variance, stats = (tensor[now : now + 1] for tensor in (mean, variance, stats))
        now = (iterations - 2) % steps if steps else 0
        coupling = coupling[now : now + 1]
    return out_poses, out_activations, coupling, mean, variance, stats


def em_backward(
    g_poses: Tensor | None,
    g_activations: Tensor | None,
    g_coupling: Tensor | None,
    poses: Tensor,
    weight: Tensor,
    activations: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    temperatures: Tensor,
    initial: Tensor,
    child: Tensor,
    matrix: Tensor,
    offsets: Tensor | None,
    coupling: Tensor,
    mean: Tensor,
    variance: Tensor,
    stats: Tensor,
    variance_floor: float,
    cost_scale: float,
    mean_smoothing: float,
    normalisation: str,
    detach: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of poses, weight, activations, beta_u and beta_a. See `em_routing_backward_op`."""
    layer = _Layer(poses, weight, child, temperatures)
    batch, positions, places, iterations = layer.batch, layer.positions, layer.places, layer.iterations
    given = [
        None if tensor is None else tensor.contiguous() for tensor in (g_poses, g_activations, g_coupling)
    ]
    read = _readable(layer, poses, weight, offsets, activations, initial, child, matrix)
    groups = _competitors(child, layer, normalisation)
    begin = iterations - 1 if detach else 0
    slope, curve = layer.empty(*mean.shape), layer.empty(*mean.shape)
    g_logits = layer.empty(*coupling.shape)  # at first of R
    carry = layer.zeros(*mean.shape[1:]) if mean_smoothing else None
    betas = layer.zeros(batch, positions, 2, layer.padded)
    active_parts = layer.zeros(layer.blocks, batch, positions, places, 1)
    options = layer.options(VOTES)
    with torch.cuda.device_of(poses):
        for t in reversed(range(begin, iterations if batch * positions else 0)):
            first, last = t == 0, t + 1 == iterations
            if not last:
                _over_groups(_softmax_backward, groups, layer, normalisation, g_logits[t], coupling[t])
            _fit_backward[(batch * positions, layer.blocks)](
                *read[:5],
                None if first else coupling[t - 1],
                *read[5:],
                beta_u.contiguous(),
                temperatures.contiguous(),
                None if first or mean_smoothing == 0 else mean[t - 1],
                mean[t],
                variance[t],
                stats[t],
                None if last else g_logits[t],
                *(given if last else (None, None, None)),
                slope[t],
                curve[t],
                carry,
                betas,
                active_parts,
                g_logits[t - 1] if t > begin else None,
                t,
                batch * positions,
                *layer.sizes,
                FLOOR=variance_floor,
                SCALE=cost_scale,
                SMOOTH=mean_smoothing,
                FIRST=first,
                LAST=last,
                **options,
                num_warps=WARPS,
            )
        saved = (mean, variance, slope, curve, g_logits)
        pose_parts, d_weight = _into_factors(layer, read, coupling, saved, variance_floor, begin)
        seen = _seen_by_child(child, layer.children)
        d_poses = _summed(pose_parts, seen, layer).view_as(poses)
        d_activations = _summed(active_parts, seen, layer).view_as(activations)
    by_matrix = d_weight.new_zeros(weight.shape).index_add_(0, matrix, d_weight)
    # Clones: an operator of PyTorch may not return two views of one tensor.
    d_beta_u, d_beta_a = (part.clone() for part in betas.sum((0, 1))[:, : layer.types])
    return (
        d_poses.to(poses.dtype),
        by_matrix.to(weight.dtype),
        d_activations.to(activations.dtype),
        d_beta_u.to(beta_u.dtype),
        d_beta_a.to(beta_a.dtype),
    )


def _readable(
    layer: _Layer,
    poses: Tensor,
    weight: Tensor,
    offsets: Tensor | None,
    activations: Tensor,
    initial: Tensor,
    child: Tensor,
    matrix: Tensor,
) -> list[Tensor | None]:
    """The arguments of `_tile`, in its order, without R; matrices as [W, n, m, Jp], with types together."""
    packed = F.pad(weight.permute(0, 2, 3, 1), (0, layer.padded - layer.types))
    given = (poses, packed, offsets, activations, initial, child, matrix)
    return [None if tensor is None else tensor.contiguous() for tensor in given]


def _seen_by_child(child: Tensor, children: int) -> _Groups:
    """The places at which each child occurs; computed without waiting for the device."""
    of_place, order = child.flatten().sort(stable=True)
    begins = torch.searchsorted(of_place, torch.arange(children + 1, device=child.device))
    return _Groups(order, begins, SEEN if len(child) > 1 else 1)


def _competitors(child: Tensor, layer: _Layer, normalisation: str) -> _Groups:
    """The places whose parents compete for one child."""
    if normalisation != "types":
        return _seen_by_child(child, layer.children)
    alone = torch.arange(child.numel() + 1, device=child.device)
    return _Groups(alone[:-1], alone, 1)


def _over_groups(kernel: Any, groups: _Groups, layer: _Layer, normalisation: str, *tensors: Tensor) -> None:
    block = max(1, GROUPED // (groups.most * layer.padded))
    kernel[(layer.batch, triton.cdiv(groups.number, block))](
        *tensors,
        groups.order,
        groups.begins,
        groups.number,
        layer.positions * layer.places,
        layer.types,
        ACROSS_TYPES=normalisation != "official_v1",
        PADDED=layer.padded,
        BLOCK_I=min(block, triton.next_power_of_2(groups.number)),
        BLOCK_M=groups.most,
        ACC=layer.acc,
        num_warps=WARPS,
    )


def _into_factors(
    layer: _Layer,
    read: list[Tensor | None],
    coupling: Tensor,
    saved: tuple[Tensor, ...],
    floor: float,
    begin: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of the poses at each place [type blocks, B, P, K, D], and of each place's [K, J, n, n]."""
    options = layer.options(PRODUCTS, product=True)
    blocks = triton.cdiv(layer.places, options["BLOCK_K"]) * layer.blocks
    parents = layer.batch * layer.positions
    most = max(1, triton.cdiv(parents, max(1, PROGRAMS // blocks)))
    chunks = triton.cdiv(parents, most)
    pose_parts = layer.empty(layer.blocks, layer.batch, layer.positions, layer.places, layer.dim)
    weight_parts = layer.empty(chunks, layer.places, layer.side, layer.side, layer.padded)
    if parents:
        _products[(blocks // layer.blocks, layer.blocks, chunks)](
            *read[:5],
            coupling,
            *read[5:],
            *saved,
            pose_parts,
            weight_parts,
            parents,
            most,
            *layer.sizes,
            FLOOR=floor,
            BEGIN=begin,
            ITERATIONS=layer.iterations,
            **options,
            num_warps=PRODUCT_WARPS,
        )
    return pose_parts, weight_parts.sum(0)[..., : layer.types].permute(0, 3, 1, 2)


def _summed(parts: Tensor, seen: _Groups, layer: _Layer) -> Tensor:
    """[blocks of types, B, P, K, width] to [B, I, width]."""
    width = triton.next_power_of_2(parts.shape[-1])
    out = layer.empty(layer.batch, layer.children, parts.shape[-1])
    block = min(max(1, GROUPED // (seen.most * width)), triton.next_power_of_2(layer.children))
    if out.numel():
        _sum_of_children[(layer.batch, triton.cdiv(layer.children, block))](
            parts,
            out,
            seen.order,
            seen.begins,
            seen.number,
            layer.positions * layer.places,
            layer.batch,
            WIDTH=parts.shape[-1],
            C=width,
            BLOCKS=layer.blocks,
            BLOCK_I=block,
            BLOCK_M=seen.most,
            ACC=layer.acc,
            num_warps=WARPS,
        )
    return out
