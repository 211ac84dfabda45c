"""What dynamic planners share: block means, and the choice of blocks by rank or by cumulative share."""

from __future__ import annotations

import torch
from torch import Tensor


def block_means(x: Tensor, block: int) -> Tensor:
    """Mean token of each block: x [B, L, H, D] as [B, H, ceil(L / block), D], float32."""
    tokens = x.shape[1]
    whole = tokens // block
    means = x[:, : whole * block].unflatten(1, (whole, block)).mean(2, dtype=torch.float32)
    if whole * block < tokens:
        means = torch.cat([means, x[:, whole * block :].mean(1, keepdim=True, dtype=torch.float32)], 1)
    return means.transpose(1, 2)


def block_scores(q: Tensor, k: Tensor, block: tuple[int, int]) -> Tensor:
    """Scores between block means, times D ** -0.5, float32 [B, H, NQ, NK]."""
    return (block_means(q, block[0]) * q.shape[-1] ** -0.5) @ block_means(k, block[1]).mT


def top_k(scores: Tensor, count: int) -> Tensor:
    """Bool like `scores`: the `count` highest of each row."""
    count = min(count, scores.shape[-1])
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(count, dim=-1).indices, True)


def top_share(weights: Tensor, share: float) -> Tensor:
    """Bool like `weights` (not negative): the fewest largest of each row that hold `share` of its sum."""
    ordered, order = weights.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = before < share * ordered.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter_(-1, order, kept)
