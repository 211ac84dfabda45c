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
    more,
    gamma,
    out,
    kept,
    frames,
    pixels,
    x_batch,
    x_frame,
    x_pixel,
    out_batch,
    out_frame,
    out_pixel,
    kept_batch,
    kept_frame,
    count,
    root,
    smallest,
    adds: tl.constexpr,
    keeps: tl.constexpr,
    channels: tl.constexpr,
    padded: tl.constexpr,
    places: tl.constexpr,
):
    place = tl.program_id(0) * places + tl.arange(0, places)
    pixel, rest = place % pixels, place // pixels
    frame, batch = rest % frames, rest // frames
    at = tl.arange(0, padded)[None, :]
    inside = (place < count)[:, None] & (at < channels)
    column = pixel.to(tl.int64)
    source = (batch.to(tl.int64) * x_batch + frame.to(tl.int64) * x_frame + column * x_pixel)[:, None] + at
    value = tl.load(x + source, mask=inside, other=0.0)
    if adds:
        value = (value.to(tl.float32) + tl.load(more + source, mask=inside, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(more + source, value, mask=inside)
    value = value.to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), smallest)
    value *= (root / length)[:, None] * tl.load(gamma + at, mask=at < channels, other=0.0).to(tl.float32)
    value = (value / (1.0 + tl.exp(-value))).to(out.dtype.element_ty)
    front = (batch.to(tl.int64) * out_batch + column * out_pixel)[:, None] + at
    tl.store(out + front + ((frame + keeps).to(tl.int64) * out_frame)[:, None], value, mask=inside)
    if keeps:
        # The program that writes a last frame also moves the kept one out of its way: nobody else touches that place.
        old = (batch.to(tl.int64) * kept_batch + column * channels)[:, None] + at
        if frames == 1:
            for index in tl.static_range(keeps):  # pyright: ignore[reportGeneralTypeIssues]
                before = tl.load(kept + old + index * kept_frame, mask=inside, other=0.0)
                tl.store(out + front + index * out_frame, before, mask=inside)
                if index > 0:
                    tl.store(kept + old + (index - 1) * kept_frame, before, mask=inside)
            tl.store(kept + old + (keeps - 1) * kept_frame, value, mask=inside)
        else:
            index = (frame - (frames - keeps)).to(tl.int64)[:, None]
            late = inside & (index >= 0)
            before = tl.load(kept + old + index * kept_frame, mask=late, other=0.0)
            tl.store(out + front + index * out_frame, before, mask=late)
            tl.store(kept + old + index * kept_frame, value, mask=late)


def serves(x: Tensor, out: Tensor, kept: Tensor | None, more: Tensor | None) -> bool:
    """Do these lie as the kernel wants them: channels are neighbours, and so are the rows of a frame?"""
    if not (x.numel() and all(_is_even(part) for part in (x, out))):
        return False
    sizes = zip(x.shape, x.stride(), x.stride() if more is None else more.stride())
    alike = all(size == 1 or one == other for size, one, other in sizes)
    if kept is None:
        return alike
    dense = kept.permute(0, 2, 3, 4, 1).is_contiguous()
    return alike and dense and (x.shape[2] == 1 or x.shape[2] >= kept.shape[2])


def _is_even(x: Tensor) -> bool:
    neighbours = x.shape[1] == 1 or x.stride(1) == 1
    return neighbours and (x.shape[3] == 1 or x.stride(3) == x.shape[4] * x.stride(4))


def norm_silu_triton(
    x: Tensor, gamma: Tensor, out: Tensor, kept: Tensor | None = None, more: Tensor | None = None
) -> None:
    """Tensors that `serves` says yes to."""
    batch, channels, frames, height, width = x.shape
    padded = triton.next_power_of_2(channels)
    places = max(1, VALUES // padded)
    count = batch * frames * height * width
    _norm_silu_kernel[(triton.cdiv(count, places),)](
        x,
        x if more is None else more,
        gamma.contiguous(),
        out,
        x if kept is None else kept,
        frames,
        height * width,
        *(x.stride(dim) for dim in (0, 2, 4)),
        *(out.stride(dim) for dim in (0, 2, 4)),
        0 if kept is None else kept.shape[2] * channels * height * width,
        channels * height * width,
        count,
        channels**0.5,
        SMALLEST,
        adds=more is not None,
        keeps=0 if kept is None else kept.shape[2],
        channels=channels,
        padded=padded,
        places=places,
    )
