"""8-bit tiles and their scales in one pass, and values turned so that their keys are neighbours."""

# Triton's language is read as Python, but it is another.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["rows", "blocks"])
def _quantize_kernel(
    x_ptr, out_ptr, scale_ptr, mean_ptr, sb, sl, sh, rows, blocks, heads, largest,
    block: tl.constexpr, size: tl.constexpr, dim: tl.constexpr, has_mean: tl.constexpr, integer: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    inside = tl.arange(0, size)  # a power of two, which a block need not be
    at = tile * block + inside
    known = ((inside < block) & (at < rows))[:, None]
    channels = tl.arange(0, dim)
    x_at = x_ptr + batch * sb + head * sh + at.to(tl.int64)[:, None] * sl + channels[None, :]
    x = tl.load(x_at, mask=known, other=0.0).to(tl.float32)
    if has_mean:
        x = tl.where(known, x - tl.load(mean_ptr + pair * dim + channels)[None, :], 0.0)
    scale = tl.max(tl.max(tl.abs(x), 1), 0) / largest + 1e-12
    x = x / scale
    if integer:
        x = tl.floor(x + 0.5)
    out_at = out_ptr + ((batch * rows + at.to(tl.int64)) * heads + head)[:, None] * dim + channels[None, :]
    tl.store(out_at, x.to(out_ptr.dtype.element_ty), mask=known)
    tl.store(scale_ptr + pair * blocks + tile, scale)


def quantize_tiles_triton(x: Tensor, block: int, how: str, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `quantize_tiles`."""
    batch, rows, heads, dim = x.shape
    blocks = triton.cdiv(rows, block)
    dtype, largest = (torch.int8, 127.0) if how == "int8" else (torch.float8_e4m3fn, 448.0)
    out = x.new_empty(x.shape, dtype=dtype)
    scale = x.new_empty((batch, heads, blocks), dtype=torch.float32)
    _quantize_kernel[(blocks, batch * heads)](
        x, out, scale, mean, *x.stride()[:3], rows, blocks, heads, largest,
        block=block, size=triton.next_power_of_2(block), dim=dim, has_mean=mean is not None, integer=how == "int8",
    )  # fmt: skip
    return out, scale


@triton.jit(do_not_specialize=["start", "tokens"])
def _turn_kernel(
    v_ptr, scale_ptr, out_ptr, sb, sl, sh, ob, oh, od, start, tokens, heads,
    tile: tl.constexpr, dim: tl.constexpr, scaled: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    first = start // 16 * 16 + tl.program_id(0) * tile
    at = first + tl.arange(0, tile)
    channels = tl.arange(0, dim)
    token = at // 16 * 16 + at % 16 // 2 % 2 * 8 + at % 16 // 4 * 2 + at % 2 - start  # see `turned.key_order`
    v_at = v_ptr + batch * sb + head * sh + token.to(tl.int64)[:, None] * sl + channels[None, :]
    out_at = out_ptr + batch * ob + head * oh + channels[:, None] * od + at.to(tl.int64)[None, :]
    scale = None
    if scaled:
        scale = tl.load(scale_ptr + pair * dim + channels)
    if (first >= start) & (first + tile <= start + tokens):  # without a mask, whole words are stored
        tl.store(out_at, _turned(tl.load(v_at), scale, out_ptr.dtype.element_ty))
    else:
        known = (token >= 0) & (token < tokens)
        v = tl.load(v_at, mask=known[:, None], other=0.0)
        tl.store(out_at, _turned(v, scale, out_ptr.dtype.element_ty), mask=known[None, :])


@triton.jit
def _turned(v, scale, kind: tl.constexpr):
    v = v.to(tl.float32)
    if scale is not None:
        v = v / scale[None, :]
    return tl.trans(tl.minimum(tl.maximum(v, -448.0), 448.0).to(kind))


def turn_triton(v: Tensor, out: Tensor, start: int, scale: Tensor | None) -> None:
    """See `turned.turn_values`."""
    batch, tokens, heads, dim = v.shape
    tile = 64  # more would not stay in registers
    with torch.cuda.device_of(v):  # Triton launches on the current device, wherever its tensors are
        _turn_kernel[(triton.cdiv(start % 16 + tokens, tile), batch * heads)](
            v, scale, out, *v.stride()[:3], *out.stride()[:3], start, tokens, heads,
            tile=tile, dim=dim, scaled=scale is not None,
        )  # fmt: skip
