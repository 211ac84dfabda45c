"""The elementwise ops of a transformer block in Triton: one program per token, every value read and written once."""

# Triton annotates what it turns into a constexpr, and strides are passed as tuples:
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import LARGEST, SMALLEST, empty_rows


@triton.jit
def _norm_rotary_kernel(
    x,
    weight,
    cos,
    sin,
    order,
    out,
    x_row,
    x_token,
    cos_row,
    cos_token,
    tokens,
    eps,
    width: tl.constexpr,
    half: tl.constexpr,
    by_head: tl.constexpr,
    permuted: tl.constexpr,
    narrow: tl.constexpr,
    pairs: tl.constexpr,
):
    to, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = tl.load(order + to).to(tl.int64) if permuted else to.to(tl.int64)
    at = tl.arange(0, 2 * pairs)
    inside = at < width
    value = tl.load(x + row * x_row + token * x_token + at, mask=inside, other=0.0).to(tl.float32)
    if by_head:
        value = tl.reshape(value, (pairs // half, 2 * half))
        mean = tl.sum(value * value, axis=1) / (2 * half)
        value *= tl.rsqrt(mean + eps)[:, None] * tl.load(weight + tl.arange(0, 2 * half)).to(tl.float32)[None, :]
    else:
        mean = tl.sum(value * value, axis=0) / width
        value *= tl.rsqrt(mean + eps) * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, (pairs, 2)))
    cos += row * cos_row + token * cos_token
    sin += row * cos_row + token * cos_token
    if half & (half - 1):
        pair = tl.arange(0, pairs)
        c = tl.load(cos + pair % half, mask=2 * pair < width, other=0.0)
        s = tl.load(sin + pair % half, mask=2 * pair < width, other=0.0)
    else:  # whole heads: each angle is read once
        even, odd = tl.reshape(even, (pairs // half, half)), tl.reshape(odd, (pairs // half, half))
        c = tl.load(cos + tl.arange(0, half))[None, :]
        s = tl.load(sin + tl.arange(0, half))[None, :]
    turned = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (2 * pairs,))
    if narrow:
        turned = tl.minimum(tl.maximum(turned, -448.0), 448.0)
    tl.store(out + (row * tokens + to) * width + at, turned.to(out.dtype.element_ty), mask=inside)


@triton.jit
def normalised(
    value,
    weight,
    bias,
    at,
    inside,
    eps,
    width: tl.constexpr,
    weighted: tl.constexpr,
    biased: tl.constexpr,
):
    """LayerNorm of one token, in float32."""
    centred = tl.where(inside, value - tl.sum(value, axis=0) / width, 0.0)
    normal = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    if weighted:
        normal *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if biased:
        normal += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    return normal


@triton.jit
def _put(values, at, value, width: tl.constexpr, whole: tl.constexpr):
    if whole:
        value = (value + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum has no bits after the point, ties go to even
    tl.store(values + at, value.to(values.dtype.element_ty), mask=at < width)


@triton.jit
def put_row(out, scales, token, at, value, smallest, width: tl.constexpr, largest: tl.constexpr, whole: tl.constexpr):
    """Write one token's row; with `largest` in 8 bits, and its scale. `value` is 0 past the row."""
    if largest > 0:
        most = tl.maximum(tl.max(tl.abs(value), axis=0), smallest)
        value *= tl.div_rn(largest, most)
        tl.store(scales + token, tl.div_rn(most, largest))
    _put(out + token * width, at, value, width, whole)


@triton.jit
def _norm_modulate_kernel(
    x,
    shift,
    scale,
    weight,
    bias,
    out,
    scales,
    x_row,
    x_token,
    shift_row,
    shift_group,
    scale_row,
    scale_group,
    tokens,
    group_size,
    eps,
    smallest,
    width: tl.constexpr,
    weighted: tl.constexpr,
    biased: tl.constexpr,
    columns: tl.constexpr,
    largest: tl.constexpr,
    whole: tl.constexpr,
):
    token, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group = token // group_size
    at = tl.arange(0, columns)
    inside = at < width
    value = tl.load(x + row * x_row + token.to(tl.int64) * x_token + at, mask=inside, other=0.0).to(tl.float32)
    normal = normalised(value, weight, bias, at, inside, eps, width, weighted, biased)
    a = tl.load(scale + row * scale_row + group * scale_group + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(shift + row * shift_row + group * shift_group + at, mask=inside, other=0.0).to(tl.float32)
    normal = (normal * (1 + a) + b).to(x.dtype.element_ty).to(tl.float32)
    put_row(out, scales, row * tokens + token, at, normal, smallest, width, largest, whole)


@triton.jit
def _gate_residual_kernel(
    x,
    y,
    gate,
    out,
    x_row,
    x_token,
    y_row,
    y_token,
    gate_row,
    gate_group,
    tokens,
    group_size,
    width: tl.constexpr,
    columns: tl.constexpr,
):
    token, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, columns)
    inside = at < width
    value = tl.load(x + row * x_row + token.to(tl.int64) * x_token + at, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(y + row * y_row + token.to(tl.int64) * y_token + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_row + token // group_size * gate_group + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + (row * tokens + token) * width + at, (value + added * g).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_silu_kernel(x, out, x_token, width: tl.constexpr, columns: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * columns + tl.arange(0, columns)
    inside = at < width
    gate = tl.load(x + token * x_token + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + token * x_token + width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + at, (gate * tl.sigmoid(gate) * value).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _part(x, at, width: tl.constexpr, activated: tl.constexpr):
    """Some columns of a row, or their GELU by tanh, which is a sigmoid of twice its argument; zeros past the row."""
    value = tl.load(x + at, mask=at < width, other=0.0).to(tl.float32)
    if activated:
        value *= tl.sigmoid(1.5957691216057308 * value * (1.0 + 0.044715 * value * value))
    return value


@triton.jit
def _quantize_kernel(
    x,
    values,
    scales,
    x_token,
    smallest,
    width: tl.constexpr,
    largest: tl.constexpr,
    whole: tl.constexpr,
    activated: tl.constexpr,
    head: tl.constexpr,
    tail: tl.constexpr,
):
    # Widths are seldom powers of two: a row is a wide part and, unless it is done, a narrower one.
    token = tl.program_id(0).to(tl.int64)
    x += token * x_token
    values += token * width
    first = _part(x, tl.arange(0, head), width, activated)
    most = tl.maximum(tl.max(tl.abs(first), axis=0), smallest)
    if tail:
        last = _part(x, head + tl.arange(0, tail), width, activated)
        most = tl.maximum(most, tl.max(tl.abs(last), axis=0))
    factor = tl.div_rn(largest, most)
    _put(values, tl.arange(0, head), first * factor, width, whole)
    if tail:
        _put(values, head + tl.arange(0, tail), last * factor, width, whole)  # pyright: ignore[reportPossiblyUnboundVariable]
    tl.store(scales + token, tl.div_rn(most, largest))


def _warps(columns: int) -> int:
    return min(8, max(1, columns // 512))


def _two_parts(width: int) -> tuple[int, int]:
    """Two powers of two that hold a row with the fewest lanes to spare; the second 0 where one does."""
    head = triton.next_power_of_2(width)
    if head == width:
        return head, 0
    tail = triton.next_power_of_2(width - head // 2)
    return (head // 2, tail) if tail < head // 2 else (head, 0)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _row_stride(x: Tensor) -> int:
    """0 where one row serves all."""
    return 0 if x.shape[0] == 1 else x.stride(0)


def norm_rotary_triton(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    permutation: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.norm_rotary_reference` without its intermediate results."""
    rows, tokens, width = x.shape
    out = x.new_empty((rows, tokens, heads, width // heads), dtype=dtype)
    x, (cos, sin) = _rows(x), (part.float().contiguous() for part in (cos, sin))
    row_stride = 0 if cos.ndim == 2 or cos.shape[0] == 1 else cos.stride(0)
    token_stride = 0 if cos.shape[-2] == 1 else cos.stride(-2)
    pairs = triton.next_power_of_2(width // 2)
    order = cos if permutation is None else permutation.contiguous()  # a stand-in that is never read
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever its tensors are
        _norm_rotary_kernel[(tokens, rows)](
            x, weight.contiguous(), cos, sin, order, out, x.stride(0), x.stride(1), row_stride, token_stride, tokens,
            eps, width, width // heads // 2, weight.numel() < width, permutation is not None,
            dtype == torch.float8_e4m3fn, pairs, num_warps=_warps(2 * pairs),
        )  # fmt: skip
    return out


def norm_modulate_triton(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.norm_modulate_reference`; `shift` and `scale` may be slices of one projection."""
    rows, tokens, width = x.shape
    out, scales = empty_rows(x, dtype)
    x, shift, scale = _rows(x), _rows(shift), _rows(scale)
    columns = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _norm_modulate_kernel[(tokens, rows)](
            x, shift, scale, x if weight is None else weight.contiguous(), x if bias is None else bias.contiguous(),
            out, scales, x.stride(0), x.stride(1), _row_stride(shift), shift.stride(1), _row_stride(scale),
            scale.stride(1), tokens, tokens // shift.shape[1], eps, SMALLEST, width, weight is not None,
            bias is not None, columns, *rounding(dtype), num_warps=_warps(columns),
        )  # fmt: skip
    return out, scales


def rounding(dtype: torch.dtype | None) -> tuple[float, bool]:
    """The largest number of `dtype`, 0 where rows are not quantised, and whether its numbers are whole."""
    return (0.0 if dtype is None else LARGEST[dtype]), dtype == torch.int8


def gate_residual_triton(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`reference.gate_residual_reference`."""
    rows, tokens, width = x.shape
    out = x.new_empty(x.shape)
    x, y, gate = _rows(x), _rows(y), _rows(gate)
    columns = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _gate_residual_kernel[(tokens, rows)](
            x, y, gate, out, x.stride(0), x.stride(1), y.stride(0), y.stride(1), _row_stride(gate), gate.stride(1),
            tokens, tokens // gate.shape[1], width, columns, num_warps=_warps(columns),
        )  # fmt: skip
    return out


def gated_silu_triton(x: Tensor) -> Tensor:
    """`reference.gated_silu_reference`."""
    width = x.shape[-1] // 2
    flat = _rows(x.reshape(-1, 2 * width))
    out = x.new_empty((*x.shape[:-1], width))
    columns = min(1024, triton.next_power_of_2(width))
    with torch.cuda.device_of(x):
        _gated_silu_kernel[(flat.shape[0], triton.cdiv(width, columns))](
            flat, out, flat.stride(0), width, columns, num_warps=_warps(columns)
        )
    return out


def quantize_rows_triton(x: Tensor, dtype: torch.dtype, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """`reference.quantize_rows_reference`, equal to the bit without GELU."""
    width = x.shape[-1]
    flat = _rows(x.reshape(-1, width))
    values, scales = empty_rows(x, dtype)
    head, tail = _two_parts(width)
    with torch.cuda.device_of(x):
        _quantize_kernel[(flat.shape[0],)](
            flat, values, scales, flat.stride(0), SMALLEST, width, *rounding(dtype), gelu, head, tail,
            num_warps=_warps(head), enable_fp_fusion=False,
        )  # fmt: skip
    return values, scales
