"""Attention by name: `attention="window(3, 24, 24)"` in a model's config is the planner of its self-attention.

A name is a planner of `millstream.kernels.planners` with its arguments. Over a whole sequence every planner here
serves. Over a stream the queries are those of one chunk, and the keys lie in a ring, so a planner must follow keys that
stand in no order (windows, by the frame each key is of) or look at blocks of keys alone (PISA and its like); others are
refused. Shapes: B batch, L tokens, H heads, D channels of a head.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..kernels import BlockPlan, planners
from ..kernels.attention import BoxMask, window_mask
from ..kernels.attention.masks import UNBOUNDED
from ..streaming.kv_cache import KVChunk
from ..streaming.window import Window

Grid = tuple[int, int, int]
WHOLE = 2**30  # as far as an axis goes


def _svg2(q: Tensor, k: Tensor, **options: Any) -> BlockPlan:
    few: dict[str, Any] = {"num_q_clusters": min(300, q.shape[1]), "num_k_clusters": min(1000, k.shape[1])}
    return planners.svg2(q, k, **(few | options))[0]


# name: frames, rows and columns that a token sees, from a layer's number and the name's numbers
WINDOWS: dict[str, Callable[..., tuple[int, int, int]]] = {
    "window": lambda layer, frames, height, width: (frames, height, width),
    "spatial": lambda layer: (1, WHOLE, WHOLE),
    "temporal": lambda layer: (WHOLE, 1, 1),
    "interleaved": lambda layer: (WHOLE, 1, 1) if layer % 2 else (1, WHOLE, WHOLE),
}
# name: (q, k, v) -> plan, for queries and keys of any number
BLOCKS: dict[str, Callable[..., BlockPlan]] = {
    "pisa": planners.pisa,
    "svg_ear": planners.svg_ear,
    "moba": lambda q, k, v, is_causal=False, **options: planners.moba(q, k, is_causal=is_causal, **options),
    "sparge": lambda q, k, v, **options: planners.sparge(q, k, **options),
    "proxy": lambda q, k, v, groups=1, **options: planners.proxy(q, k, groups=groups, **options),
    "svg2": lambda q, k, v, **options: _svg2(q, k, **options),
}
# name: (q, k, v, grid) -> plan, for queries and keys of one whole sequence
SEQUENCES: dict[str, Callable[..., BlockPlan]] = {
    "sliding_tile": lambda q, k, v, grid, *size, tile=(6, 8, 8): planners.sliding_tile(
        grid, size, tile=[min(*pair) for pair in zip(tile, grid)], device=q.device
    ),
    "radial": lambda q, k, v, grid, **options: planners.radial(grid[0], grid[1] * grid[2], device=q.device, **options),
    "vmoba": lambda q, k, v, grid, **options: planners.vmoba(
        q, k, planners.tile_grid(grid, device=q.device), **options
    ),
    "biformer": lambda q, k, v, grid, **options: planners.biformer(
        q, k, planners.tile_grid(grid, device=q.device), **options
    ),
    "svg1": lambda q, k, v, grid, **options: planners.svg1(q, k, v, grid, **options),
}
NUMBERS = {"window": 3, "sliding_tile": 3}  # how many numbers a name takes without a keyword
OPTIONS = {
    "pisa": planners.pisa, "svg_ear": planners.svg_ear, "moba": planners.moba, "sparge": planners.sparge,
    "proxy": planners.proxy, "svg2": planners.svg2, "radial": planners.radial, "vmoba": planners.vmoba,
    "biformer": planners.biformer, "svg1": planners.svg1, "sliding_tile": planners.sliding_tile,
}  # fmt: skip
WITHHELD = {"window_size", "device", "generator", "start"}  # what a name cannot say


@dataclass(eq=False)
class NamedAttention:
    """A planner and its arguments, as a model's layers ask for plans. Plans of the grid alone are made once."""

    name: str
    numbers: tuple[int, ...]
    options: dict[str, Any]
    _made: dict[Any, BlockPlan] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> NamedAttention:
        """From `name` or `name(numbers, keyword=value)`; ValueError for what no planner takes, with what they do."""
        known = ", ".join([*WINDOWS, *BLOCKS, *SEQUENCES])
        try:
            call = ast.parse(text.strip(), mode="eval").body
            name = call.func if isinstance(call, ast.Call) else call
            given = (call.args, call.keywords) if isinstance(call, ast.Call) else ([], [])
            numbers = tuple(ast.literal_eval(argument) for argument in given[0])
            options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in given[1]}
        except (SyntaxError, ValueError):
            name, numbers, options = None, (), {}
        if not isinstance(name, ast.Name) or name.id not in {*WINDOWS, *BLOCKS, *SEQUENCES}:
            raise ValueError(
                f'attention must be like "window(3, 24, 24)" or "pisa(density=0.15)", one of {known}; got {text!r}'
            )
        wanted = NUMBERS.get(name.id, 0)
        if len(numbers) != wanted or not all(isinstance(n, int) and n > 0 for n in numbers):
            shape = "(frames, rows, columns), whole numbers above 0," if wanted else "no numbers without a keyword"
            raise ValueError(f"{name.id} takes {shape} got {text!r}")
        allowed = {} if name.id in WINDOWS else inspect.signature(OPTIONS[name.id]).parameters
        taken = [
            key for key, parameter in allowed.items()
            if parameter.default is not inspect.Parameter.empty and key not in WITHHELD
        ]  # fmt: skip
        if unknown := sorted(set(options) - set(taken)):
            raise ValueError(
                f"{name.id} takes {', '.join(taken) or 'no keywords'}, got {', '.join(unknown)} in {text!r}"
            )
        return cls(name.id, numbers, options)

    def whole(self, layer: int, grid: Grid, q: Tensor, k: Tensor, v: Tensor) -> BlockPlan:
        """For a sequence of which every token sees every other: q, k, v [B, L, H, D] of a grid of tokens."""
        if self.name in BLOCKS:
            return BLOCKS[self.name](q, k, v, **self.options)
        if self.name in WINDOWS:
            kernel = tuple(min(size, n) for size, n in zip(self._kernel(layer), grid))
            return self._once(
                ("whole", kernel, grid, q.device), partial(planners.window, grid, kernel, device=q.device)
            )
        make = partial(SEQUENCES[self.name], q, k, v, grid, *self.numbers, **self.options)
        return self._once(("whole", grid, q.device), make) if self.name in ("sliding_tile", "radial") else make()

    def causal(self, layer: int, grid: Grid, window: Window, device: torch.device) -> BlockPlan:
        """For a sequence under a stream's `window`: the truth that `streamed` is held to."""
        if self.name not in WINDOWS:
            raise ValueError(
                f"{self.name} chooses blocks for queries that see everything, so it can't follow a causal window; "
                f"use one of {', '.join(WINDOWS)}, or draw with a cache"
            )
        kernel = self._kernel(layer)

        def make() -> BlockPlan:
            frames = torch.arange(grid[0], device=device)
            ends = frames - frames % window.block + window.block - 1
            reach = min(kernel[0], window.frames - window.sinks)
            mask = _box(ends[None], frames[None], frames[None], grid, kernel, reach, window.sinks)
            return _plan(mask, grid[0] * grid[1] * grid[2], grid[0] * grid[1] * grid[2])

        return self._once(("causal", kernel, grid, window, device), make)

    def streamed(
        self, layer: int, grid: Grid, chunk: KVChunk, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None
    ) -> BlockPlan | None:
        """For a chunk's queries and the keys of its ring; None: dense, under the cache's own mask.

        Planners that rank blocks do so once the ring is full. Until then there is little to leave out.
        """
        if self.name in BLOCKS:
            return None if hidden is not None else BLOCKS[self.name](q, k, v, **self.options)
        if self.name not in WINDOWS:
            raise ValueError(
                f"{self.name} needs the queries of a whole sequence, and a stream has those of one chunk; use one of "
                f"{', '.join([*WINDOWS, *BLOCKS])}"
            )
        kernel = self._kernel(layer)
        if ("plan", kernel) not in chunk.memo:
            frames = chunk.slot_frames
            end = chunk.positions[:, -1:].expand(-1, grid[0])
            sinks = chunk.cache.window.sinks
            mask = _box(end, chunk.positions, frames, grid, kernel, kernel[0], sinks)
            chunk.memo["plan", kernel] = _plan(mask, q.shape[1], k.shape[1])
        return chunk.memo["plan", kernel]

    def _kernel(self, layer: int) -> tuple[int, int, int]:
        return WINDOWS[self.name](layer, *self.numbers)

    def _once(self, key: Any, make: Callable[[], BlockPlan]) -> BlockPlan:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _box(
    ends: Tensor, queries: Tensor, keys: Tensor, grid: Grid, kernel: tuple[int, int, int], reach: int, sinks: int
) -> BoxMask:
    """Queries of the frames `queries` [B, F], which see frames up to `ends` [B, F] and `reach` of them back, and around
    them a window of rows and columns; keys of the frames `keys` [B, S], -1 where there is none. Sinks are seen whole.
    """
    low, high, at = _beside(grid[1:], kernel[1:], keys.device)
    tokens = grid[1] * grid[2]

    def joined(time: Tensor, space: Tensor) -> Tensor:
        time = time.repeat_interleave(tokens, 1)[:, None, None].to(torch.int32)
        space = space.repeat(1, 1, 1, time.shape[-1] // tokens).expand(time.shape[0], -1, -1, -1)
        return torch.cat([time, space], 2)

    keys = torch.where(keys < 0, UNBOUNDED, keys)  # after every query
    return BoxMask(joined(ends - reach + 1, low), joined(ends, high), joined(keys, at), sinks if sinks else -UNBOUNDED)


@cache
def _beside(grid: tuple[int, int], kernel: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds of the window of each place of a frame, and the places, [1, 1, 2, places]; kept, since a recorded step
    may not fetch numbers from the host."""
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    near = window_mask(torch.stack(axes).flatten(1), grid, [min(*pair) for pair in zip(kernel, grid)])
    return near._axes()


def _plan(mask: BoxMask, queries: int, keys: int) -> BlockPlan:
    block = 128 if min(queries, keys) >= 1024 else 64
    return BlockPlan.of_mask(mask, queries, keys, (block, block))


class PlannedMixin:
    """The part of a model that runs its self-attention under a named planner."""

    _attention: NamedAttention | None = None

    def set_attention(self, attention: str | None) -> None:
        """Run self-attention under a planner, "window(3, 24, 24)", "pisa(density=0.15)"; None: attend to everything.

        Weights stay as they are: planners that were not trained with are approximations. Set it before streams begin,
        for a recorded step keeps what it was recorded with. ValueError: a planner or an argument that there is not.
        """
        self._attention = None if attention is None else NamedAttention.parse(attention)
        self.register_to_config(attention=attention)  # type: ignore[attr-defined]

    def planner(self, grid: Grid, window: Window | None, cache: KVChunk | None, mask: Tensor | BlockMask | None):
        """What makes a layer's plan from (layer, q, k, v, the cache's mask); None where attention has no planner."""
        named = self._attention
        if named is None:
            return None
        if window is None and mask is not None:
            raise ValueError("a mask alone says nothing of frames; give `window` too, or set_attention(None)")

        def plan(layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> BlockPlan | None:
            if cache is not None:
                return named.streamed(layer, grid, cache, q, k, v, hidden)
            if window is not None:
                return named.causal(layer, grid, window, q.device)
            return named.whole(layer, grid, q, k, v)

        return plan
