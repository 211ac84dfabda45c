"""Where a branch joins the residual stream and the next norm reads it: both in one pass over memory, in Triton."""

# Triton annotates what it turns into a constexpr, and strides are passed as tuples:
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import SMALLEST, empty_rows
from .triton import _row_stride, _rows, _warps, normalised, put_row, rounding


@triton.jit
def _gate_norm_kernel(
    x,
    y,
    gate,
    shift,
    scale,
    weight,
    bias,
    total,
    out,
    scales,
    x_row,
    x_token,
    y_row,
    y_token,
    gate_row,
    gate_group,
    gate_size,
    shift_row,
    shift_group,
    scale_row,
    scale_group,
    group_size,
    tokens,
    eps,
    smallest,
    width: tl.constexpr,
    gated: tl.constexpr,
    shifted: tl.constexpr,
    weighted: tl.constexpr,
    biased: tl.constexpr,
    columns: tl.constexpr,
    largest: tl.constexpr,
    whole: tl.constexpr,
):
    token, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, columns)
    inside = at < width
    value = tl.load(x + row * x_row + token.to(tl.int64) * x_token + at, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(y + row * y_row + token.to(tl.int64) * y_token + at, mask=inside, other=0.0).to(tl.float32)
    if gated:
        g = gate + row * gate_row + token // gate_size * gate_group + at
        added *= tl.load(g, mask=inside, other=0.0).to(tl.float32)
    rounded = (value + added).to(total.dtype.element_ty)
    tl.store(total + (row * tokens + token) * width + at, rounded, mask=inside)
    value = rounded.to(tl.float32)
    normal = normalised(value, weight, bias, at, inside, eps, width, weighted, biased)
    if shifted:
        group = token // group_size
        a = tl.load(scale + row * scale_row + group * scale_group + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(shift + row * shift_row + group * shift_group + at, mask=inside, other=0.0).to(tl.float32)
        normal = normal * (1 + a) + b
    normal = normal.to(total.dtype.element_ty).to(tl.float32)
    put_row(out, scales, row * tokens + token, at, normal, smallest, width, largest, whole)


def gate_norm_triton(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.gate_norm_reference`; the norm reads the sum as it is stored."""
    rows, tokens, width = x.shape
    total, (out, scales) = x.new_empty(x.shape), empty_rows(x, dtype)
    x, y = _rows(x), _rows(y)
    # Stand-ins that are never read.
    g, a, b = (x if part is None else _rows(part) for part in (gate, scale, shift))
    columns = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _gate_norm_kernel[(tokens, rows)](
            x, y, g, b, a, x if weight is None else weight.contiguous(), x if bias is None else bias.contiguous(),
            total, out, scales, x.stride(0), x.stride(1), y.stride(0), y.stride(1), _row_stride(g), g.stride(1),
            tokens // g.shape[1], _row_stride(b), b.stride(1), _row_stride(a), a.stride(1), tokens // b.shape[1],
            tokens, eps, SMALLEST, width, gate is not None, shift is not None, weight is not None, bias is not None,
            columns, *rounding(dtype), num_warps=_warps(columns),
        )  # fmt: skip
    return total, out, scales
