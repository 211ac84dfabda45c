"""Attention over queries, keys and values that are float8_e4m3fn as they lie in memory, without scales.

Queries and keys are normed, and e4m3 has the same relative error of at most 1/16 from 1/64 up to 448: a scale would
give them nothing. Values lie turned, as `turned` tells.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..backend import is_hopper, runs_triton
from ..float8 import FLOAT8
from . import attend
from .plan import BlockPlan
from .sparse import attend_triton
from .turned import GRAIN, turned_back

BLOCK = (64, 128)


def attend_float8(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention with products in FP8 where `float8_serves`; elsewhere, and under a mask, in bfloat16.

    Args:
        q: queries [B, Lq, H, D], float8_e4m3fn like k and v.
        k: keys [B, Lk, H, D].
        v: turned values [B, H, D, n], as `turn_values` wrote them, n a multiple of 16 from Lk on; what lies past the
            keys must be finite.
        mask: bool, broadcastable to [B, H, Lq, Lk]; True where a query sees a key.
        scale: multiplies the scores; None means D ** -0.5.

    Returns:
        (out [B, Lq, H, D] bfloat16, log-sum-exp of the scaled scores float32 [B, H, Lq]).

    Raises:
        TypeError: other dtypes. ValueError: shapes that do not belong together.
    """
    if not q.dtype == k.dtype == v.dtype == FLOAT8:
        raise TypeError(f"attend_float8 wants float8_e4m3fn, got {q.dtype}, {k.dtype} and {v.dtype}")
    batch, tokens, heads, dim = k.shape
    turned = v.shape[:3] == (batch, heads, dim) and v.shape[3] >= tokens and v.shape[3] % GRAIN == 0
    if not turned or (q.shape[0], *q.shape[2:]) != (batch, heads, dim):
        raise ValueError(
            f"attend_float8 wants q [B, Lq, H, D], k [B, Lk, H, D] and turned values [B, H, D, n], n a multiple of "
            f"{GRAIN} from Lk on, got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    scale = float(dim**-0.5) if scale is None else scale
    if mask is None and tokens and float8_serves(q.device, dim):
        return attend_triton(q, k, v, _everything(q.shape[1], tokens, q.device), None, scale, dtype=torch.bfloat16)
    wide = (q.bfloat16(), k.bfloat16(), turned_back(v, tokens).bfloat16())
    return attend(*wide, mask=mask, scale=scale, return_lse=True)


@cache
def float8_serves(device: torch.device, dim: int) -> bool:
    """Are there FP8 products for heads of `dim` channels on `device`?"""
    return dim in (64, 128) and is_hopper(device) and runs_triton(torch.empty(0, device=device))


@cache  # for a step that is recorded must not make it
def _everything(queries: int, keys: int, device: torch.device) -> BlockPlan:
    return BlockPlan.dense(queries, keys, BLOCK, device)
