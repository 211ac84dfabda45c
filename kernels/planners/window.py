"""Windows on a grid: neighbourhood attention in its generalized form, sliding tiles, radial decay, streaming heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention import BlockPlan, causal_frames, window_mask
from .tiles import tile_grid


def window(
    grid: Sequence[int],
    kernel_size: Sequence[int],
    *,
    stride: Sequence[int] | int = 1,
    dilation: Sequence[int] | int = 1,
    is_causal: Sequence[bool] | bool = False,
    tile: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> BlockPlan:
    """Generalized neighborhood attention (arXiv 2504.16922; its parameter names) over a 1-, 2- or 3-D grid of tokens.

    Tokens are put into tiles; where stride, window and tile align, every visited block is full. FreeSwim's inward
    windows (arXiv 2511.14712) are this with kernel_size 2 d + 1.

    Args:
        grid: tokens per axis, last fastest, (frames, height, width) for video.
        kernel_size, stride, dilation, is_causal: per axis, or one value for all but the kernel.
        tile: tokens per tile and axis; None: what fills blocks of 128 best.

    Raises:
        ValueError: a window that does not fit the grid.
    """
    tiling = tile_grid(grid, tile, device=device)
    mask = window_mask(
        tiling.coordinates, grid, kernel_size, stride=stride, dilation=dilation, causal=is_causal
    )  # fmt: skip
    slots, block = tiling.source.shape[0], (tiling.block, tiling.block)
    plan = BlockPlan.of_mask(
        mask, slots, slots, block, lengths=tiling.plan_lengths, permutation=tiling.permutation
    )  # fmt: skip
    return plan.trimmed()


def sliding_tile(
    grid: Sequence[int],
    window_size: Sequence[Sequence[int]] | Sequence[int],
    *,
    tile: Sequence[int] = (6, 8, 8),
    device: torch.device | str = "cpu",
) -> BlockPlan:
    """Sliding tile attention (arXiv 2502.04507): windows counted in whole tiles, so that no block is masked.

    Args:
        grid: tokens per axis.
        window_size: tiles per axis that a tile sees, its centre clamped inwards at the borders; one window, or one per
            head.
        tile: tokens per tile and axis.
    """
    tiling = tile_grid(grid, tile, device=device)
    windows = torch.tensor(window_size, device=device)
    windows = windows[None] if windows.ndim == 1 else windows  # [heads or 1, axes]
    counts = torch.tensor(tiling.tiles, device=device)
    half = windows // 2
    if bool((windows < 1).any()):
        raise ValueError(f"window_size counts tiles, at least 1 per axis, got {window_size}")
    # Clamped so that a window at the border keeps its size, as far as the grid has that many tiles.
    low_centre, high_centre = torch.minimum(half, counts - 1), (counts - 1 - half).clamp_min(0)
    centre = (
        tiling.tile_of[None].maximum(low_centre[..., None]).minimum(torch.maximum(high_centre, low_centre)[..., None])
    )
    distance = (centre[..., None] - tiling.tile_of[None, :, None]).abs()  # [heads, axes, NQ, NK]
    visit = (distance <= half[..., None, None]).all(1)[None]
    return tiling.plan(visit).trimmed()


def radial(
    frames: int,
    tokens_per_frame: int,
    *,
    decay_factor: float = 1.0,
    block: int = 128,
    device: torch.device | str = "cpu",
) -> BlockPlan:
    """Radial attention (arXiv 2506.19852): the band |x - y| halves whenever the distance of frames doubles.

    Frames at distance d see tokens within max(tokens_per_frame / 2^g * decay_factor, 128), g the bit length of d. Where
    the band would be narrower than that, only every n-th frame is kept, n = ceil(128 / width). Frame 0 is a sink.
    *Surrogate*: blocks that touch the band are visited whole, and the rule for n is ours.
    """
    tokens = frames * tokens_per_frame
    start = torch.arange(0, tokens, block, device=device)
    last = (start + block).clamp_max(tokens) - 1
    visit = torch.zeros((start.shape[0],) * 2, dtype=torch.bool, device=device)
    for frame_q, low_q, high_q in _parts(start, last, tokens_per_frame):
        for frame_k, low_k, high_k in _parts(start, last, tokens_per_frame):
            distance = (frame_q[:, None] - frame_k).abs()
            group = torch.ceil(torch.log2(distance.double() + 1))  # the bit length
            width = tokens_per_frame / 2.0**group * decay_factor
            every = torch.ceil(128 / width).clamp_min(1)
            width = torch.where(distance == 0, float(tokens_per_frame), width.clamp_min(128))
            gap = torch.maximum(low_q[:, None] - high_k, low_k - high_q[:, None]).clamp_min(0)
            near = (gap <= width) & (distance % every == 0)
            exists = (low_q <= high_q)[:, None] & (low_k <= high_k)
            visit |= exists & (near | (frame_k == 0))
    return BlockPlan.of(visit[None, None], (block, block), tokens).trimmed()


def _parts(start: Tensor, last: Tensor, size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The frames that blocks reach into: (frame, first place in it, last place in it); low > high where none is."""
    most = int((last // size - start // size).max()) + 1
    parts = []
    for n in range(most):
        frame = start // size + n
        parts.append((frame, (start - frame * size).clamp_min(0), (last - frame * size).clamp_max(size - 1)))
    return parts


def duo(
    full_attention_heads: Tensor,
    tokens: int,
    *,
    sink_size: int = 64,
    recent_size: int = 256,
    block: int = 128,
) -> BlockPlan:
    """DuoAttention (arXiv 2410.10819), causal: some heads see everything, streaming heads a sink and the recent tokens.

    Args:
        full_attention_heads: bool [H], which heads are full (a learned gate above its threshold).
        sink_size, recent_size: tokens that a streaming head sees at the start and up to its own place.
    """
    device = full_attention_heads.device
    at = torch.arange(tokens, device=device, dtype=torch.int32)
    mask = causal_frames(at, at, window=recent_size, sinks=sink_size)
    low = torch.where(full_attention_heads[None, :, None, None], 0, mask.low)
    mask = type(mask)(low, mask.high.expand_as(low), mask.at, mask.sinks)
    return BlockPlan.of_mask(mask, tokens, tokens, (block, block)).trimmed()
