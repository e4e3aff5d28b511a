"""Dynamic routing in Triton: each pass reads the votes once, forward and backward.

The logits are the running sum of the agreements, so one pass over the votes computes three things: the
agreement with the poses of the pass before, the softmax over J, and the weighted sum. The sums over I are
returned in blocks and added in a fixed order. PyTorch computes the squash of the few totals. Formulas:
`FusedDynamicRouting` in capsexp/ops/dynamic_passes.py.

Votes are [B, J, I, D], in float32 or half precision, computed in float32, or in float64.
"""
# ruff: noqa: N803 - Triton writes a kernel's constants in capitals.

from typing import Any, NamedTuple, no_type_check

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from jaxtyping import Float
from torch import Tensor

from capsexp.ops.squash import squash, squash_backward

VOTES = 4096  # in a tile, of all J at some i: 16 numbers for each of 256 threads
STEPS = 8  # tiles of a program: fewer blocks to add, and still thousands of programs for a batch of MNIST
WARPS = 8

# `no_type_check` keeps jaxtyping's import hook away: Triton reads a function's own source and globals.


@triton.jit
@no_type_check
def _route(
    votes, prior, before, logits, coupling, sums, parents, children, blocks,
    LEAKY: tl.constexpr, D: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One pass. `before`: poses of the pass before, [B, J, D]; None in the first, with `prior` as logits."""
    image = tl.program_id(0).to(tl.int64)
    j, d = tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_D)
    of_parent = (image * parents + j) * children
    real = (j < parents)[:, None] & (d < D)[None, :]
    pose_at = (image * parents + j)[:, None] * D + d[None, :]
    if before is not None:
        poses = tl.load(before + pose_at, mask=real, other=0)
    total = tl.zeros([BLOCK_J, BLOCK_D], ACC)
    for step in range(STEPS):
        i = (tl.program_id(1) * STEPS + step) * BLOCK_I + tl.arange(0, BLOCK_I)
        there = (j < parents)[:, None] & (i < children)[None, :]
        at = of_parent[:, None] + i[None, :]
        mask = there[:, :, None] & (d < D)[None, None, :]
        seen = tl.load(votes + at[:, :, None] * D + d[None, None, :], mask=mask, other=0).to(ACC)
        b = tl.zeros([BLOCK_J, BLOCK_I], ACC)
        if before is None:
            if prior is not None:
                b += tl.load(prior + i[None, :] * parents + j[:, None], mask=there, other=0).to(ACC)
        else:
            b += tl.load(logits + at, mask=there, other=0) + tl.sum(seen * poses[:, None, :], 2)
        tl.store(logits + at, b, mask=there)
        b = tl.where((j < parents)[:, None], b, -float("inf"))
        top = tl.max(b, 0)
        if LEAKY:
            top = tl.maximum(top, 0)
        share = tl.exp(b - top[None, :])
        norm = tl.sum(share, 0)
        if LEAKY:
            norm += tl.exp(-top)
        share = share / norm[None, :]
        tl.store(coupling + at, share, mask=there)
        total += tl.sum(share[:, :, None] * seen, 1)
    to = ((image * blocks + tl.program_id(1)) * parents + j)[:, None] * D + d[None, :]
    tl.store(sums + to, total, mask=real)


@triton.jit
@no_type_check
def _route_backward(
    votes, coupling, g_totals, g_coupling, later, g_logits, sums, parents, children, blocks,
    D: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One pass backward: gradient of its logits, and the sums over i of that gradient times the votes.

    `later` is the gradient of the logits of the pass after this one, which is added to that of these.
    """
    image = tl.program_id(0).to(tl.int64)
    j, d = tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_D)
    of_parent = (image * parents + j) * children
    real = (j < parents)[:, None] & (d < D)[None, :]
    pose_at = (image * parents + j)[:, None] * D + d[None, :]
    g_total = tl.load(g_totals + pose_at, mask=real, other=0)
    total = tl.zeros([BLOCK_J, BLOCK_D], ACC)
    for step in range(STEPS):
        i = (tl.program_id(1) * STEPS + step) * BLOCK_I + tl.arange(0, BLOCK_I)
        there = (j < parents)[:, None] & (i < children)[None, :]
        at = of_parent[:, None] + i[None, :]
        mask = there[:, :, None] & (d < D)[None, None, :]
        seen = tl.load(votes + at[:, :, None] * D + d[None, None, :], mask=mask, other=0).to(ACC)
        share = tl.load(coupling + at, mask=there, other=0)
        g = tl.sum(seen * g_total[:, None, :], 2)
        if g_coupling is not None:
            g += tl.load(g_coupling + at, mask=there, other=0).to(ACC)
        g = share * (g - tl.sum(share * g, 0)[None, :])
        if later is not None:
            g += tl.load(later + at, mask=there, other=0)
        tl.store(g_logits + at, g, mask=there)
        total += tl.sum(g[:, :, None] * seen, 1)
    to = ((image * blocks + tl.program_id(1)) * parents + j)[:, None] * D + d[None, :]
    tl.store(sums + to, total, mask=real)


@triton.jit
@no_type_check
def _add_outer(
    coupling, g_totals, g_logits, poses, g_votes, rows, children,
    D: tl.constexpr, PASSES: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of the votes: sum over t of c_t s_t' + G_(t+1) p_t. Both factors [passes, B * J, I or D]."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_I, BLOCK_D], ACC)
    for t in tl.static_range(PASSES):
        left = tl.load(coupling + (row + t * rows) * children + i, mask=i < children, other=0)
        right = tl.load(g_totals + (row + t * rows) * D + d, mask=d < D, other=0)
        total += left[:, None] * right[None, :]
        if t + 1 < PASSES:
            left = tl.load(g_logits + (row + (t + 1) * rows) * children + i, mask=i < children, other=0)
            right = tl.load(poses + (row + t * rows) * D + d, mask=d < D, other=0)
            total += left[:, None] * right[None, :]
    to = (row * children + i)[:, None] * D + d[None, :]
    tl.store(g_votes + to, total, mask=(i < children)[:, None] & (d < D)[None, :])


class _Tiles(NamedTuple):
    """Division of the votes into tiles."""

    grid: tuple[int, int]
    options: dict[str, Any]
    dtype: torch.dtype

    @property
    def blocks(self) -> int:
        return self.grid[1]


def dynamic_forward(
    votes: Float[Tensor, "B J I D"],
    prior: Float[Tensor, "I J"] | None,
    bias: Float[Tensor, "J D"] | None,
    iterations: int,
    leaky: bool,
) -> list[Tensor]:
    """Coupling [B, J, I], total [B, J, D] and poses [B, J, D] of the first pass, of the second, and so on."""
    votes = votes.contiguous()
    batch, parents, children, dim = votes.shape
    tiles = _tiles(votes)
    sums = votes.new_empty(batch, tiles.blocks, parents, dim, dtype=tiles.dtype)
    logits = votes.new_empty(batch, parents, children, dtype=tiles.dtype)
    couplings = votes.new_empty(iterations, *logits.shape, dtype=tiles.dtype)
    passes: list[Tensor] = []
    with torch.cuda.device_of(votes):
        for coupling in couplings:
            _route[tiles.grid](
                votes,
                None if prior is None else prior.contiguous(),
                passes[-1] if passes else None,
                logits,
                coupling,
                sums,
                parents,
                children,
                tiles.blocks,
                LEAKY=leaky,
                **tiles.options,
            )
            total = sums.sum(1)
            total = total if bias is None else total + bias
            passes += [coupling, total, squash(total)]
    return passes


def dynamic_backward(
    votes: Float[Tensor, "B J I D"],
    saved_passes: list[Tensor],
    d_poses: Float[Tensor, "B J D"] | None,
    d_coupling: Float[Tensor, "B J I"] | None,
    prior_needs_grad: bool,
) -> tuple[Float[Tensor, "B J I D"], Float[Tensor, "I J"] | None, Float[Tensor, "J D"]]:
    """Gradients of votes, prior and bias, given those of the last poses and coupling.

    `saved_passes` is what `dynamic_forward` returns, or its last three if the agreements are constants.
    """
    votes = votes.contiguous()
    batch, parents, children, dim = votes.shape
    tiles = _tiles(votes)
    couplings, totals, poses = (torch.stack(saved_passes[part::3]) for part in range(3))
    sums = votes.new_empty(batch, tiles.blocks, parents, dim, dtype=tiles.dtype)
    d_logits, d_totals = torch.empty_like(couplings), torch.empty_like(totals)
    last = len(totals) - 1
    with torch.cuda.device_of(votes):
        for t in range(last, -1, -1):
            if d_poses is None:  # a loss on the coupling alone
                d_totals[t] = 0
            else:
                d_totals[t] = squash_backward(totals[t], d_poses)
            if t == 0 and not prior_needs_grad:
                break  # the logits before this pass are constants
            _route_backward[tiles.grid](
                votes,
                couplings[t],
                d_totals[t],
                None if d_coupling is None or t < last else d_coupling.contiguous(),
                None if t == last else d_logits[t + 1],
                d_logits[t],
                sums,
                parents,
                children,
                tiles.blocks,
                **tiles.options,
            )
            d_poses = sums.sum(1)
        d_votes = torch.empty_like(votes)
        block_d = tiles.options["BLOCK_D"]
        block_i = min(max(1, VOTES // block_d), triton.next_power_of_2(children))
        _add_outer[(batch * parents, triton.cdiv(children, block_i))](
            couplings,
            d_totals,
            d_logits,
            poses,
            d_votes,
            batch * parents,
            children,
            D=dim,
            PASSES=last + 1,
            BLOCK_I=block_i,
            BLOCK_D=block_d,
            ACC=tiles.options["ACC"],
            num_warps=WARPS,
        )
    return d_votes, d_logits[0].sum(0).T if prior_needs_grad else None, d_totals.sum((0, 1))


def _tiles(votes: Tensor) -> _Tiles:
    batch, parents, children, dim = votes.shape
    dtype = torch.promote_types(votes.dtype, torch.float32)
    block_j, block_d = triton.next_power_of_2(parents), triton.next_power_of_2(dim)
    block_i = min(max(1, VOTES // (block_j * block_d)), triton.next_power_of_2(children))
    steps = min(STEPS, triton.cdiv(children, block_i))
    options = {
        "D": dim,
        "BLOCK_J": block_j,
        "BLOCK_I": block_i,
        "BLOCK_D": block_d,
        "STEPS": steps,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "num_warps": WARPS,
    }
    return _Tiles((batch, triton.cdiv(children, block_i * steps)), options, dtype)
