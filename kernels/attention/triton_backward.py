"""Gradients of block-sparse attention in Triton: probabilities are computed again from the kept log-sum-exp.

With p = exp(s q.k + b - lse), dP = dO V^T and D = rowsum(dO * O) - dlse: dS = p (dP - D), dQ = s dS K, dK = s dS^T Q,
dV = p^T dO (FlashAttention-2, arXiv 2307.08691, algorithm 2). dQ walks the plan's lists; dK and dV walk the transposed
plan: for each key block the query blocks that list it, full ones first. Slots are rows here: nothing is permuted.
"""

# Triton's language is read as Python, but it is another.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from .triton_parts import box_visible, packed_box_visible

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(ptr, at, rows, stride, head_dim: tl.constexpr):
    offsets = at.to(tl.int64)[:, None] * stride + tl.arange(0, head_dim)[None, :]
    return tl.load(ptr + offsets, mask=(at < rows)[:, None], other=0.0)


@triton.jit
def _slopes(
    q, k, v, do, lse, delta, q_at, k_at, q_rows, k_rows, scale, bias, masked,
    low_ptr, high_ptr, axis_ptr, low_sa, axis_sa, sinks, bits_ptr, bits_width, key_block,
    k_length, has_box: tl.constexpr, has_bits: tl.constexpr, axes: tl.constexpr, guard: tl.constexpr,
    exact: tl.constexpr,
):  # fmt: skip
    """(p, dS) [queries, keys] of one pair of tiles."""
    scores = tl.dot(q, tl.trans(k), input_precision=exact) * (scale * LOG2_E) + bias * LOG2_E
    p = tl.exp2(scores - lse[:, None] * LOG2_E)
    seen = (q_at < q_rows)[:, None] & (k_at < k_rows)[None, :] & k_length[None, :]
    if masked:
        if guard:
            low, high = tl.load(low_ptr + q_at), tl.load(high_ptr + q_at)
            seen = packed_box_visible(seen, low, high, axis_ptr, k_at, guard)
        elif has_box:
            seen = box_visible(seen, low_ptr, high_ptr, axis_ptr, q_at, k_at, low_sa, axis_sa, axes, sinks)
        if has_bits:
            words = tl.load(bits_ptr + q_at.to(tl.int64) * bits_width + key_block // 32)
            seen = seen & ((words >> (key_block % 32)) & 1 != 0)[:, None]
    p = tl.where(seen, p, 0.0)
    slope = p * (tl.dot(do, tl.trans(v), input_precision=exact) - delta[:, None])
    return p, slope


# Lengths are not specialised, as in the forward pass.
@triton.jit(
    do_not_specialize=[
        "q_rows", "k_rows", "width", "sinks", "bits_width", "indices_sb", "indices_sh", "count_sb", "count_sh",
        "bias_sb", "bias_sh", "bias_sq", "len_sb", "len_sh", "low_sb", "low_sh", "low_sa",
        "axis_sb", "axis_sh", "axis_sa", "bits_sb", "bits_sh",
    ]
)  # fmt: skip
def backward_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, first_ptr, second_ptr, indices_ptr, n_full_ptr, n_masked_ptr,
    bias_ptr, lengths_ptr, low_ptr, high_ptr, axis_ptr, bits_ptr, scale,
    q_sb, q_sl, q_sh, k_sb, k_sl, k_sh, v_sb, v_sl, v_sh, do_sb, do_sl, do_sh,
    indices_sb, indices_sh, count_sb, count_sh, bias_sb, bias_sh, bias_sq, len_sb, len_sh,
    low_sb, low_sh, low_sa, axis_sb, axis_sh, axis_sa, bits_sb, bits_sh,
    sinks, bits_width, q_rows, k_rows, heads, width,
    head_dim: tl.constexpr, block_q: tl.constexpr, block_k: tl.constexpr, tile: tl.constexpr, own: tl.constexpr,
    of_queries: tl.constexpr, has_box: tl.constexpr, has_bits: tl.constexpr, axes: tl.constexpr, guard: tl.constexpr,
    has_bias: tl.constexpr, has_lengths: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """`of_queries`: dQ of `own` queries into `first`; otherwise dK and dV of `own` keys into `first` and `second`.

    `tile` of the other side are taken at a time; `first`, `second` are [B, rows, H, D], contiguous.
    """
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    mine: tl.constexpr = block_q if of_queries else block_k
    other: tl.constexpr = block_k if of_queries else block_q
    parts: tl.constexpr = other // tile
    block = tl.program_id(0) * own // mine
    at = tl.program_id(0) * own + tl.arange(0, own)
    q_ptr += batch * q_sb + head * q_sh
    k_ptr += batch * k_sb + head * k_sh
    v_ptr += batch * v_sb + head * v_sh
    do_ptr += batch * do_sb + head * do_sh
    lse_ptr += pair * q_rows
    delta_ptr += pair * q_rows
    low_ptr += batch * low_sb + head * low_sh
    high_ptr += batch * low_sb + head * low_sh
    axis_ptr += batch * axis_sb + head * axis_sh
    bits_ptr += batch * bits_sb + head * bits_sh
    bias_ptr += batch * bias_sb + head * bias_sh
    lengths_ptr += batch * len_sb + head * len_sh
    indices_ptr += batch * indices_sb + head * indices_sh + block.to(tl.int64) * width
    n_full = tl.load(n_full_ptr + batch * count_sb + head * count_sh + block)
    n_all = n_full + tl.load(n_masked_ptr + batch * count_sb + head * count_sh + block)
    one = tl.zeros((own, head_dim), tl.float32)
    two = tl.zeros((own, head_dim), tl.float32)
    if of_queries:
        q, do = _rows(q_ptr, at, q_rows, q_sl, head_dim), _rows(do_ptr, at, q_rows, do_sl, head_dim)
        lse = tl.load(lse_ptr + at, mask=at < q_rows, other=0.0)
        delta = tl.load(delta_ptr + at, mask=at < q_rows, other=0.0)
    else:
        k, v = _rows(k_ptr, at, k_rows, k_sl, head_dim), _rows(v_ptr, at, k_rows, v_sl, head_dim)
    for i in range(0, n_all * parts):
        listed = tl.load(indices_ptr + i // parts)
        there = listed * other + i % parts * tile + tl.arange(0, tile)
        key_block = listed if of_queries else block
        query_block = block if of_queries else listed
        bias = tl.load(bias_ptr + query_block * bias_sq + key_block) if has_bias else 0.0
        k_at = there if of_queries else at
        k_known = k_at < k_rows
        if has_lengths:
            k_known = k_known & (k_at - key_block * block_k < tl.load(lengths_ptr + key_block))
        if of_queries:
            k, v = _rows(k_ptr, there, k_rows, k_sl, head_dim), _rows(v_ptr, there, k_rows, v_sl, head_dim)
            p, slope = _slopes(
                q, k, v, do, lse, delta, at, there, q_rows, k_rows, scale, bias, i // parts >= n_full,
                low_ptr, high_ptr, axis_ptr, low_sa, axis_sa, sinks, bits_ptr, bits_width, key_block,
                k_known, has_box, has_bits, axes, guard, exact,
            )  # fmt: skip
            one += tl.dot(slope.to(k.dtype), k, input_precision=exact)
        else:
            q, do = _rows(q_ptr, there, q_rows, q_sl, head_dim), _rows(do_ptr, there, q_rows, do_sl, head_dim)
            lse = tl.load(lse_ptr + there, mask=there < q_rows, other=0.0)
            delta = tl.load(delta_ptr + there, mask=there < q_rows, other=0.0)
            p, slope = _slopes(
                q, k, v, do, lse, delta, there, at, q_rows, k_rows, scale, bias, i // parts >= n_full,
                low_ptr, high_ptr, axis_ptr, low_sa, axis_sa, sinks, bits_ptr, bits_width, key_block,
                k_known, has_box, has_bits, axes, guard, exact,
            )  # fmt: skip
            one += tl.dot(tl.trans(slope).to(q.dtype), q, input_precision=exact)
            two += tl.dot(tl.trans(p).to(do.dtype), do, input_precision=exact)
    rows = q_rows if of_queries else k_rows
    out = ((batch * rows + at) * heads + head)[:, None] * head_dim + tl.arange(0, head_dim)[None, :]
    tl.store(first_ptr + out, (one * scale).to(first_ptr.dtype.element_ty), mask=(at < rows)[:, None])
    if not of_queries:
        tl.store(second_ptr + out, two.to(second_ptr.dtype.element_ty), mask=(at < rows)[:, None])
