"""Planners that reorder tokens, so that what belongs together lies in one block."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor

from ..attention import BlockPlan, BoxMask, Permutation, causal_frames
from .centroid import kmeans
from .scores import block_scores, top_share

ORDERS = tuple(permutations(range(3)))


def svg1(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    *,
    num_sampled_rows: int = 32,
    sparsity: float = 0.25,
    block: int = 128,
    generator: torch.Generator | None = None,
) -> BlockPlan:
    """Sparse VideoGen (arXiv 2502.01776): each head gets the spatial or the temporal mask, whichever errs less.

    `num_sampled_rows` queries are attended fully and under both masks; the mask with the smaller mean squared error
    is the head's. Temporal heads see their tokens place by place, so that both masks are one band around the
    diagonal: of `sparsity` times the tokens, the share of keys that is kept.
    """
    frames, tokens = grid[0], q.shape[1]
    place = torch.arange(tokens, device=q.device)
    by_place = place.view(frames, -1).T.flatten()  # the token at each slot, place by place
    rank = torch.stack([place, by_place.argsort()])  # where each token stands in (spatial, temporal) order
    half = int(sparsity * tokens / 2)
    rows = torch.randperm(tokens, generator=generator, device="cpu")[:num_sampled_rows].to(q.device)
    scores = (q[:, rows].transpose(1, 2) @ k.permute(0, 2, 3, 1)).float() * q.shape[-1] ** -0.5
    values = v.transpose(1, 2).float()
    truth = scores.softmax(-1) @ values
    errors = [
        ((scores.masked_fill((r[rows, None] - r).abs() > half, -torch.inf).softmax(-1) @ values - truth) ** 2).mean(
            (2, 3)
        )
        for r in rank
    ]
    temporal = (errors[1] < errors[0])[..., None]  # [B, H, 1]
    source = torch.where(temporal, by_place, place).to(torch.int32)
    slots = -(-tokens // block) * block
    source = torch.nn.functional.pad(source, (0, slots - tokens), value=-1)
    at = torch.arange(slots, device=q.device, dtype=torch.int32)[None, None, None]
    mask = BoxMask(at - half, at + half, at)
    lengths = _lengths(tokens, block, q.device)
    return BlockPlan.of_mask(
        mask, slots, slots, (block, block), lengths=(lengths, lengths), permutation=Permutation(source, source)
    )  # fmt: skip


def svg2(
    q: Tensor,
    k: Tensor,
    *,
    num_q_clusters: int = 300,
    num_k_clusters: int = 1000,
    top_p: float = 0.9,
    kmeans_iterations: int = 2,
    block: tuple[int, int] = (128, 64),
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[BlockPlan, tuple[Tensor, Tensor]]:
    """Sparse VideoGen 2 (arXiv 2505.18875): semantic clusters of queries and keys per head, in blocks of their own.

    The weight of a pair of clusters is n_j exp(s q_i . k_j) over its row; the largest are visited until they hold
    `top_p`. A cluster lies in as many blocks as it needs.

    Returns:
        The plan, and the centroids, which are the next step's `start`.
    """
    starts = start or (None, None)
    labels_q, centres_q = kmeans(q.transpose(1, 2), num_q_clusters, steps=kmeans_iterations, start=starts[0])
    labels_k, centres_k = kmeans(k.transpose(1, 2), num_k_clusters, steps=kmeans_iterations, start=starts[1])
    source_q, lengths_q, cluster_q, _ = _clustered(labels_q, num_q_clusters, block[0])
    source_k, lengths_k, cluster_k, counts_k = _clustered(labels_k, num_k_clusters, block[1])
    logits = centres_q @ centres_k.mT * q.shape[-1] ** -0.5 + counts_k.float().log()[:, :, None]
    chosen = top_share(logits.softmax(-1), top_p)
    # From clusters to the blocks they lie in.
    rows = chosen.gather(2, cluster_q[..., None].expand(*cluster_q.shape, chosen.shape[-1]))
    visit = rows.gather(3, cluster_k[:, :, None].expand(*rows.shape[:3], -1)) & (lengths_q > 0)[..., None]
    plan = BlockPlan.of(
        visit,
        block,
        source_k.shape[-1],
        lengths=(lengths_q, lengths_k),
        permutation=Permutation(source_q, source_k),
    )
    return plan, (centres_q, centres_k)


def pbs(
    q: Tensor, k: Tensor, *, segment_size: int = 256, threshold: float = 0.9, block: int = 128, last: int = 128
) -> BlockPlan:
    """Permuted block-sparse attention (arXiv 2510.21270), causal: keys are sorted inside each segment by their weight.

    The weight of a key is its mean probability for the `last` queries. Blocks are chosen on pooled scores of sorted
    keys until they hold `threshold`; a query's own segment and the block of token 0 are kept. Masks compare the
    original places.
    """
    tokens = k.shape[1]
    scale = q.shape[-1] ** -0.5
    probe = q[:, -last:].transpose(1, 2)
    scores = (probe @ k.permute(0, 2, 3, 1)).float() * scale
    at = torch.arange(tokens, device=q.device)
    seen = at <= at[-probe.shape[2] :, None]
    weight = scores.masked_fill(~seen, -torch.inf).softmax(-1).mean(2)  # [B, H, L]
    slots = -(-tokens // segment_size) * segment_size
    weight = torch.nn.functional.pad(weight, (0, slots - tokens), value=-1.0).unflatten(-1, (-1, segment_size))
    inside = weight.argsort(dim=-1, descending=True, stable=True)
    source = (inside + torch.arange(0, slots, segment_size, device=q.device)[:, None]).flatten(2)
    valid = source < tokens
    sorted_k = k.transpose(1, 2).gather(2, source.clamp_max(tokens - 1)[..., None].expand(-1, -1, -1, k.shape[-1]))
    pooled = block_scores(q, sorted_k.transpose(1, 2), (block, block))
    n_q, n_k = pooled.shape[-2:]
    own = torch.arange(n_q, device=q.device)[:, None] * block // segment_size
    of = torch.arange(n_k, device=q.device) * block // segment_size
    chosen = top_share(pooled.masked_fill(of > own, -torch.inf).softmax(-1), threshold) & (of <= own)
    home = (source == 0).unflatten(-1, (-1, block)).any(-1)[:, :, None]
    places = torch.where(valid, source, tokens)  # padding stands after everything, where no query sees it
    mask = causal_frames(at, places)
    lengths_k = valid.unflatten(-1, (-1, block)).sum(-1, dtype=torch.int32)
    lengths_q = _lengths(tokens, block, q.device)
    return BlockPlan.of(
        chosen | (of == own) | home,
        (block, block),
        slots,
        mask=mask,
        lengths=(lengths_q, lengths_k),
        permutation=Permutation(None, torch.where(valid, source, -1).to(torch.int32)),
    )


def paro_calibrate(
    maps: Tensor, grid: Sequence[int], *, density: float = 0.3, block: int = 64
) -> tuple[Tensor, Tensor]:
    """PARO's offline step (arXiv 2506.16054): each head's order of axes and blocks, from sampled attention maps.

    Each of the six orders of (F, H, W) is tried; the one whose block sums are least even (most of the weight in the
    fewest blocks) is the head's. *Surrogate*: the source weighs that against evenness inside a block; here the share of
    weight in the best `density` of blocks decides alone.

    Args:
        maps: attention probabilities [H, L, L], averaged over samples; L = F * H * W.

    Returns:
        (order: int64 [H], an index into `ORDERS`; visit: bool [H, NQ, NK]).
    """
    heads, tokens, _ = maps.shape
    size = -(-tokens // block) * block
    shares, visits = [], []
    for axes in ORDERS:
        source = _axis_order(grid, axes, maps.device)
        ordered = torch.nn.functional.pad(maps[:, source][:, :, source], (0, size - tokens, 0, size - tokens))
        sums = ordered.unflatten(1, (-1, block)).unflatten(3, (-1, block)).sum((2, 4))
        keep = max(1, round(density * sums.shape[-1]))
        best = sums.topk(keep, dim=-1)
        shares.append(best.values.sum((1, 2)) / sums.sum((1, 2)))
        visits.append(torch.zeros_like(sums, dtype=torch.bool).scatter_(-1, best.indices, True))
    order = torch.stack(shares).argmax(0)
    return order, torch.stack(visits)[order, torch.arange(heads, device=maps.device)]


def paro(order: Tensor, visit: Tensor, grid: Sequence[int], *, block: int = 64) -> BlockPlan:
    """PARO's static plan: per head an order of the (F, H, W) axes and the blocks that `paro_calibrate` found."""
    tokens = grid[0] * grid[1] * grid[2]
    sources = torch.stack([_axis_order(grid, axes, order.device) for axes in ORDERS])[order]
    missing = -tokens % block
    source = torch.nn.functional.pad(sources, (0, missing), value=-1)[None].to(torch.int32)
    lengths = _lengths(tokens, block, order.device)
    return BlockPlan.of(
        visit[None],
        (block, block),
        tokens + missing,
        lengths=(lengths, lengths),
        permutation=Permutation(source, source),
    )


def _axis_order(grid: Sequence[int], axes: Sequence[int], device: torch.device) -> Tensor:
    """The token at each slot when the grid is read with `axes`, slowest first."""
    count = grid[0] * grid[1] * grid[2]
    return torch.arange(count, device=device).view(*grid).permute(*axes).flatten()


def _lengths(tokens: int, block: int, device: torch.device) -> Tensor:
    """Tokens per block of an unbroken sequence, int32 [1, 1, blocks]."""
    start = torch.arange(0, tokens, block, device=device, dtype=torch.int32)
    return (tokens - start).clamp_max(block)[None, None]


def _clustered(labels: Tensor, clusters: int, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clusters in blocks of their own: (source [B, H, slots], lengths, cluster of each block, tokens per cluster).

    Every shape is fixed: a cluster may waste less than one block, so clusters + tokens / block blocks always suffice.
    """
    batch, heads, tokens = labels.shape
    blocks = clusters + tokens // block
    counts = torch.zeros((batch, heads, clusters), dtype=torch.int64, device=labels.device)
    counts.scatter_add_(2, labels, torch.ones_like(labels))
    needed = -(-counts // block)
    end = needed.cumsum(-1)
    first = end - needed
    number = torch.arange(blocks, device=labels.device).expand(batch, heads, -1).contiguous()
    cluster = torch.searchsorted(end, number, right=True)
    used = cluster < clusters
    cluster = cluster.clamp_max(clusters - 1)
    lengths = (counts.gather(2, cluster) - (number - first.gather(2, cluster)) * block).clamp(0, block)
    lengths = torch.where(used, lengths, 0)
    order = labels.argsort(dim=-1, stable=True)
    ordered = labels.gather(2, order)
    begun = (counts.cumsum(-1) - counts).gather(2, ordered)
    slot = first.gather(2, ordered) * block + torch.arange(tokens, device=labels.device) - begun
    source = torch.full((batch, heads, blocks * block), -1, dtype=torch.int32, device=labels.device)
    source.scatter_(2, slot, order.to(torch.int32))
    return source, lengths.to(torch.int32), cluster, counts
