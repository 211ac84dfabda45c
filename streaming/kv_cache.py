"""Fixed memory for attention: sink frames and a ring of recent frames, per layer and row.

The arena is allocated once. Slots hold one frame of keys each: the first `sinks` slots keep the first frames for good,
the others are a ring in which every new frame overwrites the one that just left the window. Softmax does not care about
the order of keys, so the ring is attended as it lies: nothing is rolled, concatenated or moved, and nothing on the host
waits for the device. Row counters live twice, on the device for the index arithmetic and on the host for the shapes.

*Cached equals recomputed* means: equal to ONE forward over the whole history under the mask `Window.visible`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..kernels.float8 import FLOAT8
from .kv_chunk import KVChunk, KVView, Rows
from .kv_storage import EightBits, Float8, FullPrecision, Storage
from .window import Window

__all__ = ["EightBits", "Float8", "FullPrecision", "KVCache", "KVChunk", "KVView", "Rows", "Storage", "Window"]


class KVCache:
    """Keys and values of every layer and row.

    Args:
        layers, rows, heads, head_dim, tokens_per_frame, window: the shape of the arena.
        position: `"absolute"` leaves keys rotated to their frame; `"sink"` turns the sink keys, once per chunk, to
            stand just before the window, so that distances never grow past it (equal to cache-relative schemes).
        spare: extra frames of ring, so that as many committed frames can be rolled back exactly.
        storage: how keys and values are kept and attended to.
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
        storage: Storage | None = None,
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
        self.device, self.dtype = torch.device(device), dtype
        shape = (layers, rows, (window.sinks + self.ring) * tokens_per_frame, heads, head_dim)
        self.k, self.v = (way.allocate(shape, self.device, dtype) for way in (self.storage, self.storage.values))
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
        chunk = self._chunk(Rows(rows, self.device), num_frames)
        chunk.turn_sinks()
        return chunk

    def _chunk(self, rows: Rows, num_frames: int) -> KVChunk:
        return KVChunk(self, rows, num_frames)

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
        stores = {name: (getattr(self, name)[:, row], saved[name]) for name in ("k", "v", "sink_k")}
        for name, (store, value) in stores.items():  # all of them before any is taken
            if not isinstance(value, Tensor) or value.shape != store.shape:
                seen = tuple(getattr(value, "shape", ()))
                raise ValueError(f"the saved {name} has shape {seen}, this cache needs {tuple(store.shape)}")
            if (value.dtype == FLOAT8) != (store.dtype == FLOAT8):
                raise ValueError(
                    f"the saved {name} is kept in {value.dtype}, in this cache it is in {store.dtype}, as presets that "
                    "attend in FP8 keep it where the GPU can; open it under a preset that differs in that alone"
                )
        for store, value in stores.values():
            store.copy_(value)  # pyright: ignore[reportArgumentType]
        self.counts[row] = int(saved["count"])
        self.reached[row] = int(saved.get("reached", saved["count"]))
        self.frames[row] = self.counts[row]
