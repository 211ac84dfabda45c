"""The merging of partial results in Triton: one pass over the parts."""

# Triton's language is read as Python, but it is another.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["rows"])
def merge_kernel(
    out_ptr, lse_ptr, merged_ptr, total_ptr, out_ss, out_sb, out_sl, out_sh, lse_ss, sb, sl, sh, rows, heads,
    parts: tl.constexpr, head_dim: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Parts of a softmax over disjoint keys, joined: weights exp(lse_part - lse_total); (0, -inf) takes no part."""
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    at = tl.program_id(0) * tile + tl.arange(0, tile)
    known = at < rows
    channels = tl.arange(0, head_dim)
    highest = tl.full((tile,), -1.0e30, tl.float32)
    for part in tl.static_range(parts):
        lse = tl.load(lse_ptr + part * lse_ss + pair * rows + at, mask=known, other=float("-inf"))
        highest = tl.maximum(highest, lse)
    total = tl.zeros((tile,), tl.float32)
    acc = tl.zeros((tile, head_dim), tl.float32)
    out_ptr += batch * out_sb + head * out_sh
    for part in tl.static_range(parts):
        lse = tl.load(lse_ptr + part * lse_ss + pair * rows + at, mask=known, other=float("-inf"))
        weight = tl.exp(lse - highest)
        total += weight
        out_at = out_ptr + part * out_ss + at.to(tl.int64)[:, None] * out_sl + channels[None, :]
        acc += tl.load(out_at, mask=known[:, None], other=0.0).to(tl.float32) * weight[:, None]
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    merged_at = merged_ptr + batch * sb + head * sh + at.to(tl.int64)[:, None] * sl + channels[None, :]
    tl.store(merged_at, acc.to(merged_ptr.dtype.element_ty), mask=known[:, None])
    tl.store(total_ptr + pair * rows + at, highest + tl.log(total), mask=known)


def merge_stacked(out: Tensor, lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Join parts stacked on a leading axis, out [S, B, L, H, D] and lse [S, B, H, L]."""
    parts, batch, rows, heads, dim = out.shape
    merged = out.new_empty(out.shape[1:], dtype=dtype)
    total = lse.new_empty(lse.shape[1:])
    tile = 64
    merge_kernel[(triton.cdiv(rows, tile), batch * heads)](
        out, lse, merged, total, *out.stride()[:4], lse.stride(0), *merged.stride()[:3], rows, heads,
        parts=parts, head_dim=dim, tile=tile,
    )  # fmt: skip
    return merged, total
