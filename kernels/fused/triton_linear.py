"""A quantised matrix product in Triton that scales back, adds the bias and rounds where it would write anyway."""

# Triton annotates what it turns into a constexpr, and strides are passed as tuples:
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _linear_kernel(
    values,
    scale,
    weight,
    weight_scale,
    bias,
    out,
    rows,
    columns,
    depth,
    biased: tl.constexpr,
    whole: tl.constexpr,
    tile_m: tl.constexpr,
    tile_n: tl.constexpr,
    tile_k: tl.constexpr,
    band: tl.constexpr,
):
    # Programs walk down bands of `band` row tiles, so that neighbours in time share weights in the second-level cache.
    tiles_m, tiles_n = tl.cdiv(rows, tile_m), tl.cdiv(columns, tile_n)
    in_band = band * tiles_n
    first = tl.program_id(0) // in_band * band
    height = tl.minimum(tiles_m - first, band)
    m = (first + tl.program_id(0) % in_band % height) * tile_m + tl.arange(0, tile_m)
    n = tl.program_id(0) % in_band // height * tile_n + tl.arange(0, tile_n)
    # Rows past the end read the last row: cheaper than a mask, and never written.
    a_at = values + tl.minimum(m, rows - 1).to(tl.int64)[:, None] * depth
    b_at = weight + tl.minimum(n, columns - 1).to(tl.int64)[None, :] * depth
    if whole:
        total = tl.zeros((tile_m, tile_n), tl.int32)
    else:
        total = tl.zeros((tile_m, tile_n), tl.float32)
    for start in range(0, depth, tile_k):
        k = start + tl.arange(0, tile_k)
        a = tl.load(a_at + k[None, :], mask=(k < depth)[None, :], other=0.0)
        b = tl.load(b_at + k[:, None], mask=(k < depth)[:, None], other=0.0)
        if whole:
            total = tl.dot(a, b, total, out_dtype=tl.int32)
        else:
            total = tl.dot(a, b, total)
    left = tl.load(scale + m, mask=m < rows, other=0.0)
    right = tl.load(weight_scale + n, mask=n < columns, other=0.0)
    result = total.to(tl.float32) * left[:, None] * right[None, :]
    if biased:
        result += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    to = out + m.to(tl.int64)[:, None] * columns + n[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < columns)[None, :])


def quantized_product_triton(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`reference.quantized_product_reference`; int8 sums are exact in int32."""
    values, weight = values.contiguous(), weight.contiguous()
    (rows, depth), columns = values.shape, weight.shape[0]
    out = values.new_empty((rows, columns), dtype=dtype)
    # The largest tiles of which there are enough for every multiprocessor of an H100.
    tiles = rows * columns // (132 * 128 * 128)
    tile_m, tile_n, tile_k, warps = (
        (128, 256, 128, 8) if tiles >= 4 else (128, 128, 128, 8) if tiles else (64, 64, 64, 4)
    )
    with torch.cuda.device_of(values):  # Triton launches on the current device, wherever its tensors are
        _linear_kernel[(triton.cdiv(rows, tile_m) * triton.cdiv(columns, tile_n),)](
            values, scale.contiguous(), weight, weight_scale.contiguous(), scale if bias is None else bias.contiguous(),
            out, rows, columns, depth, bias is not None, values.dtype == torch.int8, tile_m, tile_n, tile_k, 8,
            num_warps=warps, num_stages=3,
        )  # fmt: skip
    return out
