"""The KV cache of a model some of whose layers are linear: those remember by a state of fixed size instead of keys.

States lie in a ring like keys do: slot c holds the state after c chunks. A pass over chunk c reads slot c and writes
slot c + 1, again and again while the chunk is drawn; committing moves a counter and copies nothing, rolling back moves
it the other way. All of it is indexed by device counters, so that a recorded step serves every chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..kernels.linear_attention import LinearState, Normalize
from .kv_cache import KVCache
from .kv_chunk import KVChunk, Rows


class HybridCache(KVCache):
    """`KVCache` for a stack of layers of which some are linear.

    Args:
        layers: all layers of the model.
        linear: which of them are linear, and the `normalize` that each gives to `linear_attend`.
        others: as for `KVCache`. `window` bounds what the remaining layers see; linear layers remember without end.
            `spare` frames can be rolled back as far as they are whole chunks.
    """

    def __init__(self, *, layers: int, linear: Mapping[int, Normalize], **others: Any) -> None:
        if not linear or not set(linear) <= set(range(layers)):
            raise ValueError(f"linear must name some of the layers 0 to {layers - 1}, got {sorted(linear)}")
        super().__init__(layers=layers - len(linear), **others)
        rows, heads, dim = others["rows"], others["heads"], others["head_dim"]
        softmax = [layer for layer in range(layers) if layer not in linear]
        self.place = {layer: place for kind in (softmax, sorted(linear)) for place, layer in enumerate(kind)}
        self.linear = dict(linear)
        self.slots = -(-self.spare // self.window.block) + 2  # the state that is read, the one written, and the spare
        shape = (len(linear), rows, self.slots, heads, dim)
        self.linear_kv = torch.zeros((*shape, dim), device=self.device)
        self.linear_norm = torch.zeros(shape, device=self.device)
        self.chunks = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.ends: list[list[int]] = [[0] for _ in range(rows)]  # frames behind each state that is still held
        for row in range(rows):
            self._begin(row)

    @property
    def bytes(self) -> int:
        """Memory the arena holds, whatever the streams do."""
        return super().bytes + sum(x.numel() * x.element_size() for x in (self.linear_kv, self.linear_norm))

    def _chunk(self, rows: Rows, num_frames: int) -> HybridChunk:
        return HybridChunk(self, rows, num_frames)

    def rollback(self, row: int, num_frames: int) -> None:
        """Forget the last `num_frames` committed frames of `row`. Linear layers can only return to where a chunk ended.

        Raises:
            ValueError: more than `spare` frames, or a part of a chunk.
        """
        held, target = self.ends[row], self.counts[row] - num_frames
        if 0 <= num_frames <= min(self.spare, self.counts[row]) and target not in held:
            raise ValueError(
                f"cannot roll back {num_frames} frames: linear layers remember whole chunks, and row {row} can return "
                f"to frames {held[:-1]}, not to {target}"
            )
        super().rollback(row, num_frames)
        back = len(held) - 1 - held.index(target)
        del held[len(held) - back :]
        self.chunks[row] -= back

    def reset(self, row: int) -> None:
        super().reset(row)
        self._begin(row)

    def _begin(self, row: int) -> None:
        self.chunks[row] = 0
        self.ends[row] = [0]
        self.linear_kv[:, row] = 0.0
        for layer, normalize in self.linear.items():
            self.linear_norm[self.place[layer], row] = -torch.inf if normalize == "channel" else 0.0

    def snapshot(self, row: int) -> dict[str, Tensor | int]:
        """A copy of one row, with the slots as they lie."""
        return {
            **super().snapshot(row),
            "linear_kv": self.linear_kv[:, row].clone(),
            "linear_norm": self.linear_norm[:, row].clone(),
            "chunks": self.chunks[row].clone(),
            "ends": torch.tensor(self.ends[row]),
        }

    def restore(self, row: int, saved: Mapping[str, Tensor | int | float | str]) -> None:
        """Put a snapshot into `row`, of this cache or of another of the same shape."""
        places = {
            "linear_kv": self.linear_kv[:, row],
            "linear_norm": self.linear_norm[:, row],
            "chunks": self.chunks[row],
        }
        for name, store in places.items():
            value = saved.get(name)
            if not isinstance(value, Tensor) or value.shape != store.shape:
                seen = tuple(value.shape) if isinstance(value, Tensor) else value
                raise ValueError(f"the saved {name} is {seen}, this cache needs shape {tuple(store.shape)}")
        ends, count = saved.get("ends"), int(saved["count"])
        held = ends.tolist() if isinstance(ends, Tensor) and ends.ndim == 1 else []
        if not 1 <= len(held) < self.slots or held != sorted(set(held)) or held[0] < 0 or held[-1] != count:
            raise ValueError(f"the snapshot is damaged: states after {held} frames, {count} frames in memory")
        super().restore(row, saved)
        for name, store in places.items():
            value = saved[name]
            assert isinstance(value, Tensor), "as was checked"
            store.copy_(value)
        self.ends[row] = [int(end) for end in held]


class HybridChunk(KVChunk):
    """A chunk whose linear layers read the state before it, and write the state after it."""

    cache: HybridCache

    def __init__(self, cache: HybridCache, rows: Rows, num_frames: int, recorded: str | None = None) -> None:
        super().__init__(cache, rows, num_frames, recorded)

    def for_recording(self, index: Tensor | None = None) -> HybridChunk:
        chunk = super().for_recording(index)
        return HybridChunk(self.cache, chunk.rows, chunk.num_frames, chunk.recorded)

    def _place(self, layer: int) -> int:
        return self.cache.place[layer]

    @cached_property
    def _before(self) -> Tensor:
        """int64 [B], the slot of the state before this chunk."""
        return self.cache.chunks.index_select(0, self.rows.index) % self.cache.slots

    def state(self, layer: int) -> LinearState:
        """What linear layer `layer` remembers of everything before this chunk, float32."""
        place, at = self.cache.place[layer], (self.rows.index, self._before)
        return LinearState(self.cache.linear_kv[place][at], self.cache.linear_norm[place][at])

    def keep(self, layer: int, state: LinearState) -> None:
        """The state after this chunk, as this pass sees it; a later pass overwrites it until the chunk is committed."""
        place, at = self.cache.place[layer], (self.rows.index, (self._before + 1) % self.cache.slots)
        self.cache.linear_kv[place][at], self.cache.linear_norm[place][at] = state.kv, state.norm

    def advance(self) -> None:
        super().advance()
        self.cache.chunks.index_add_(0, self.rows.index, torch.ones_like(self.rows.index))

    def count(self) -> None:
        super().count()
        for row in self.rows.host:
            held = self.cache.ends[row]
            held.append(self.cache.counts[row])
            del held[: max(len(held) - (self.cache.slots - 1), 0)]
