"""What stands before every convolution of a video codec, in one pass over memory: a norm over channels, then SiLU."""

from __future__ import annotations

from torch import Tensor

from ..backend import runs_triton
from .reference import norm_silu_reference

__all__ = ["norm_silu"]


def norm_silu(x: Tensor, gamma: Tensor, *, out: Tensor, kept: Tensor | None = None, more: Tensor | None = None) -> None:
    """silu(x / |x| sqrt(C) gamma) into `out`, where |x| is the length of a place's channels.

    On a GPU it is one kernel where tensors lie channels-last; `out` may be a part of a larger buffer.

    Args:
        x: [B, C, T, H, W], any floating dtype. Arithmetic is in float32, rounded once there (and once between norm and
            SiLU in PyTorch).
        gamma: C numbers, of any shape.
        out: where the result goes, of x's shape; not `x` itself. With `kept` it has K frames more, in front.
        kept: [B, C, K, H, W], the last K frames that went to `out` before: they are laid in front of the new ones, and
            are then the last K frames of `out`, as a causal convolution wants it.
        more: is added to x first; holds the sum afterwards. Of x's shape and dtype.

    Raises:
        ValueError: shapes that do not belong together.
    """
    held = 0 if kept is None else kept.shape[2]
    wanted = (*x.shape[:2], x.shape[2] + held, *x.shape[3:]) if x.ndim == 5 else ()
    if x.ndim != 5 or out.shape != wanted or gamma.numel() != x.shape[1]:
        raise ValueError(
            "norm_silu wants x and out of one shape [B, C, T, H, W], out with room for the kept frames, and C numbers "
            f"of gamma, got x {list(x.shape)}, out {list(out.shape)}, {held} kept and gamma {list(gamma.shape)}"
        )
    if kept is not None and kept.shape != (*x.shape[:2], held, *x.shape[3:]):
        raise ValueError(f"kept frames must be like those of x {list(x.shape)}, got {list(kept.shape)}")
    if more is not None and (more.shape, more.dtype) != (x.shape, x.dtype):
        raise ValueError(f"what is added must be like x {list(x.shape)}, {x.dtype}, got {list(more.shape)}")
    if runs_triton(x):
        from .triton import norm_silu_triton, serves

        if serves(x, out, kept, more):
            norm_silu_triton(x, gamma, out, kept, more)
            return
    norm_silu_reference(x, gamma, out, kept, more)
