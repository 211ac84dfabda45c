"""Linear attention in Triton, three kernels: what each part of the sequence adds, the states in between, the output.

Everything but the middle runs over all parts at once. Causal by token, a part is a chunk of 64 tokens whose scores are
formed as well; in blocks of 32 tokens or more (frames) no score is formed at all and a part is a piece of a block.
Gates arrive summed from the start of each chunk, so only exponents of at most 0 are taken.
"""

# Triton annotates what it turns into a constexpr, and strides are passed as tuples; its range is not one to a checker:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_scores import CHUNK, SUB, channel_kernel, chunk_kernel, product

PIECE = 256  # tokens of a block that one program sums


@triton.jit
def _sum_kernel(
    k,
    v,
    passed,
    sums,
    k_row,
    k_token,
    k_head,
    v_row,
    v_token,
    v_head,
    v_channel,
    length,
    block,
    per_block,
    parts,
    heads,
    D: tl.constexpr,
    E: tl.constexpr,
    gates: tl.constexpr,
    piece: tl.constexpr,
    tile_d: tl.constexpr,
    tile_e: tl.constexpr,
    precise: tl.constexpr,
):
    """sums[row, head, part] = sum over the part's tokens of (k_j exp(G_end - G_j)) v_j^T."""
    part = tl.program_id(0)
    row, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    tiles_e: tl.constexpr = (E + tile_e - 1) // tile_e
    d = tl.program_id(2) // tiles_e * tile_d + tl.arange(0, tile_d)
    e = tl.program_id(2) % tiles_e * tile_e + tl.arange(0, tile_e)
    first = part // per_block * block + part % per_block * piece
    end = tl.minimum(tl.minimum(first + piece, (part // per_block + 1) * block), length)
    total = tl.zeros((tile_d, tile_e), tl.float32)
    for start in range(first, first + piece, CHUNK):
        token = (start + tl.arange(0, CHUNK)).to(tl.int64)
        inside = token < end
        k_at = k + row * k_row + head * k_head + token[None, :] * k_token + d[:, None]
        key = tl.load(k_at, mask=inside[None, :] & (d < D)[:, None], other=0.0)
        v_at = v + row * v_row + head * v_head + token[:, None] * v_token + e[None, :] * v_channel
        value = tl.load(v_at, mask=inside[:, None] & (e < E)[None, :], other=0.0)
        if gates == 0:
            total = tl.dot(key, value, total, input_precision=precise)
        else:
            begun = row * parts * CHUNK  # gates are padded to whole chunks
            if gates == 1:
                after = tl.load(passed + (begun + start + CHUNK - 1) * heads + head)
                before = tl.load(passed + (begun + token) * heads + head)
                key = key.to(tl.float32) * tl.exp(after - before)[None, :]
            else:
                after = tl.load(passed + ((begun + start + CHUNK - 1) * heads + head) * D + d, d < D, other=0.0)
                at = passed + ((begun + token[None, :]) * heads + head) * D + d[:, None]
                before = tl.load(at, mask=(d < D)[:, None], other=0.0)
                key = key.to(tl.float32) * tl.exp(after[:, None] - before)
            total = product(key, value, total, precise)
    to = sums + ((row * heads + head) * parts + part) * (D * E) + d[:, None] * E + e[None, :]
    tl.store(to, total, mask=(d < D)[:, None] & (e < E)[None, :])


@triton.jit
def _scan_kernel(
    sums,
    steps,
    state,
    kept,
    last,
    groups,
    per_group,
    heads,
    D: tl.constexpr,
    E: tl.constexpr,
    gates: tl.constexpr,
    inclusive: tl.constexpr,
    tile: tl.constexpr,
):
    """kept[group]: the state before a group's sums are added (groups are parts then), or after."""
    row_head = tl.program_id(0).to(tl.int64)
    row, head = row_head // heads, row_head % heads
    at = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = at < D * E
    now = tl.load(state + row_head * (D * E) + at, mask=inside, other=0.0)
    sums += row_head * groups * per_group * (D * E) + at
    kept += row_head * groups * (D * E) + at
    # One loop over all parts, so that the loads of the next ones are under way while one is added.
    for part in tl.range(0, groups * per_group, num_stages=4):
        wide = row_head * 0 + part  # int64, which the loop's own counter is not
        added = tl.load(sums + wide * (D * E), mask=inside, other=0.0)
        group, place = wide // per_group, wide % per_group
        if not inclusive:
            tl.store(kept + group * (D * E), now.to(kept.dtype.element_ty), mask=inside)
        if gates == 1:
            left = tl.exp(tl.load(steps + (row * groups + group) * heads + head))
            now *= tl.where(place == 0, left, 1.0)
        elif gates == 2:
            step = steps + ((row * groups + group) * heads + head) * D + at // E
            now *= tl.where(place == 0, tl.exp(tl.load(step, mask=inside, other=0.0)), 1.0)
        now += added
        if inclusive:
            whole = inside & (at * 0 + place == per_group - 1)
            tl.store(kept + group * (D * E), now.to(kept.dtype.element_ty), mask=whole)
    tl.store(last + row_head * (D * E) + at, now, mask=inside)


@triton.jit
def _read_kernel(
    q,
    kept,
    out,
    q_row,
    q_token,
    q_head,
    length,
    block,
    per_block,
    groups,
    heads,
    D: tl.constexpr,
    E: tl.constexpr,
    tile_d: tl.constexpr,
    tile_e: tl.constexpr,
    precise: tl.constexpr,
):
    """out_i = q_i S_n for 64 tokens of block n."""
    group = tl.program_id(0) // per_block
    row, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    e = tl.program_id(2) * tile_e + tl.arange(0, tile_e)
    place = tl.program_id(0) % per_block * CHUNK + tl.arange(0, CHUNK)
    token = (group * block + place).to(tl.int64)
    inside = place < block
    state = kept + ((row * heads + head) * groups + group) * (D * E)
    total = tl.zeros((CHUNK, tile_e), tl.float32)
    for start in range(0, D, tile_d):
        d = start + tl.arange(0, tile_d)
        q_at = q + row * q_row + head * q_head + token[:, None] * q_token + d[None, :]
        query = tl.load(q_at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        s = tl.load(state + d[:, None] * E + e[None, :], mask=(d < D)[:, None] & (e < E)[None, :], other=0.0)
        if query.dtype == tl.bfloat16:
            total = tl.dot(query, s.to(tl.bfloat16), total)
        else:
            total = tl.dot(query.to(tl.float32), s, total, input_precision=precise)
    to = out + ((row * length + token[:, None]) * heads + head) * E + e[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])


def linear_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, block: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`reference.chunked` (block 1) or `reference.recurrent` (block >= 32), float32 inside; the output is `dtype`."""
    rows, length, heads, D = q.shape
    E = v.shape[-1]
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    by_token = block == 1
    span = CHUNK.value if by_token else block
    piece = CHUNK.value if by_token else PIECE
    groups, per_group = triton.cdiv(length, span), triton.cdiv(span, piece)
    parts = groups * per_group
    kind = 0 if g is None else 1 if g.shape[-1] == 1 else 2
    passed = steps = state  # a stand-in that is never read
    if g is not None:
        steps = g.float().contiguous()
        if by_token:
            steps = torch.nn.functional.pad(steps, (0, 0, 0, 0, 0, groups * span - length))
            passed = steps.unflatten(1, (groups, span)).cumsum(2)
            steps = passed[:, :, -1].contiguous()
    tile_d, tile_e = (min(64, max(16, triton.next_power_of_2(n))) for n in (D, E))
    precise = "tf32x3" if q.dtype == torch.float32 else "tf32"  # in three parts float32 keeps its precision
    state = state.contiguous()
    sums = q.new_empty((rows, heads, parts, D, E), dtype=torch.float32)
    # bfloat16 products round the states they read anyway.
    kept_dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    kept = q.new_empty((rows, heads, groups, D, E), dtype=kept_dtype)
    last = torch.empty_like(state)
    out = q.new_empty((rows, length, heads, E), dtype=dtype)
    q_strides, k_strides, v_strides = q.stride()[:3], k.stride()[:3], v.stride()
    tiles_e = triton.cdiv(E, tile_e)
    with torch.cuda.device_of(q):  # Triton launches on the current device, wherever its tensors are
        _sum_kernel[(parts, rows * heads, triton.cdiv(D, tile_d) * tiles_e)](
            k, v, passed, sums, *k_strides, *v_strides, length, span, per_group, parts, heads,
            D, E, kind if by_token else 0, piece, tile_d, tile_e, precise, num_stages=1 if by_token else 3,
        )  # fmt: skip
        _scan_kernel[(rows * heads, triton.cdiv(D * E, 512))](
            sums, steps, state, kept, last, groups, per_group, heads, D, E, kind, not by_token, 512
        )  # fmt: skip
        shape = (length, parts, heads, D, E)
        if not by_token:
            per_block = triton.cdiv(block, CHUNK.value)
            _read_kernel[(groups * per_block, rows * heads, tiles_e)](
                q, kept, out, *q_strides, length, block, per_block, groups, heads, D, E, tile_d, tile_e, precise,
                num_stages=2,
            )  # fmt: skip
        elif kind == 2:
            channel_kernel[(parts * (CHUNK.value // SUB.value), rows * heads, tiles_e)](
                q, k, v, passed, kept, out, *q_strides, *k_strides, *v_strides, *shape,
                max(16, triton.next_power_of_2(D)), tile_e, precise,
            )  # fmt: skip
        else:
            chunk_kernel[(parts, rows * heads, tiles_e)](
                q, k, v, passed, kept, out, *q_strides, *k_strides, *v_strides, *shape, kind, tile_d, tile_e, precise,
                num_stages=2,
            )  # fmt: skip
    return out, last
