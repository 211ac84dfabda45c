"""Mean key and mean value of every block, and the sum of (k - its mean)^T v, in one pass over keys and values."""

# Triton's language is read as Python, but it is another.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 256  # at most so many walk the keys when there is a slope, for each leaves a [D, D] to be added


@triton.jit(do_not_specialize=["rows", "blocks", "share"])
def _summary_kernel(
    k_ptr, v_ptr, key_ptr, value_ptr, slope_ptr, k_sb, k_sl, k_sh, v_sb, v_sl, v_sh, rows, blocks, share, heads,
    block: tl.constexpr, size: tl.constexpr, dim: tl.constexpr, has_slope: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    k_ptr += pair // heads * k_sb + pair % heads * k_sh
    v_ptr += pair // heads * v_sb + pair % heads * v_sh
    channels = tl.arange(0, dim)
    inside = tl.arange(0, size)  # a power of two, which a block need not be
    slope = tl.zeros((dim, dim), tl.float32)
    first = tl.program_id(0) * share
    for j in tl.range(first, tl.minimum(first + share, blocks)):
        at = j * block + inside
        known = ((inside < block) & (at < rows))[:, None]
        k = tl.load(k_ptr + at.to(tl.int64)[:, None] * k_sl + channels[None, :], mask=known, other=0.0)
        v = tl.load(v_ptr + at.to(tl.int64)[:, None] * v_sl + channels[None, :], mask=known, other=0.0)
        count = tl.minimum(rows - j * block, block).to(tl.float32)
        key = (tl.sum(k.to(tl.float32), 0) / count).to(k.dtype)
        value = (tl.sum(v.to(tl.float32), 0) / count).to(v.dtype)
        target = (pair * blocks + j) * dim + channels
        tl.store(key_ptr + target, key)
        tl.store(value_ptr + target, value)
        if has_slope:  # where no key is, v is zero
            spread = (k.to(tl.float32) - key.to(tl.float32)[None, :]).to(k.dtype)
            slope = tl.dot(tl.trans(spread), v, slope, input_precision=exact)
    if has_slope:
        at = (tl.program_id(0) * tl.num_programs(1) + pair) * dim * dim + channels[:, None] * dim + channels[None, :]
        tl.store(slope_ptr + at, slope)


def summarise_triton(k: Tensor, v: Tensor, block: int, first_order: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(key, value [B, H, NK, D], slope [B, H, D, D] or None) as in `KVSummary`, of k, v [B, L, H, D] in order."""
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    batch, rows, heads, dim = k.shape
    blocks = triton.cdiv(rows, block)
    share = max(1, triton.cdiv(blocks * batch * heads, PROGRAMS)) if first_order else 1
    programs = triton.cdiv(blocks, share)
    key, value = (k.new_empty((batch, heads, blocks, dim)) for _ in range(2))
    slopes = k.new_empty((programs, batch, heads, dim, dim), dtype=torch.float32) if first_order else None
    _summary_kernel[(programs, batch * heads)](
        k, v, key, value, slopes, *k.stride()[:3], *v.stride()[:3], rows, blocks, share, heads,
        block=block, size=triton.next_power_of_2(block), dim=dim, has_slope=first_order,
        exact="tf32x3" if k.dtype == torch.float32 else "tf32", num_warps=8 if first_order else 4,
    )  # fmt: skip
    return key, value, None if slopes is None else (slopes.sum(0) / rows).to(k.dtype)
