"""Planners that leave nothing out: blocks that are not visited stand in by their centroid."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import BlockPlan, KVSummary
from .scores import block_means


def pisa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    density: float = 0.15,
    block: int = 64,
    first_order: bool = False,
) -> BlockPlan:
    """PISA, piecewise sparse attention (arXiv 2602.01077): the best blocks exact, the rest by mean key and value.

    Args:
        density: share of key blocks that is exact; at least one per query block.
        block: block size of queries and keys; the source's is 64.
        first_order: add the term of the keys' spread, shared by all blocks.
    """
    summary = KVSummary.of(k, v, block, first_order=first_order)
    scores = block_means(q, block) @ summary.key.float().mT
    count = round(density * scores.shape[-1])
    return BlockPlan.best(scores, count, (block, block), k.shape[1], rest="centroid", summary=summary)


def svg_ear(q: Tensor, k: Tensor, v: Tensor, *, density: float = 0.15, block: int = 64) -> BlockPlan:
    """SVG-EAR, error-aware routing (arXiv 2603.08982): exact where the centroid would err most for its cost.

    *Surrogate*: the error of a skipped block is n_j exp(s q.k_j) (sigma_v + s |q| sigma_k |v_j|) / (n_i n_j), with
    sigma the spread of keys and values in the block, and blocks of neighbouring tokens stand for the source's clusters
    (give q, k, v in clustered order for those).
    """
    scale = q.shape[-1] ** -0.5
    summary = KVSummary.of(k, v, block)
    queries = block_means(q, block)
    scores = queries @ summary.key.float().mT * scale
    spread_k, spread_v = (_spread(x, mean, block) for x, mean in ((k, summary.key), (v, summary.value)))
    risk = spread_v[:, :, None] + scale * queries.norm(dim=-1)[..., None] * (
        spread_k * summary.value.float().norm(dim=-1)
    ).unsqueeze(2)
    error = scores + risk.clamp_min(1e-20).log()  # the counts cancel where all blocks are of one size
    count = round(density * scores.shape[-1])
    return BlockPlan.best(error, count, (block, block), k.shape[1], rest="centroid", summary=summary)


def _spread(x: Tensor, mean: Tensor, block: int) -> Tensor:
    """Root mean square distance of a block's tokens from their mean, [B, H, blocks]."""
    squares = block_means((x.float() ** 2).sum(-1, keepdim=True), block)[..., 0]
    return (squares - mean.float().square().sum(-1)).clamp_min(0).sqrt()


def kmeans(x: Tensor, clusters: int, *, steps: int = 4, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm on x [B, H, L, D]: (cluster of each token int64 [B, H, L], centroids float32 [B, H, C, D]).

    `start` are centroids to begin with, from the step before; otherwise tokens at equal distances are taken. A cluster
    that loses all its tokens keeps its centroid.
    """
    if start is None:
        at = torch.linspace(0, x.shape[2] - 1, clusters, device=x.device).round().long()
        start = x[:, :, at].float()
    centroids = start
    labels = torch.zeros(x.shape[:3], dtype=torch.int64, device=x.device)
    for _ in range(steps):
        # |x|^2 is the same for every centroid, so it is left out of the distance.
        distance = centroids.square().sum(-1)[:, :, None] - 2 * (x @ centroids.to(x.dtype).mT)
        labels = distance.argmin(-1)
        spread = labels[..., None].expand(*x.shape)
        sums = torch.zeros_like(centroids).scatter_add_(2, spread, x.float())
        counts = torch.zeros_like(centroids[..., 0]).scatter_add_(
            2, labels, torch.ones_like(labels, dtype=torch.float32)
        )
        centroids = torch.where((counts > 0)[..., None], sums / counts.clamp_min(1)[..., None], centroids)
    return labels, centroids
