"""The two Triton kernels of token-causal linear attention that form scores, inside chunks of 64 tokens."""

# Triton annotates what it turns into a constexpr, and strides are passed as tuples:
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(64)
SUB = tl.constexpr(16)  # tokens whose mutual gates are taken channel by channel


@triton.jit
def product(a, b, total, precise: tl.constexpr):
    """total + a b with float32 `a`: bfloat16 has the range to hold it, for float16 and float32 TF32 or better does."""
    if b.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.bfloat16), b, total)
    return tl.dot(a, b.to(tl.float32), total, input_precision=precise)


@triton.jit
def chunk_kernel(
    q,
    k,
    v,
    passed,
    kept,
    out,
    q_row,
    q_token,
    q_head,
    k_row,
    k_token,
    k_head,
    v_row,
    v_token,
    v_head,
    v_channel,
    length,
    parts,
    heads,
    D: tl.constexpr,
    E: tl.constexpr,
    gates: tl.constexpr,
    tile_d: tl.constexpr,
    tile_e: tl.constexpr,
    precise: tl.constexpr,
):
    """A chunk of 64 tokens, one gate per head or none: the state before it, and its own scores under their decay."""
    part = tl.program_id(0)
    row, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    e = tl.program_id(2) * tile_e + tl.arange(0, tile_e)
    place = tl.arange(0, CHUNK)
    token = (part * CHUNK + place).to(tl.int64)
    inside = token < length
    state = kept + ((row * heads + head) * parts + part) * (D * E)
    total = tl.zeros((CHUNK, tile_e), tl.float32)
    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    for start in range(0, D, tile_d):
        d = start + tl.arange(0, tile_d)
        q_at = q + row * q_row + head * q_head + token[:, None] * q_token + d[None, :]
        query = tl.load(q_at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        k_at = k + row * k_row + head * k_head + token[None, :] * k_token + d[:, None]
        key = tl.load(k_at, mask=inside[None, :] & (d < D)[:, None], other=0.0)
        scores = tl.dot(query, key, scores, input_precision=precise)
        s = tl.load(state + d[:, None] * E + e[None, :], mask=(d < D)[:, None] & (e < E)[None, :], other=0.0)
        if query.dtype == tl.bfloat16:
            total = tl.dot(query, s.to(tl.bfloat16), total)
        else:
            total = tl.dot(query.to(tl.float32), s, total, input_precision=precise)
    if gates == 1:
        gone = tl.load(passed + (row * parts * CHUNK + token) * heads + head)
        total *= tl.exp(gone)[:, None]
        scores *= tl.exp(tl.minimum(gone[:, None] - gone[None, :], 0.0))
    scores = tl.where(place[:, None] >= place[None, :], scores, 0.0)
    v_at = v + row * v_row + head * v_head + token[:, None] * v_token + e[None, :] * v_channel
    value = tl.load(v_at, mask=inside[:, None] & (e < E)[None, :], other=0.0)
    total = product(scores, value, total, precise)
    to = out + ((row * length + token[:, None]) * heads + head) * E + e[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])


@triton.jit
def channel_kernel(
    q,
    k,
    v,
    passed,
    kept,
    out,
    q_row,
    q_token,
    q_head,
    k_row,
    k_token,
    k_head,
    v_row,
    v_token,
    v_head,
    v_channel,
    length,
    parts,
    heads,
    D: tl.constexpr,
    E: tl.constexpr,
    tile_d: tl.constexpr,
    tile_e: tl.constexpr,
    precise: tl.constexpr,
):
    """16 tokens of a chunk with a gate per channel (GLA's secondary chunks): earlier sixteens are met by products, with
    both sides decayed to the boundary between them; inside the sixteen, gates are taken pair by pair."""
    subs: tl.constexpr = CHUNK // SUB
    part, sub = tl.program_id(0) // subs, tl.program_id(0) % subs
    row, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    e = tl.program_id(2) * tile_e + tl.arange(0, tile_e)
    d = tl.arange(0, tile_d)
    begin = part * CHUNK
    place = tl.arange(0, SUB)
    token = (begin + sub * SUB + place).to(tl.int64)
    inside = token < length
    gates = passed + row * parts * CHUNK * heads * D + head * D + d
    k_at, v_at = k + row * k_row + head * k_head + d, v + row * v_row + head * v_head + e * v_channel
    q_at = q + row * q_row + head * q_head + token[:, None] * q_token + d[None, :]
    query = tl.load(q_at, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    gone = tl.load(gates[None, :] + token[:, None] * heads * D, mask=(d < D)[None, :], other=0.0)
    state = kept + ((row * heads + head) * parts + part) * (D * E)
    s = tl.load(state + d[:, None] * E + e[None, :], mask=(d < D)[:, None] & (e < E)[None, :], other=0.0)
    total = tl.zeros((SUB, tile_e), tl.float32)
    if v.dtype.element_ty == tl.bfloat16:
        total = tl.dot((query * tl.exp(gone)).to(tl.bfloat16), s.to(tl.bfloat16), total)
    else:
        total = tl.dot(query * tl.exp(gone), s, total, input_precision=precise)
    boundary = tl.maximum(begin + sub * SUB - 1, 0).to(tl.int64)
    edge = tl.load(gates + boundary * heads * D, mask=d < D, other=0.0)
    edge = tl.where(sub > 0, edge, 0.0)  # the chunk's own start
    toward = query * tl.exp(gone - edge[None, :])
    for earlier in range(0, sub):
        other = (begin + earlier * SUB + place).to(tl.int64)
        key = tl.load(k_at[None, :] + other[:, None] * k_token, mask=(d < D)[None, :], other=0.0).to(tl.float32)
        away = tl.load(gates[None, :] + other[:, None] * heads * D, mask=(d < D)[None, :], other=0.0)
        key *= tl.exp(edge[None, :] - away)
        value = tl.load(v_at[None, :] + other[:, None] * v_token, mask=(e < E)[None, :], other=0.0)
        scores = tl.dot(toward, tl.trans(key), input_precision=precise)
        total = product(scores, value, total, precise)
    scores = tl.zeros((SUB, SUB), tl.float32)
    for j in range(0, SUB):
        one = tl.minimum(begin + sub * SUB + j, length - 1).to(tl.int64)  # what is past the end reaches no real query
        key = tl.load(k_at + one * k_token, mask=d < D, other=0.0).to(tl.float32)
        away = tl.load(gates + one * heads * D, mask=d < D, other=0.0)
        column = tl.sum(query * key[None, :] * tl.exp(tl.minimum(gone - away[None, :], 0.0)), axis=1)
        scores = tl.where((place[None, :] == j) & (place[:, None] >= j), column[:, None], scores)
    value = tl.load(v_at[None, :] + token[:, None] * v_token, mask=inside[:, None] & (e < E)[None, :], other=0.0)
    total = product(scores, value, total, precise)
    to = out + ((row * length + token[:, None]) * heads + head) * E + e[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])
