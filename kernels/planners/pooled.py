"""Planners that choose key blocks by scores between pooled queries and keys."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..attention import BlockPlan, RowMask, causal_frames
from .scores import block_means, block_scores, top_k, top_share
from .tiles import Tiling


def moba(
    q: Tensor,
    k: Tensor,
    *,
    moba_chunk_size: int = 128,
    moba_topk: int = 3,
    gate: Literal["token", "pooled"] = "token",
    is_causal: bool = True,
) -> BlockPlan:
    """MoBA (arXiv 2502.13189): each query attends to the chunks with the highest q . mean k, its own always.

    Args:
        moba_chunk_size: keys per chunk, which is the plan's block.
        moba_topk: chunks per query, its own included.
        gate: "token" gates each query (row bits in the plan); "pooled" gates the mean query of each block, an
            *approximation* that needs no masks and is cheaper to make.
    """
    if moba_topk < 1:
        raise ValueError(f"moba_topk counts a query's own chunk, so it is at least 1, got {moba_topk}")
    block = moba_chunk_size
    keys = block_means(k, block)
    if gate == "token":
        scores = q.transpose(1, 2).to(keys.dtype) @ keys.mT  # [B, H, L, NK]
        own = torch.arange(q.shape[1], device=q.device) // block
    else:
        scores = block_means(q, block) @ keys.mT
        own = torch.arange(scores.shape[2], device=q.device)
    chunk = torch.arange(keys.shape[2], device=q.device)
    scores = scores.masked_fill(chunk == own[:, None], torch.inf)
    if is_causal:
        scores = scores.masked_fill(chunk > own[:, None], -torch.inf)
    chosen = top_k(scores, moba_topk) & (scores > -torch.inf)
    at = torch.arange(q.shape[1], device=q.device)
    causal = causal_frames(at, at) if is_causal else None
    if gate == "pooled":
        return BlockPlan.of(chosen, (block, block), k.shape[1], mask=causal)
    return BlockPlan.of_mask(RowMask.of(chosen, causal), q.shape[1], k.shape[1], (block, block))


def vmoba(q: Tensor, k: Tensor, tiling: Tiling, *, simsum_threshold: float = 0.25) -> BlockPlan:
    """VMoBA (arXiv 2506.23858) over one layer's partition of the video, a `Tiling` into 1-D, 2-D or 3-D chunks.

    Layers take the three kinds of partition in turn: `tile_grid(grid, (t, H, W))`, `(T, h, w)`, `(t, h, w)`. Scores are
    min-max normalised per head; pairs are taken from the highest on, over the WHOLE head, until they hold
    `simsum_threshold` of the sum. A query's own chunk is always seen. *Approximation*: pairs are of (chunk of queries,
    chunk of keys), gated by the mean query, where the source gates each query.
    """
    q_slots, k_slots = (_in_order(x, tiling) for x in (q, k))
    scores = _tile_means(q_slots, tiling) @ _tile_means(k_slots, tiling).mT
    low, high = scores.amin((2, 3), keepdim=True), scores.amax((2, 3), keepdim=True)
    scores = (scores - low) / (high - low).clamp_min(1e-12)
    chosen = top_share(scores.flatten(2), simsum_threshold).view_as(scores)
    chosen = chosen | torch.eye(scores.shape[-1], dtype=torch.bool, device=q.device)
    return tiling.plan(chosen)


def biformer(q: Tensor, k: Tensor, tiling: Tiling, *, topk: int = 4) -> BlockPlan:
    """BiFormer's bi-level routing (arXiv 2303.08810): region means route each region to its `topk` regions.

    The tiles are the regions, 7 x 7 of them in the source: `tile_grid((H, W), (ceil(H / 7), ceil(W / 7)))`.
    """
    queries, keys = (_tile_means(_in_order(x, tiling), tiling) for x in (q, k))
    return tiling.plan(top_k(queries @ keys.mT, topk))


def sparge(
    q: Tensor, k: Tensor, *, cdfthreshd: float = 0.9, simthreshd1: float = 0.3, block: tuple[int, int] = (128, 64)
) -> BlockPlan:
    """SpargeAttn (arXiv 2502.18137): blocks that are alike inside are judged by their means, the others are kept.

    Args:
        cdfthreshd: of each row's softmax over block means, the largest are kept until they hold this share.
        simthreshd1: blocks whose mean cosine between tokens is below this are always visited. *Surrogate*: that mean is
            taken with every token against the block's mean direction, which is its square root's estimate.
        block: (query, key) block sizes; the source's own are 128 and 64.
    """
    alike_q, alike_k = (_likeness(x, size) > simthreshd1 for x, size in ((q, block[0]), (k, block[1])))
    weights = block_scores(q, k, block).masked_fill(~alike_k[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    chosen = top_share(weights, cdfthreshd) | ~alike_k[:, :, None] | ~alike_q[..., None]
    return BlockPlan.of(chosen, block, k.shape[1])


def seer(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    threshold: float = 2e-3,
    topk: int | None = None,
    block: int = 64,
    rotate=None,
) -> BlockPlan:
    """SeerAttention (arXiv 2410.13276): a learned gate over pooled queries (mean) and keys (max, min, mean).

    Args:
        q_weight: [H, D, G] and k_weight: [H, 3 D, G], the gate's linear layers, on q and k before rotation.
        threshold: a block is visited where the gate's softmax exceeds it (the source's range is 5e-4 to 5e-3).
        topk: instead of the threshold, so many blocks per row.
        rotate: applied to the gate's queries and keys [B, blocks, H, G]; the source rotates them as positions 0,
            `block`, ... are rotated.
    """
    pooled_q = block_means(q, block)
    tiles = _filled(k, block)
    pooled_k = torch.cat([tiles.amax(2), tiles.amin(2), tiles.mean(2)], -1).transpose(1, 2).to(pooled_q.dtype)
    gate_q, gate_k = pooled_q @ q_weight.to(pooled_q.dtype), pooled_k @ k_weight.to(pooled_q.dtype)
    if rotate is not None:
        gate_q, gate_k = (rotate(x.transpose(1, 2)).transpose(1, 2) for x in (gate_q, gate_k))
    weights = (gate_q @ gate_k.mT * gate_q.shape[-1] ** -0.5).softmax(-1)
    chosen = weights > threshold if topk is None else top_k(weights, topk)
    return BlockPlan.of(chosen | top_k(weights, 1), (block, block), k.shape[1])


def proxy(q: Tensor, k: Tensor, *, groups: int = 4, gamma: float = 0.9, block: int = 128) -> BlockPlan:
    """ProxyAttn (arXiv 2509.24745): heads of a group share one ranking of blocks, each head has its own budget.

    *Surrogate*: the proxy is the mean of the group's pooled queries and keys, and a head's budget is how many of its
    own pooled weights hold the share `gamma`.
    """
    heads = q.shape[2]
    if heads % groups:
        raise ValueError(f"{heads} heads make no {groups} equal groups; choose a divisor of the number of heads")
    queries, keys = (block_means(x, block) for x in (q, k))
    scale = q.shape[-1] ** -0.5
    shared = [x.unflatten(1, (groups, heads // groups)).mean(2) for x in (queries, keys)]
    ranking = (shared[0] @ shared[1].mT).argsort(dim=-1, descending=True).argsort(dim=-1)
    budget = top_share((queries @ keys.mT * scale).softmax(-1), gamma).sum(-1, keepdim=True)
    return BlockPlan.of(ranking.repeat_interleave(heads // groups, 1) < budget, (block, block), k.shape[1])


def _in_order(x: Tensor, tiling: Tiling) -> Tensor:
    """Tokens [B, L, H, D] by tiles [B, tiles, block, H, D]; zeros where a tile is not full."""
    taken = x.index_select(1, tiling.source.clamp_min(0).long())
    taken = taken.masked_fill((tiling.source < 0)[None, :, None, None], 0.0)
    return taken.unflatten(1, (-1, tiling.block))


def _tile_means(tiles: Tensor, tiling: Tiling) -> Tensor:
    """[B, H, tiles, D], float32."""
    return (tiles.sum(2, dtype=torch.float32) / tiling.lengths[:, None, None]).transpose(1, 2)


def _filled(x: Tensor, block: int) -> Tensor:
    """[B, L, H, D] as [B, blocks, block, H, D], the last token repeated."""
    missing = -x.shape[1] % block
    if missing:
        x = torch.cat([x, x[:, -1:].expand(-1, missing, -1, -1)], 1)
    return x.unflatten(1, (-1, block))


def _likeness(x: Tensor, block: int) -> Tensor:
    """How alike the tokens of each block are, [B, H, blocks]: the squared length of their mean direction."""
    directions = torch.nn.functional.normalize(x.float(), dim=-1)
    return block_means(directions, block).square().sum(-1)
