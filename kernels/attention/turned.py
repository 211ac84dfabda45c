"""Values in 8 bits as Hopper's FP8 tensor cores want them: [B, H, D, L], their tokens next to one another.

The tokens of each 16 lie in `key_order`, so L is a multiple of 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import runs_triton
from ..float8 import FLOAT8, to_float8

GRAIN = 16  # tokens that are turned together


def key_order(rows: int, device: torch.device) -> Tensor:
    """Which token stands at each place of the turned values, int64 [rows], a multiple of 16.

    Of 16 keys the pairs are 0 4 1 5 2 6 3 7: those of one thread in the scores' tile become neighbours.
    """
    return torch.arange(rows, device=device).view(-1, 2, 4, 2).transpose(1, 2).flatten()


def turned_place(token: Tensor) -> Tensor:
    """Where a token's value lies among turned values: the inverse of `key_order`, of any integers."""
    return token // 16 * 16 + token % 8 // 2 * 4 + token % 16 // 8 * 2 + token % 2


def turn_values(v: Tensor, out: Tensor, start: int = 0, scale: Tensor | None = None) -> None:
    """Write values [B, n, H, D], any floating dtype, into turned values `out` [B, H, D, L], tokens `start` and on.

    Args:
        scale: float32 [B, H, D] that each channel is divided by first; None leaves them as they are.
    """
    if out.is_cuda and runs_triton(v, what="the float8_e4m3fn Triton kernel", capability=(8, 9)):
        from .quantize_triton import turn_triton

        turn_triton(v if v.stride(-1) == 1 else v.contiguous(), out, start, scale)
        return
    at = turned_place(torch.arange(start, start + v.shape[1], device=v.device))
    values = to_float8(v if scale is None else v.float() / scale[:, None])
    # As bytes, which every kernel of PyTorch can move.
    out.view(torch.uint8).permute(0, 3, 1, 2)[:, at] = values.view(torch.uint8)


def turned_back(v: Tensor, tokens: int) -> Tensor:
    """The first tokens [B, tokens, H, D] of turned values [B, H, D, L]."""
    at = turned_place(torch.arange(tokens, device=v.device))
    return v.view(torch.uint8)[..., at].permute(0, 3, 1, 2).contiguous().view(FLOAT8)
