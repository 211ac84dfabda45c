"""Philox4x32-10 noise in Triton: the arithmetic of `reference.py`, one program per block of counters of one row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTERS = 256


# Not specialised on its integers, or the first steps of every stream (0, 1, ...) would each compile a kernel.
@triton.jit(do_not_specialize=["step", "count"])
def _philox_kernel(
    out,
    seed,
    frame,
    step,
    count,
    shift: tl.constexpr,
    to_unit: tl.constexpr,
    normal: tl.constexpr,
    counters: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    key = tl.load(seed + row)
    at = tl.load(frame + row)
    column = tl.program_id(0).to(tl.int64) * counters + tl.arange(0, counters)
    zero = column.to(tl.uint32) * 0
    w0, w1, w2, w3 = tl.philox_impl(
        column.to(tl.uint32),
        zero + (at & 0xFFFFFFFF).to(tl.uint32),
        zero + ((at >> 32) & 0xFFFFFFFF).to(tl.uint32),
        (zero + step).to(tl.uint32),
        (key & 0xFFFFFFFF).to(tl.uint32),
        ((key >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )
    if normal:
        # float64 throughout, so that rounding to float32 hides which library took the logarithm. A bare Python number
        # would become float32: harmless for 2^-32, which is exact, but not for 2 pi / 2^32.
        unit = tl.full((1,), 2.3283064365386963e-10, tl.float64)
        turn = tl.full((1,), 1.4629180792671596e-09, tl.float64)
        radius = tl.sqrt(-2.0 * tl.log((w0.to(tl.float64) + 0.5) * unit))
        angle = w1.to(tl.float64) * turn
        x0, x1 = radius * tl.cos(angle), radius * tl.sin(angle)
        radius = tl.sqrt(-2.0 * tl.log((w2.to(tl.float64) + 0.5) * unit))
        angle = w3.to(tl.float64) * turn
        x2, x3 = radius * tl.cos(angle), radius * tl.sin(angle)
    else:
        x0, x1 = (w0 >> shift).to(tl.float64) * to_unit, (w1 >> shift).to(tl.float64) * to_unit
        x2, x3 = (w2 >> shift).to(tl.float64) * to_unit, (w3 >> shift).to(tl.float64) * to_unit
    element = 4 * column
    target = out + row * count + element
    tl.store(target, x0.to(out.dtype.element_ty), mask=element < count)
    tl.store(target + 1, x1.to(out.dtype.element_ty), mask=element + 1 < count)
    tl.store(target + 2, x2.to(out.dtype.element_ty), mask=element + 2 < count)
    tl.store(target + 3, x3.to(out.dtype.element_ty), mask=element + 3 < count)


def philox_triton(seed: Tensor, frame: Tensor, step: int, count: int, *, bits: int | None) -> Tensor:
    """Standard normal float32 [R, count]; with `bits`, uniform float64 [R, count], multiples of 2^-bits."""
    dtype = torch.float32 if bits is None else torch.float64
    out = torch.empty((seed.shape[0], count), dtype=dtype, device=seed.device)
    if out.numel() == 0:  # CUDA refuses an empty grid
        return out
    grid = (triton.cdiv(count, 4 * COUNTERS), seed.shape[0])
    shift = 32 - (bits or 32)
    with torch.cuda.device_of(seed):  # Triton launches on the current device, wherever its tensors are
        _philox_kernel[grid](
            out,
            seed.contiguous(),
            frame.contiguous(),
            step,
            count,
            shift,  # pyright: ignore[reportArgumentType]  # Triton annotates what it turns into a constexpr
            2.0 ** (shift - 32),  # pyright: ignore[reportArgumentType]
            bits is None,  # pyright: ignore[reportArgumentType]
            COUNTERS,  # pyright: ignore[reportArgumentType]
        )
    return out
