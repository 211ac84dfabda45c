"""Block-sparse attention in Triton: one program per tile of queries walks the key blocks its plan lists.

Phases: full blocks without any mask code, then masked blocks, then (`rest="centroid"`) every other block as its mean
key and mean value, then their first-order term. Scores are kept in units of log 2, so a softmax step is one exp2.

Conventions: q, k, v, out are [B, L, H, D] with any strides but a last one of 1; plan tensors may be broadcast over B
and H (a stride of 0). *Slots* count a plan's places, block by block; *rows* count tokens in memory.
"""

# Triton's language is read as Python, but it is another.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false
from __future__ import annotations

import triton
import triton.language as tl

from .triton_parts import box_visible, listed, packed_box_visible, softmax_step, tile

# Finite, so that a row that has seen nothing yet subtracts to 0 instead of NaN; far below any score in use.
FLOOR = tl.constexpr(-1.0e30)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
CENTROIDS = tl.constexpr(64)  # centroids per step


@triton.jit
def _walk(
    acc, total, highest, q, q_slots, factor, start, end,
    k_ptr, v_ptr, k_desc, v_desc, k_first, k_column, v_first, v_column, k_sl, v_sl, v_sd, k_rows,
    indices_ptr, places_ptr, k_lengths_ptr, bias_ptr, k_scale_ptr,
    low_ptr, high_ptr, at_ptr, low_sa, at_sa, sinks, bits_ptr, bits_width,
    head_dim: tl.constexpr, block_k: tl.constexpr, tile_k: tl.constexpr,
    masked: tl.constexpr, guard: tl.constexpr, has_box: tl.constexpr, has_bits: tl.constexpr, axes: tl.constexpr,
    has_table: tl.constexpr, has_k_lengths: tl.constexpr, full_lengths: tl.constexpr, has_bias: tl.constexpr,
    quantize: tl.constexpr, scaled: tl.constexpr, v_row: tl.constexpr, descriptors: tl.constexpr,
    exact: tl.constexpr, stages: tl.constexpr, ahead: tl.constexpr,
):  # fmt: skip
    """Attend to the blocks listed at `start ... end`.

    With `ahead` each step multiplies the NEXT keys before it takes the softmax of the last scores, so that the tensor
    cores work through the exponentials, for the registers of one more tile of scores. List entries are always read two
    steps ahead.
    """
    parts: tl.constexpr = block_k // tile_k
    v_rows = k_rows if v_row else (k_rows + 15) // 16 * 16
    p_scale: tl.constexpr = 256.0 if quantize == "fp8" else 1.0
    if masked and guard:
        low, high = tl.load(low_ptr + q_slots), tl.load(high_ptr + q_slots)
    block, place = listed(indices_ptr, places_ptr, start, end, has_table)
    slot = block * block_k
    row = place * block_k
    if ahead:
        k = tile(k_ptr, k_desc, k_first + row, k_column, row, k_sl, 1, k_rows, tile_k, head_dim, descriptors, False)
        scores = tl.dot(q, tl.trans(k), input_precision=exact).to(tl.float32)
    block, place = listed(indices_ptr, places_ptr, start + 1 // parts, end, has_table)
    for i in tl.range(start * parts, end * parts, num_stages=stages):
        # Products, not plain copies of the list entries: Triton pipelines no loop that carries a value two steps on.
        next_slot = block * block_k + (i + 1) % parts * tile_k
        next_row = place * block_k + (i + 1) % parts * tile_k
        k_row = next_row if ahead else row
        k = tile(
            k_ptr, k_desc, k_first + k_row, k_column, k_row,
            k_sl, 1, k_rows, tile_k, head_dim, descriptors, False,
        )  # fmt: skip
        v = tile(
            v_ptr, v_desc, v_first + row, v_column, row, v_sl, v_sd, v_rows, tile_k, head_dim, descriptors, not v_row
        )
        product = tl.dot(q, tl.trans(k), input_precision=exact).to(tl.float32)
        if not ahead:
            scores = product
        here = slot // block_k
        if masked:
            k_slots = slot + tl.arange(0, tile_k)
            k_valid = row + tl.arange(0, tile_k) < k_rows
            if has_k_lengths:
                known = k_slots - here * block_k < tl.load(k_lengths_ptr + here)
                k_valid = k_valid & known
                if v_row and not full_lengths:  # the padding may be NaN
                    v = tl.where(known[:, None], v, 0.0)
            visible = tl.broadcast_to(k_valid[None, :], scores.shape)
            if guard:
                visible = packed_box_visible(visible, low, high, at_ptr, k_slots, guard)
            elif has_box:
                visible = box_visible(visible, low_ptr, high_ptr, at_ptr, q_slots, k_slots, low_sa, at_sa, axes, sinks)
            if has_bits:
                words = tl.load(bits_ptr + q_slots.to(tl.int64) * bits_width + here // 32)
                visible = visible & ((words >> (here % 32)) & 1 != 0)[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        elif full_lengths:
            inside = slot - here * block_k + tl.arange(0, tile_k)
            known = inside < tl.load(k_lengths_ptr + here)
            scores = tl.where(known[None, :], scores, float("-inf"))
        tile_factor = factor
        if scaled:
            tile_factor = factor * tl.load(k_scale_ptr + row // block_k)
        offset = 0.0
        if has_bias:
            offset = tl.load(bias_ptr + here) * LOG2_E
        acc, total, highest = softmax_step(acc, total, highest, scores, tile_factor, offset, v, exact, p_scale)
        slot, row = next_slot, next_row
        if ahead:
            scores = product
        block, place = listed(indices_ptr, places_ptr, (i + 2) // parts, end, has_table)
    return acc, total, highest


# Lengths are not specialised: a stream that grows by a token must not compile a kernel.
@triton.jit(
    do_not_specialize=[
        "q_rows", "k_rows", "key_blocks", "width", "sinks", "bits_width",
        "indices_sb", "indices_sh", "count_sb", "count_sh", "places_sb", "places_sh", "ql_sb", "ql_sh",
        "kl_sb", "kl_sh", "bias_sb", "bias_sh", "bias_sq", "source_sb", "source_sh",
        "low_sb", "low_sh", "low_sa", "at_sb", "at_sh", "at_sa", "bits_sb", "bits_sh",
    ]
)  # fmt: skip
def attend_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, out_ptr, lse_ptr,
    indices_ptr, n_full_ptr, n_masked_ptr,
    places_ptr, q_lengths_ptr, k_lengths_ptr, bias_ptr, q_source_ptr,
    low_ptr, high_ptr, at_ptr, bits_ptr,
    mean_k_ptr, mean_v_ptr, log_count_ptr, listed_ptr, slope_ptr,
    q_scale_ptr, k_scale_ptr, v_scale_ptr,
    scale,
    q_sb, q_sl, q_sh, k_sb, k_sl, k_sh, v_sb, v_sl, v_sh, v_sd, out_ss, out_sb, out_sl, out_sh,
    indices_sb, indices_sh, count_sb, count_sh, places_sb, places_sh, ql_sb, ql_sh, kl_sb, kl_sh,
    bias_sb, bias_sh, bias_sq, source_sb, source_sh, low_sb, low_sh, low_sa, at_sb, at_sh, at_sa, bits_sb, bits_sh,
    q_rows, k_rows, key_blocks, width, sinks, bits_width, heads,
    head_dim: tl.constexpr, block_q: tl.constexpr, block_k: tl.constexpr,
    tile_q: tl.constexpr, tile_k: tl.constexpr, splits: tl.constexpr,
    guard: tl.constexpr, has_box: tl.constexpr, has_bits: tl.constexpr, axes: tl.constexpr,
    centroid: tl.constexpr, first_order: tl.constexpr,
    has_table: tl.constexpr, has_q_lengths: tl.constexpr, has_k_lengths: tl.constexpr, full_lengths: tl.constexpr,
    has_bias: tl.constexpr, has_source: tl.constexpr, quantize: tl.constexpr, scaled: tl.constexpr,
    v_row: tl.constexpr, descriptors: tl.constexpr, masked_descriptors: tl.constexpr, exact: tl.constexpr,
    stages: tl.constexpr, ahead: tl.constexpr,
):  # fmt: skip
    query_tile = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    split = tl.program_id(2)
    query_block = query_tile * tile_q // block_q
    q_slots = query_tile * tile_q + tl.arange(0, tile_q)
    channels = tl.arange(0, head_dim)

    rows = q_slots
    if has_source:
        rows = tl.load(q_source_ptr + batch * source_sb + head * source_sh + q_slots)
    q_valid = (rows >= 0) & (rows < q_rows)
    if has_q_lengths:
        length = tl.load(q_lengths_ptr + batch * ql_sb + head * ql_sh + query_block)
        q_valid = q_valid & (q_slots - query_block * block_q < length)
    q_at = q_ptr + batch * q_sb + head * q_sh + rows.to(tl.int64)[:, None] * q_sl + channels[None, :]
    q = tl.load(q_at, mask=q_valid[:, None], other=0.0)
    factor = scale * LOG2_E
    if scaled:
        query_blocks = tl.num_programs(0) * tile_q // block_q
        q_scale = tl.load(q_scale_ptr + tl.program_id(1) * query_blocks + query_block)
        k_scale_ptr += tl.program_id(1) * ((k_rows + block_k - 1) // block_k)
        factor *= q_scale

    if has_box:
        low_ptr += batch * low_sb + head * low_sh
        high_ptr += batch * low_sb + head * low_sh
        at_ptr += batch * at_sb + head * at_sh
    if has_bits:
        bits_ptr += batch * bits_sb + head * bits_sh
    if has_k_lengths:
        k_lengths_ptr += batch * kl_sb + head * kl_sh
    if has_bias:
        bias_ptr += batch * bias_sb + head * bias_sh + query_block * bias_sq
    indices_ptr += batch * indices_sb + head * indices_sh + query_block.to(tl.int64) * width
    if has_table:
        places_ptr += batch * places_sb + head * places_sh + query_block.to(tl.int64) * width
    k_ptr += batch * k_sb + head * k_sh
    v_ptr += batch * v_sb + head * v_sh
    # Where this row and head begin in the matrices that the descriptors speak of.
    k_first = (batch * (k_sb // k_sl)).to(tl.int32)
    k_column = (head * k_sh).to(tl.int32)
    if v_row:
        v_first = (batch * (v_sb // v_sl)).to(tl.int32)
        v_column = (head * v_sh).to(tl.int32)
    else:
        v_first = 0
        v_column = tl.program_id(1) * head_dim
    count_at = batch * count_sb + head * count_sh + query_block
    n_full = tl.load(n_full_ptr + count_at)
    n_listed = n_full + tl.load(n_masked_ptr + count_at)
    p_scale: tl.constexpr = 256.0 if quantize == "fp8" else 1.0
    share = (n_listed + splits - 1) // splits
    first = split * share
    last = tl.minimum(first + share, n_listed)

    highest = tl.full((tile_q,), FLOOR, tl.float32)
    total = tl.zeros((tile_q,), tl.float32)
    acc = tl.zeros((tile_q, head_dim), tl.float32)

    # Full blocks without any mask code, then masked ones.
    acc, total, highest = _walk(
        acc, total, highest, q, q_slots, factor, first, tl.minimum(last, n_full),
        k_ptr, v_ptr, k_desc, v_desc, k_first, k_column, v_first, v_column, k_sl, v_sl, v_sd, k_rows,
        indices_ptr, places_ptr, k_lengths_ptr, bias_ptr, k_scale_ptr,
        low_ptr, high_ptr, at_ptr, low_sa, at_sa, sinks, bits_ptr, bits_width,
        head_dim, block_k, tile_k, False, guard, has_box, has_bits, axes,
        has_table, has_k_lengths, full_lengths, has_bias,
        quantize, scaled, v_row, descriptors, exact, stages, ahead,
    )  # fmt: skip
    masked_start = tl.maximum(first, n_full)
    if masked_start < last:
        acc, total, highest = _walk(
            acc, total, highest, q, q_slots, factor, masked_start, last,
            k_ptr, v_ptr, k_desc, v_desc, k_first, k_column, v_first, v_column, k_sl, v_sl, v_sd, k_rows,
            indices_ptr, places_ptr, k_lengths_ptr, bias_ptr, k_scale_ptr,
            low_ptr, high_ptr, at_ptr, low_sa, at_sa, sinks, bits_ptr, bits_width,
            head_dim, block_k, tile_k, True, guard, has_box, has_bits, axes,
            has_table, has_k_lengths, full_lengths, has_bias,
            quantize, scaled, v_row, masked_descriptors, exact, stages, ahead,
        )  # fmt: skip

    if quantize == "fp8":
        if scaled:
            acc = acc * tl.load(v_scale_ptr + tl.program_id(1) * head_dim + channels)[None, :]
        acc = acc / p_scale
        total = total / p_scale

    if centroid:  # noqa: SIM102  # one is known when the kernel is compiled, the other when it runs
        if split == splits - 1:
            pair = tl.program_id(1).to(tl.int64)
            listed_ptr += (pair * (tl.num_programs(0) * tile_q // block_q) + query_block) * key_blocks
            rest = tl.zeros((tile_q,), tl.float32)
            q_plain = q.to(mean_k_ptr.dtype.element_ty)
            if scaled:
                q_plain = (q.to(tl.float32) * q_scale).to(mean_k_ptr.dtype.element_ty)
            for start in tl.range(0, key_blocks, CENTROIDS):
                blocks = start + tl.arange(0, CENTROIDS)
                known = blocks < key_blocks
                at = (pair * key_blocks + blocks)[:, None] * head_dim + channels[None, :]
                mean_k = tl.load(mean_k_ptr + at, mask=known[:, None], other=0.0)
                mean_v = tl.load(mean_v_ptr + at, mask=known[:, None], other=0.0)
                weight = tl.load(log_count_ptr + pair * key_blocks + blocks, mask=known, other=float("-inf"))
                skip = tl.load(listed_ptr + blocks, mask=known, other=1) != 0
                if has_bias:
                    weight += tl.load(bias_ptr + blocks, mask=known, other=0.0)
                weight = tl.where(skip, float("-inf"), weight * LOG2_E)
                scores = tl.dot(q_plain, tl.trans(mean_k), input_precision=exact)
                scores = scores * (scale * LOG2_E) + weight[None, :]
                above = tl.maximum(highest, tl.max(scores, 1))
                p = tl.exp2(scores - above[:, None])
                decay = tl.exp2(highest - above)
                total = total * decay + tl.sum(p, 1)
                rest = rest * decay + tl.sum(p, 1)
                acc = tl.dot(p.to(mean_v.dtype), mean_v, acc * decay[:, None], input_precision=exact)
                highest = above
            if first_order:
                slope_at = pair * head_dim * head_dim + channels[:, None] * head_dim + channels[None, :]
                slope = tl.load(slope_ptr + slope_at)
                acc += tl.dot(q_plain, slope, input_precision=exact) * (rest * scale)[:, None]

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = (highest + tl.log2(total)) * LN_2
    target = out_ptr + split * out_ss + batch * out_sb + head * out_sh + rows.to(tl.int64)[:, None] * out_sl
    tl.store(target + channels[None, :], acc.to(out_ptr.dtype.element_ty), mask=q_valid[:, None])
    batches = tl.num_programs(1) // heads
    lse_at = (split * batches * heads + tl.program_id(1)).to(tl.int64) * q_rows + rows
    tl.store(lse_ptr + lse_at, lse, mask=q_valid)
