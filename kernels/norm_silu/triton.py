"""The same in Triton: one program per few places, every value read and written once."""

# Triton annotates what it turns into a constexpr:
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .reference import SMALLEST

VALUES = 4096  # of one program, padding included


@triton.jit
def _norm_silu_kernel(
    x,
    gamma,
    out,
    frames,
    height,
    width,
    x_batch,
    x_frame,
    x_row,
    x_column,
    out_batch,
    out_frame,
    out_row,
    out_column,
    count,
    root,
    smallest,
    channels: tl.constexpr,
    padded: tl.constexpr,
    places: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * places + tl.arange(0, places)
    column, rest = place % width, place // width
    row, rest = rest % height, rest // height
    frame, batch = rest % frames, rest // frames
    at = tl.arange(0, padded)
    inside = (place < count)[:, None] & (at < channels)[None, :]
    source = batch * x_batch + frame * x_frame + row * x_row + column * x_column
    value = tl.load(x + source[:, None] + at[None, :], mask=inside, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), smallest)
    weight = tl.load(gamma + at, mask=at < channels, other=0.0).to(tl.float32) * root
    value = value / length[:, None] * weight[None, :]
    value = value / (1.0 + tl.exp(-value))
    target = batch * out_batch + frame * out_frame + row * out_row + column * out_column
    tl.store(out + target[:, None] + at[None, :], value.to(out.dtype.element_ty), mask=inside)


def norm_silu_triton(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """`x` and `out` [B, C, T, H, W] with neighbouring channels."""
    batch, channels, frames, height, width = x.shape
    padded = triton.next_power_of_2(channels)
    places = max(1, VALUES // padded)
    count = batch * frames * height * width
    x_batch, _, *x_strides = x.stride()
    out_batch, _, *out_strides = out.stride()
    _norm_silu_kernel[(triton.cdiv(count, places),)](
        x,
        gamma.contiguous(),
        out,
        frames,
        height,
        width,
        x_batch,
        *x_strides,
        out_batch,
        *out_strides,
        count,
        channels**0.5,
        SMALLEST,
        channels=channels,
        padded=padded,
        places=places,
    )
