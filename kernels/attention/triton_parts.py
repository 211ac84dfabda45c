"""Steps of the block-sparse kernel: online softmax, what a box shows, list entries, tiles of keys and values."""

from __future__ import annotations

# Triton's language is read as Python, but it is another.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl


@triton.jit
def softmax_step(acc, total, highest, scores, factor, offset, v, exact: tl.constexpr, p_scale: tl.constexpr):
    """Online softmax over `scores * factor + offset` (factor > 0, scalars); returns the three running values.

    Weights, and so `acc` and `total`, are `p_scale` (1 or 256) times what they say: it stands in the exponent.
    """
    shift: tl.constexpr = 0.0 if p_scale == 1.0 else 8.0
    above = tl.maximum(highest, tl.max(tl.max(in_chains(scores), 1), 1) * factor + offset)
    p = tl.exp2(scores * factor - (above - offset - shift)[:, None])
    decay = tl.exp2(highest - above)
    total = total * decay + tl.sum(tl.sum(in_chains(p), 1), 1)
    acc = acc * decay[:, None]
    if p_scale == 1.0:
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=exact)
    else:
        # 8-bit: the tensor cores add with 14 bits, so only one tile is summed there, and the rest in registers.
        acc += tl.dot(operand_order(p.to(v.dtype)), v)
    return acc, total, above


@triton.jit
def in_chains(x):
    """x [tile_q, tile_k] as [tile_q, tile_k / 32, 32], to be reduced over the second axis and then over the last.

    A thread holds two of every 8 columns. Along one axis it would reduce its part of a row one value after the other,
    each waiting for the one before; so it has eight short chains beside one another, and nothing moves.
    """
    return x.reshape(x.shape[0], x.shape[1] // 32, 32)


@triton.jit
def operand_order(p):
    """p [tile_q, tile_k] with the keys of each 16 in the order in which `turned.key_order` lays the values.

    A thread that holds the sum of a product holds just these keys of the next product's 8-bit operand, so that nothing
    moves between threads (as FlashAttention-3 does, arXiv 2407.08608, section 3.3).
    """
    tile_q: tl.constexpr = p.shape[0]
    tile_k: tl.constexpr = p.shape[1]
    return p.reshape(tile_q, tile_k // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(tile_q, tile_k)


@triton.jit
def packed_box_visible(visible, low, high, at_ptr, k_slots, guard: tl.constexpr):
    """`visible` and the box holds the key, all axes in one word: spare bits survive where no field was too small."""
    at = tl.load(at_ptr + k_slots)[None, :]
    inside = ((at | guard) - low[:, None]) & ((high | guard)[:, None] - at) & guard
    return visible & (inside == guard)


@triton.jit
def box_visible(visible, low_ptr, high_ptr, at_ptr, q_slots, k_slots, q_stride, k_stride, axes: tl.constexpr, sinks):
    """`visible` and the query's box holds the key, on every axis; keys below `sinks` on axis 0 need no lower bound."""
    inside = visible
    early = visible
    for axis in tl.static_range(axes):
        at = tl.load(at_ptr + axis * k_stride + k_slots)[None, :]
        low = tl.load(low_ptr + axis * q_stride + q_slots)[:, None]
        high = tl.load(high_ptr + axis * q_stride + q_slots)[:, None]
        inside = inside & (at >= low) & (at <= high)
        if axis == 0:
            early = early & (at < sinks) & (at <= high)
    return inside | early


@triton.jit
def listed(indices_ptr, places_ptr, position, end, has_table: tl.constexpr):
    """The block at `position` of a list that ends at `end`, and where it lies in memory; block 0 past the end."""
    block = tl.load(indices_ptr + position, mask=position < end, other=0)
    place = tl.load(places_ptr + position, mask=position < end, other=0) if has_table else block
    return block, place


@triton.jit
def tile(
    ptr, desc, desc_row, desc_column, row, stride, d_stride, rows,
    count: tl.constexpr, width: tl.constexpr, use_desc: tl.constexpr, turned: tl.constexpr,
):  # fmt: skip
    """Rows `row ... row + count` of keys or values, [count, width]; zeros past `rows`."""
    if use_desc:
        if turned:
            tile = tl.trans(desc.load([desc_column, desc_row]))
        else:
            tile = desc.load([desc_row, desc_column])
    else:
        at = row + tl.arange(0, count)
        offsets = at.to(tl.int64)[:, None] * stride + tl.arange(0, width)[None, :] * d_stride
        tile = tl.load(ptr + offsets, mask=(at < rows)[:, None], other=0.0)
    return tile
