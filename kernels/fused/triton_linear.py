"""A quantised matrix product in Triton that scales back, adds the bias and rounds where it would write anyway."""

# Triton annotates what it turns into a constexpr, and strides are passed as tuples:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import is_hopper


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
    bulk: tl.constexpr,
    flat: tl.constexpr,
):
    # With `bulk`, `values` and `weight` are descriptors of blocks, which the copy engine fetches by itself.
    # Tiles go down bands of `band` row tiles, so that neighbours in time share weights in the second-level cache. Where
    # there are fewer programs than tiles, the loads of a program's next tile begin before it has written the last.
    tiles_m, tiles_n = tl.cdiv(rows, tile_m), tl.cdiv(columns, tile_n)
    in_band = band * tiles_n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=flat):
        first = tile // in_band * band
        height = tl.minimum(tiles_m - first, band)
        m_start = (first + tile % in_band % height) * tile_m
        n_start = tile % in_band // height * tile_n
        m, n = m_start + tl.arange(0, tile_m), n_start + tl.arange(0, tile_n)
        total = tl.zeros((tile_m, tile_n), tl.int32 if whole else tl.float32)
        if not bulk:
            # Rows past the end read the last row: cheaper than a mask, and never written.
            a_at = values + tl.minimum(m, rows - 1).to(tl.int64)[:, None] * depth
            b_at = weight + tl.minimum(n, columns - 1).to(tl.int64)[None, :] * depth
        for start in range(0, depth, tile_k):
            if bulk:
                a = values.load([m_start, start])
                b = tl.trans(weight.load([n_start, start]))
            else:
                k = start + tl.arange(0, tile_k)
                a = tl.load(a_at + k[None, :], mask=(k < depth)[None, :], other=0.0)  # pyright: ignore[reportPossiblyUnboundVariable]
                b = tl.load(b_at + k[:, None], mask=(k < depth)[:, None], other=0.0)  # pyright: ignore[reportPossiblyUnboundVariable]
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


class Tiles(NamedTuple):
    """How a product is cut: rows, columns and depth of a tile, warps, stages, whether the copy engine fetches, and how
    many programs each multiprocessor runs to the end (0: every tile is a program of its own)."""

    m: int
    n: int
    k: int
    warps: int = 8
    stages: int = 3
    bulk: bool = False
    resident: int = 0


# What is tried on Hopper for products of many rows. Two programs on each multiprocessor, of which one writes while the
# other multiplies, were the fastest for all products of Wan 1.3B.
USUAL = Tiles(128, 128, 128, warps=4, bulk=True, resident=2)
CANDIDATES = (
    Tiles(128, 256, 128),
    USUAL,
    Tiles(128, 128, 128, warps=4, bulk=True),
    Tiles(128, 128, 64, warps=4, stages=5, bulk=True, resident=2),
    Tiles(128, 256, 128, bulk=True, resident=1),
    Tiles(128, 256, 128, stages=4, bulk=True),
    Tiles(256, 128, 128, bulk=True),
    # Small tiles fill the last round of multiprocessors better.
    Tiles(64, 128, 128, warps=4, bulk=True),
    Tiles(64, 128, 128, warps=4, stages=4, bulk=True, resident=2),
)
MANY = 512  # rows
_fastest: dict[tuple[int, int, int, torch.device], Tiles] = {}


def quantized_product_triton(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> Tensor:
    """`reference.quantized_product_reference`; int8 sums are exact in int32, whatever the tiles.

    Without `tiles`, int8 products of many rows on Hopper find their own where `torch.backends.cudnn.benchmark` asks for
    what is fastest, as a pipeline's warm-up does: their results are the same to the bit.
    """
    values, weight = values.contiguous(), weight.contiguous()
    out = values.new_empty((values.shape[0], weight.shape[0]), dtype=dtype)

    def run(tiles: Tiles) -> None:
        _launch(tiles, values, scale.contiguous(), weight, weight_scale.contiguous(), bias, out)

    with torch.cuda.device_of(values):  # Triton launches on the current device, wherever its tensors are
        run(tiles or _chosen(values, weight, run))
    return out


def _launch(
    tiles: Tiles, values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    (rows, depth), columns = values.shape, weight.shape[0]
    if tiles.bulk:
        from triton.tools.tensor_descriptor import TensorDescriptor

        a, b = (
            TensorDescriptor.from_tensor(part, [size, tiles.k]) for part, size in ((values, tiles.m), (weight, tiles.n))
        )
    else:
        a, b = values, weight
    programs = triton.cdiv(rows, tiles.m) * triton.cdiv(columns, tiles.n)
    if tiles.resident:
        programs = min(programs, tiles.resident * _multiprocessors(values.device))
    _linear_kernel[(programs,)](
        a, scale, b, weight_scale, scale if bias is None else bias.contiguous(), out, rows, columns, depth,
        bias is not None, values.dtype == torch.int8, tiles.m, tiles.n, tiles.k, 8, tiles.bulk, tiles.resident > 0,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _chosen(values: Tensor, weight: Tensor, run: Callable[[Tiles], None]) -> Tiles:
    (rows, depth), columns = values.shape, weight.shape[0]
    key = rows, columns, depth, values.device
    if values.dtype == torch.int8 and rows >= MANY and depth % 16 == 0 and is_hopper(values.device):
        if key not in _fastest and torch.backends.cudnn.benchmark and not torch.cuda.is_current_stream_capturing():
            _fastest[key] = fastest(run)
        return _fastest.get(key, USUAL)
    # The largest tiles of which there are enough for every multiprocessor of an H100.
    tiles = rows * columns // (132 * 128 * 128)
    return Tiles(128, 256, 128) if tiles >= 4 else Tiles(128, 128, 128) if tiles else Tiles(64, 64, 64, warps=4)


def fastest(run: Callable[[Tiles], None]) -> Tiles:
    """The candidate that takes the least time; one that this Triton cannot compile is left out."""
    taken: dict[Tiles, float] = {}
    for tiles in CANDIDATES:
        try:
            run(tiles)
            taken[tiles] = min(_milliseconds(lambda: run(tiles)) for _ in range(3))  # noqa: B023 (called at once)
        except (RuntimeError, ImportError, triton.CompilationError, triton.OutOfResources):
            if tiles == CANDIDATES[0]:
                raise
    return min(taken, key=taken.__getitem__)


def _milliseconds(call: Callable[[], None], count: int = 10) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / count
