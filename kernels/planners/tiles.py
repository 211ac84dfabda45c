"""Tokens of a 1-, 2- or 3-D grid in tiles, so that a block of a plan is a box of the grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ..attention import BlockPlan, Permutation


@dataclass(frozen=True, eq=False)
class Tiling:
    """A grid of tokens (last axis fastest) cut into tiles; each tile is one block, padded to a multiple of 64 slots.

    Attributes:
        grid, tile, tiles: lengths per axis of the grid, of a tile, and of the grid of tiles.
        block: slots per tile.
        source: int32 [slots], the token in each slot, -1 for padding.
        lengths: int32 [blocks], tokens per tile.
        coordinates: int64 [axes, slots], where each slot stands; padding stands with the first token of its tile.
        tile_of: int64 [axes, blocks], where each tile stands on the grid of tiles.
    """

    grid: tuple[int, ...]
    tile: tuple[int, ...]
    tiles: tuple[int, ...]
    block: int
    source: Tensor
    lengths: Tensor
    coordinates: Tensor
    tile_of: Tensor

    @property
    def permutation(self) -> Permutation:
        source = self.source[None, None]
        return Permutation(source, source)

    @property
    def plan_lengths(self) -> tuple[Tensor, Tensor]:
        lengths = self.lengths[None, None]
        return lengths, lengths

    def plan(self, visit: Tensor) -> BlockPlan:
        """Which tiles see which: bool [B or 1, H or 1, tiles, tiles]."""
        return BlockPlan.of(
            visit,
            (self.block, self.block),
            self.source.shape[0],
            lengths=self.plan_lengths,
            permutation=self.permutation,
        )


def tile_grid(
    grid: Sequence[int], tile: Sequence[int] | None = None, *, device: torch.device | str = "cpu", slots: int = 128
) -> Tiling:
    """Cut `grid` into tiles of `tile`, or of the shape that fills blocks of `slots` best (`best_tile`).

    Raises ValueError for a tile that is larger than the grid on some axis, or of another number of axes.
    """
    grid = tuple(grid)
    tile = best_tile(grid, slots) if tile is None else tuple(tile)
    if len(tile) != len(grid) or any(not 1 <= t <= n for t, n in zip(tile, grid)):
        raise ValueError(f"a tile of a grid {grid} has one length per axis, each from 1 to the grid's, got {tile}")
    tiles = tuple(-(-n // t) for n, t in zip(grid, tile))
    block = -(-math.prod(tile) // 64) * 64
    tile_of = _places(tiles, device)  # [axes, blocks]
    inner = _places(tile, device)  # [axes, tokens per tile]
    sizes = torch.tensor(tile, device=device)[:, None]
    at = tile_of[:, :, None] * sizes[:, :, None] + inner[:, None]  # [axes, blocks, tokens per tile]
    inside = (at < torch.tensor(grid, device=device)[:, None, None]).all(0)
    # A tile at the border holds fewer tokens; they come first, in the tile's order, and padding last.
    order = inside.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    at, inside = at.gather(2, order.expand(len(grid), -1, -1)), inside.gather(1, order)
    at = torch.where(inside, at, at[:, :, :1])
    missing = block - math.prod(tile)
    at = torch.cat([at, at[:, :, :1].expand(-1, -1, missing)], 2)
    inside = torch.cat([inside, inside.new_zeros(inside.shape[0], missing)], 1)
    token = at[0]
    for axis in range(1, len(grid)):
        token = token * grid[axis] + at[axis]
    source = torch.where(inside, token, -1).flatten().to(torch.int32)
    return Tiling(grid, tile, tiles, block, source, inside.sum(1, dtype=torch.int32), at.flatten(1), tile_of)


def best_tile(grid: Sequence[int], slots: int = 128) -> tuple[int, ...]:
    """The tile of at most `slots` tokens that wastes little and is near to a cube: 8 % against twice as long a side."""

    def cost(tile: tuple[int, ...]) -> float:
        blocks = math.prod(-(-n // t) for n, t in zip(grid, tile))
        return blocks * slots / math.prod(grid) * (1 + 0.08 * math.log2(max(tile) / min(tile)))

    if math.prod(grid) <= slots:
        return tuple(grid)
    sizes = [range(1, min(n, slots) + 1) for n in grid]
    return min((tile for tile in product(*sizes) if slots // 2 < math.prod(tile) <= slots), key=cost)


def _places(shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Every index of an array of this shape, [axes, items], last axis fastest."""
    axes = [torch.arange(n, device=device) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
