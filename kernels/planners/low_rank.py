"""Attention through a few agent tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention import attend


def agent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    *,
    pool: tuple[int, int] = (7, 7),
    scale: float | None = None,
    dwc: Tensor | None = None,
) -> Tensor:
    """Agent attention (arXiv 2312.08874): agents A are pooled queries; they ask the keys, and answer the queries.

    softmax(q A^T s) [softmax(A k^T s) v] + depthwise convolution of v: two calls of `attend`, linear in the tokens.

    Args:
        q, k, v: [B, L, H, D], L tokens of a 2-D `grid` (a last axis fastest).
        pool: agents per axis; 7 x 7 = 49 in the source.
        dwc: weights [H * D, 1, 3, 3] of the depthwise convolution over v; None leaves it out.
    """
    heads, dim = q.shape[2:]
    image = q.flatten(2).transpose(1, 2).unflatten(2, tuple(grid))  # [B, H * D, rows, columns]
    agents = torch.nn.functional.adaptive_avg_pool2d(image, pool).flatten(2).transpose(1, 2)
    agents = agents.unflatten(2, (heads, dim))
    out = attend(q, agents, attend(agents, k, v, scale=scale), scale=scale)
    if dwc is None:
        return out
    values = v.flatten(2).transpose(1, 2).unflatten(2, tuple(grid))
    local = torch.nn.functional.conv2d(values, dwc, padding=1, groups=heads * dim)
    return out + local.flatten(2).transpose(1, 2).unflatten(2, (heads, dim))
