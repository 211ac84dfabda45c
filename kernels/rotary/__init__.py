"""Wan's three-dimensional rotary position embedding, exact at any frame of an endless stream."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import apply_rotary_reference, rotary_angles_reference, shift_angles_reference

__all__ = ["apply_rotary", "rotary_angles", "shift_frames"]


def rotary_angles(
    frames: Tensor, height: int, width: int, head_dim: int, *, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token of a latent grid, tokens in (frame, row, column) order.

    A head's channels are divided as in diffusers' `WanRotaryPosEmbed`: 2 * (head_dim // 6) turn with the row, as many
    with the column, the rest with the frame, and each axis has its own frequencies theta ** (-2i / axis_dim). Angles
    are computed in float64 and no table is kept, so frame 10,000,000 is as exact as frame 10.

    Args:
        frames: int64 [..., F], the index of each latent frame in its stream. Leading dimensions are rows.
        height, width: the token grid of one frame (latent size divided by the patch size).
        head_dim: channels per head, even.
        theta: the base of the frequencies.

    Returns:
        (cos, sin), float32 [..., F * height * width, head_dim // 2], on the device of `frames`.

    Raises:
        TypeError: `frames` is not an integer tensor. ValueError: a size out of range.
    """
    if frames.is_floating_point() or frames.dtype == torch.bool:
        raise TypeError(f"frames must be integer frame indices, got {frames.dtype}")
    if frames.ndim == 0:
        raise ValueError("frames must be [..., F], got a scalar; give it one dimension with frames.reshape(1)")
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1 token, got {height} x {width}")
    _check_head_dim(head_dim)
    if frames.device.type == "mps":  # which has no float64
        cos, sin = rotary_angles_reference(frames.cpu(), height, width, head_dim, theta)
        return cos.to(frames.device), sin.to(frames.device)
    return rotary_angles_reference(frames, height, width, head_dim, theta)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each neighbouring pair of channels (x[..., 0::2], x[..., 1::2]) by its angle, as Wan does.

    Args:
        x: queries or keys [B, L, H, D], any floating dtype. The product is taken in float32.
        cos, sin: from `rotary_angles`, [L, D // 2] or [B, L, D // 2]; a size of 1 broadcasts.

    Returns:
        A new tensor [B, L, H, D] in `x`'s dtype.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(f"x must be [B, L, H, D] with an even D, got {list(x.shape)}")
    full = (x.shape[0], x.shape[1], x.shape[3] // 2)
    fits = all(a in (1, b) for a, b in zip(cos.shape[-2::-1], full[1::-1], strict=False))
    if cos.shape != sin.shape or cos.ndim not in (2, 3) or cos.shape[-1] != full[-1] or not fits:
        raise ValueError(
            f"cos and sin must both be [L, D // 2] or [B, L, D // 2] with [B, L, D // 2] = {list(full)}, "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
    return apply_rotary_reference(x, cos, sin)


def shift_frames(k: Tensor, delta: Tensor | int, *, theta: float = 10000.0) -> Tensor:
    """Move already rotated keys by `delta` frames in time; rows and columns stay.

    Rotations form a group, R(t + d) = R(d) R(t), so this equals rotating the raw keys at the later frame. It is how
    sink frames are kept just before a moving window.

    Args:
        k: rotated keys [B, L, H, D].
        delta: frames to move by, negative for back in time: one int, or an int64 tensor [B].
        theta: the base of the frequencies, as given to `rotary_angles`.

    Returns:
        A new tensor [B, L, H, D] in `k`'s dtype.

    Raises:
        ValueError: shapes that do not belong together. TypeError: a fractional `delta`.
    """
    if k.ndim != 4:
        raise ValueError(f"k must be [B, L, H, D], got {list(k.shape)}")
    _check_head_dim(k.shape[-1])
    if isinstance(delta, int):
        delta = torch.full((1,), delta, dtype=torch.int64, device=k.device)
    if not isinstance(delta, Tensor) or delta.is_floating_point():
        seen = delta.dtype if isinstance(delta, Tensor) else repr(delta)
        raise TypeError(f"delta must be whole frames, an int or an int64 tensor [B], got {seen}")
    if delta.ndim != 1 or delta.shape[0] not in (1, k.shape[0]):
        raise ValueError(f"delta must be one int or [B] = [{k.shape[0]}], got {list(delta.shape)}")
    if delta.device.type == "mps":  # which has no float64
        cos, sin = (part.to(delta.device) for part in shift_angles_reference(delta.cpu(), k.shape[-1], theta))
    else:
        cos, sin = shift_angles_reference(delta, k.shape[-1], theta)
    return apply_rotary_reference(k, cos, sin)


def _check_head_dim(head_dim: int) -> None:
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even and at least 2 (channels turn in pairs), got {head_dim}")
