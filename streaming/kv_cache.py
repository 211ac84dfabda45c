"""Fixed memory for attention: sink frames and a ring of recent frames, per layer and row.

The arena is allocated once. Slots hold one frame of keys each: the first `sinks` slots keep the first frames for good,
the others are a ring in which every new frame overwrites the one that just left the window. Softmax does not care about
the order of keys, so the ring is attended as it lies: nothing is rolled, concatenated or moved, and nothing on the host
waits for the device. Row counters live twice, on the device for the index arithmetic and on the host for the shapes.

*Cached equals recomputed* means: equal to ONE forward over the whole history under the mask `Window.visible`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from ..kernels import shift_frames


@dataclass(frozen=True, slots=True)
class Window:
    """Who sees whom: the one rule behind the training mask and behind the cache.

    Frames come in blocks of `block`, which see each other whole. A block sees the blocks before it as far as `frames`
    frames reach, counted with the block itself and with the first `sinks` frames of the stream, which stay for ever.
    """

    frames: int
    sinks: int = 0
    block: int = 1

    def __post_init__(self) -> None:
        if self.block < 1 or self.sinks < 0 or self.frames < self.sinks + self.block:
            raise ValueError(
                f"a window needs block >= 1, sinks >= 0 and frames >= sinks + block; got frames={self.frames}, "
                f"sinks={self.sinks}, block={self.block}"
            )

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Bool, broadcast from integer frame indices `query` and `key`: may that query frame see that key frame?"""
        block_end = query - query % self.block + self.block - 1
        recent = key > block_end - (self.frames - self.sinks)
        return (key <= block_end) & (recent | (key < self.sinks))

    def mask(self, num_frames: int, tokens_per_frame: int, device: torch.device | str | None = None) -> Tensor:
        """Bool [L, L] for a whole sequence of `num_frames * tokens_per_frame` tokens."""
        frame = torch.arange(num_frames, device=device).repeat_interleave(tokens_per_frame)
        return self.visible(frame[:, None], frame[None, :])

    def block_mask(self, num_frames: int, tokens_per_frame: int, device: torch.device) -> BlockMask:
        """The same mask for FlexAttention, which skips what it hides."""
        length = num_frames * tokens_per_frame

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return self.visible(query // tokens_per_frame, key // tokens_per_frame)

        return create_block_mask(visible, None, None, length, length, device=device)


class FullPrecision:
    """Storage policy: keys and values as the model computes them.

    A quantised policy keeps the same three methods: `allocate` returns whatever tensors it needs (values and scales).
    """

    def allocate(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    def write(self, store: Tensor, layer: int, rows: Tensor, slots: Tensor, value: Tensor) -> None:
        """`value` [B, n, H, D] into token slots [B, n] of `rows` [B, 1]."""
        store[layer][rows, slots] = value.to(store.dtype)

    def read(self, store: Tensor, layer: int, rows: Rows, length: int) -> Tensor:
        """[B, length, H, D]; a view where the rows are neighbours."""
        return rows.take(store[layer])[:, :length]


class Rows:
    """Which rows of an arena take part: a slice where they are neighbours (no copy), an index where they are not."""

    def __init__(self, rows: Sequence[int], device: torch.device) -> None:
        self.host = list(rows)
        first = self.host[0]
        self.neighbours = self.host == list(range(first, first + len(self.host)))
        self.index = torch.tensor(self.host, device=device)

    def take(self, arena: Tensor, dim: int = 0) -> Tensor:
        if self.neighbours:
            return arena.narrow(dim, self.host[0], len(self.host))
        return arena.index_select(dim, self.index)


class KVView(NamedTuple):
    """What one layer attends to: `k`, `v` [B, K, H, D]; `mask` bool [B, 1, 1, K], or None where all are visible."""

    k: Tensor
    v: Tensor
    mask: Tensor | None


class KVCache:
    """Keys and values of every layer and row.

    Args:
        layers, rows, heads, head_dim, tokens_per_frame, window: the shape of the arena.
        position: `"absolute"` leaves keys rotated to their frame; `"sink"` turns the sink keys, once per chunk, to
            stand just before the window, so that distances never grow past it (equal to cache-relative schemes).
        spare: extra frames of ring, so that as many committed frames can be rolled back exactly.
        storage: how keys and values are kept.
    """

    def __init__(
        self,
        *,
        layers: int,
        rows: int,
        heads: int,
        head_dim: int,
        tokens_per_frame: int,
        window: Window,
        position: Literal["absolute", "sink"] = "absolute",
        spare: int = 0,
        storage: FullPrecision | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if spare < 0:
            raise ValueError(f"spare must be 0 or more frames, got {spare}")
        if position not in ("absolute", "sink"):
            raise ValueError(f"position must be 'absolute' or 'sink', got {position!r}")
        self.window = window
        self.position = position
        self.spare = spare
        self.tokens_per_frame = tokens_per_frame
        self.ring = window.frames - window.sinks + spare
        self.storage = storage or FullPrecision()
        self.device = torch.device(device)
        self.k, self.v = (
            self.storage.allocate(
                (layers, rows, (window.sinks + self.ring) * tokens_per_frame, heads, head_dim), self.device, dtype
            )
            for _ in range(2)
        )
        sink_tokens = window.sinks * tokens_per_frame if position == "sink" else 0
        self.sink_k = torch.zeros((layers, rows, sink_tokens, heads, head_dim), device=self.device, dtype=dtype)
        self.counts = [0] * rows
        self.reached = [0] * rows  # the end of the furthest chunk ever opened: what lies a ring before it is gone
        self.frames = torch.zeros(rows, dtype=torch.int64, device=self.device)

    @property
    def rows(self) -> int:
        return len(self.counts)

    @property
    def bytes(self) -> int:
        """Memory the arena holds, whatever the streams do."""
        return sum(store.numel() * store.element_size() for store in (self.k, self.v, self.sink_k))

    def open(self, rows: Sequence[int], num_frames: int | None = None) -> KVChunk:
        """Start the next chunk of `rows`, dropping one that was not committed.

        Its `num_frames` frames (one block by default) see each other and the window. ValueError refuses more than the
        window holds, and a chunk whose window was overwritten by a larger one that was dropped.
        """
        num_frames = self.window.block if num_frames is None else num_frames
        if not 1 <= num_frames <= self.window.frames - self.window.sinks:
            raise ValueError(f"a chunk of {num_frames} frames does not fit a window of {self.window}")
        for row in rows:
            self._require(row, self.counts[row] + num_frames)
            self.reached[row] = max(self.reached[row], self.counts[row] + num_frames)
        return KVChunk(self, Rows(rows, self.device), num_frames)

    def rollback(self, row: int, num_frames: int) -> None:
        """Forget the last `num_frames` (up to `spare`) committed frames of `row`, exactly as if they had never been."""
        if not 0 <= num_frames <= min(self.spare, self.counts[row]):
            raise ValueError(
                f"cannot roll back {num_frames} frames: {self.counts[row]} are committed and the cache was made with "
                f"spare={self.spare}"
            )
        self._require(row, self.counts[row] - num_frames + self.window.block)
        self.counts[row] -= num_frames
        self.frames[row] -= num_frames

    def _require(self, row: int, end: int) -> None:
        """The window that ends at frame `end` of `row` still lies in the ring."""
        overwriting = self.reached[row] > self.window.sinks + self.ring
        if overwriting and end + self.spare < self.reached[row]:
            raise ValueError(
                f"row {row} was drawn up to frame {self.reached[row]}: the window that ends at frame {end} is gone; "
                f"make the cache with spare={self.reached[row] - end} or more"
            )

    def reset(self, row: int) -> None:
        self.counts[row] = self.reached[row] = 0
        self.frames[row] = 0

    def snapshot(self, row: int) -> dict[str, Tensor | int]:
        """A copy of one row, with the slots as they lie."""
        return {
            "k": self.k[:, row].clone(),
            "v": self.v[:, row].clone(),
            "sink_k": self.sink_k[:, row].clone(),
            "count": self.counts[row],
            "reached": self.reached[row],
        }

    def restore(self, row: int, saved: Mapping[str, Tensor | int | float | str]) -> None:
        """Put a snapshot into `row`, of this cache or of another of the same shape."""
        for name in ("k", "v", "sink_k"):
            store, value = getattr(self, name)[:, row], saved[name]
            if not isinstance(value, Tensor) or value.shape != store.shape:
                seen = tuple(getattr(value, "shape", ()))
                raise ValueError(f"the saved {name} has shape {seen}, this cache needs {tuple(store.shape)}")
            store.copy_(value)
        self.counts[row] = int(saved["count"])
        self.reached[row] = int(saved.get("reached", saved["count"]))
        self.frames[row] = self.counts[row]


class KVChunk:
    """The chunk being drawn: a scratch place in the ring that every pass overwrites until `commit` makes it context.

    Attributes:
        positions: int64 [B, num_frames], the index of each frame in its stream.
    """

    def __init__(self, cache: KVCache, rows: Rows, num_frames: int) -> None:
        self.cache, self.rows, self.num_frames = cache, rows, num_frames
        window, tokens = cache.window, cache.tokens_per_frame
        self.positions = rows.take(cache.frames)[:, None] + torch.arange(num_frames, device=cache.device)
        slots = torch.where(
            self.positions < window.sinks, self.positions, window.sinks + (self.positions - window.sinks) % cache.ring
        )
        self._slots = _tokens(slots, tokens)
        ends = [cache.counts[row] + num_frames for row in rows.host]
        capacity = window.sinks + cache.ring
        self._length = min(max(ends), capacity) * tokens
        same_fill = len(set(ends)) == 1 or min(ends) >= capacity
        hides_none = cache.spare == 0 or max(ends) <= window.frames
        self._mask = None if same_fill and hides_none else self._visible_slots()
        if cache.position == "sink" and max(ends) + cache.spare > window.frames:
            self._turn_sinks()

    def _visible_slots(self) -> Tensor:
        """Bool [B, 1, 1, K]: which slots hold a frame that this chunk may see."""
        window, ring = self.cache.window, self.cache.ring
        end = self.positions[:, -1:]
        slot = torch.arange(self._length // self.cache.tokens_per_frame, device=self.cache.device)[None]
        newest = end - (end - slot) % ring  # a ring slot holds the newest frame that is equal to it modulo the ring
        frame = torch.where(slot < window.sinks, slot, newest)
        recent = frame > end - (window.frames - window.sinks)
        visible = (frame <= end) & (recent | (slot < window.sinks)) & (frame >= slot.clamp_max(window.sinks))
        return visible.repeat_interleave(self.cache.tokens_per_frame, dim=1)[:, None, None]

    def _turn_sinks(self) -> None:
        """Sinks move by as much as the window has moved past them: sink i then stands at window start - sinks + i."""
        cache = self.cache
        delta = (self.positions[:, -1] + 1 - cache.window.frames).clamp_min(0)
        slots = torch.arange(cache.sink_k.shape[2], device=cache.device)[None]
        for layer, sink_k in enumerate(cache.sink_k):
            turned = shift_frames(self.rows.take(sink_k), delta)
            cache.storage.write(cache.k, layer, self.rows.index[:, None], slots, turned)

    def attend_view(self, layer: int, k: Tensor, v: Tensor) -> KVView:
        """Context plus this chunk's `k` (rotated to `positions`) and `v`, [B, num_frames * tokens_per_frame, H, D]."""
        cache, storage = self.cache, self.cache.storage
        rows = self.rows.index[:, None]
        storage.write(cache.k, layer, rows, self._slots, k)
        storage.write(cache.v, layer, rows, self._slots, v)
        if cache.position == "sink":
            self._keep_sinks(layer, k)
        return KVView(
            storage.read(cache.k, layer, self.rows, self._length),
            storage.read(cache.v, layer, self.rows, self._length),
            self._mask,
        )

    def _keep_sinks(self, layer: int, k: Tensor) -> None:
        """Sink keys are kept as they were first rotated, so that turning them never adds up rounding."""
        tokens = self.cache.tokens_per_frame
        for item, row in enumerate(self.rows.host):
            first = self.cache.counts[row]
            kept = (min(first + self.num_frames, self.cache.window.sinks) - first) * tokens
            if kept > 0:
                self.cache.sink_k[layer, row, first * tokens : first * tokens + kept] = k[item, :kept]

    def commit(self) -> None:
        """What the last pass wrote becomes context; the ring head advances."""
        for row in self.rows.host:
            self.cache.counts[row] += self.num_frames
        self.cache.frames.index_add_(0, self.rows.index, torch.full_like(self.rows.index, self.num_frames))


def _tokens(slots: Tensor, tokens_per_frame: int) -> Tensor:
    """Frame slots [B, n] as token slots [B, n * tokens_per_frame]."""
    return (slots[..., None] * tokens_per_frame + torch.arange(tokens_per_frame, device=slots.device)).flatten(1)
