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


@triton.jit(do_not_specialize=["rows"])
def merge_pair_kernel(
    a_ptr, b_ptr, lse_a_ptr, lse_b_ptr, merged_ptr, total_ptr, a_sb, a_sl, a_sh, b_sb, b_sl, b_sh,
    lse_a_sb, lse_a_sh, lse_b_sb, lse_b_sh, sb, sl, sh, rows, heads, head_dim: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """The same for two parts that lie anywhere."""
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    at = tl.program_id(0) * tile + tl.arange(0, tile)
    known = at < rows
    channels = tl.arange(0, head_dim)
    lse_a = tl.load(lse_a_ptr + batch * lse_a_sb + head * lse_a_sh + at, mask=known, other=float("-inf"))
    lse_b = tl.load(lse_b_ptr + batch * lse_b_sb + head * lse_b_sh + at, mask=known, other=float("-inf"))
    highest = tl.maximum(tl.maximum(lse_a, lse_b), -1.0e30)
    weight_a, weight_b = tl.exp(lse_a - highest), tl.exp(lse_b - highest)
    total = weight_a + weight_b
    row = at.to(tl.int64)[:, None]
    a = tl.load(a_ptr + batch * a_sb + head * a_sh + row * a_sl + channels[None, :], mask=known[:, None], other=0.0)
    b = tl.load(b_ptr + batch * b_sb + head * b_sh + row * b_sl + channels[None, :], mask=known[:, None], other=0.0)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    merged = a.to(tl.float32) * (weight_a * share)[:, None] + b.to(tl.float32) * (weight_b * share)[:, None]
    merged_at = merged_ptr + batch * sb + head * sh + row * sl + channels[None, :]
    tl.store(merged_at, merged.to(merged_ptr.dtype.element_ty), mask=known[:, None])
    tl.store(total_ptr + pair * rows + at, highest + tl.log(total), mask=known)


def merge_pair(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts, out [B, L, H, D] and lse [B, H, L], of one dtype each."""
    a, b = (x if x.stride(-1) == 1 else x.contiguous() for x in (a, b))
    lse_a, lse_b = (x if x.stride(-1) == 1 else x.contiguous() for x in (lse_a, lse_b))
    batch, rows, heads, dim = a.shape
    merged = a.new_empty(a.shape)
    total = lse_a.new_empty(lse_a.shape)
    tile = 64
    merge_pair_kernel[(triton.cdiv(rows, tile), batch * heads)](
        a, b, lse_a, lse_b, merged, total, *a.stride()[:3], *b.stride()[:3], *lse_a.stride()[:2], *lse_b.stride()[:2],
        *merged.stride()[:3], rows, heads, head_dim=dim, tile=tile,
    )  # fmt: skip
    return merged, total


merge_operator = torch.library.custom_op(
    "millstream::merge_pair",
    merge_pair,
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor a, Tensor lse_a, Tensor b, Tensor lse_b) -> (Tensor, Tensor)",
)


@merge_operator.register_fake
def _(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), lse_a.new_empty(lse_a.shape)
