"""What stands before every convolution of a video codec, in one pass over memory: a norm over channels, then SiLU."""

from __future__ import annotations

from torch import Tensor

from ..backend import runs_triton
from .reference import norm_silu_reference

__all__ = ["norm_silu"]


def norm_silu(x: Tensor, gamma: Tensor, *, out: Tensor) -> None:
    """silu(x / |x| sqrt(C) gamma) into `out`, where |x| is the length of a place's channels.

    On a GPU it is one kernel where both tensors lie channels-last; their other strides may be any, so `out` may be a
    part of a larger buffer, as it is where a codec lays new frames beside kept ones.

    Args:
        x: [B, C, T, H, W], any floating dtype. Arithmetic is in float32, rounded once there (and once between norm and
            SiLU in PyTorch).
        gamma: C numbers, of any shape.
        out: where the result goes, of x's shape; not `x` itself.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if x.ndim != 5 or out.shape != x.shape or gamma.numel() != x.shape[1]:
        raise ValueError(
            f"norm_silu wants x and out of one shape [B, C, T, H, W] and C numbers of gamma, got x {list(x.shape)}, "
            f"out {list(out.shape)} and gamma {list(gamma.shape)}"
        )
    if runs_triton(x) and x.stride(1) == out.stride(1) == 1 and x.numel():
        from .triton import norm_silu_triton

        norm_silu_triton(x, gamma, out)
    else:
        norm_silu_reference(x, gamma, out)
