"""The frames being drawn, seen by a model: where their keys go and what their queries attend to."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from ..kernels import BlockPlan, attend, shift_frames
from ..kernels.planners import FlashBlock

if TYPE_CHECKING:
    from .kv_cache import KVCache


class Rows:
    """Which rows of an arena take part: a slice where they are neighbours (no copy), an index where they are not."""

    def __init__(self, rows: Sequence[int], device: torch.device) -> None:
        self.host, self.device = list(rows), device
        first = self.host[0]
        self.neighbours = self.host == list(range(first, first + len(self.host)))

    @cached_property
    def index(self) -> Tensor:
        """int64 [B]."""
        if self.neighbours:  # made on the device, which a recording can do again
            return torch.arange(self.host[0], self.host[0] + len(self.host), device=self.device)
        return torch.tensor(self.host, device=self.device)

    def take(self, arena: Tensor, dim: int = 0) -> Tensor:
        if self.neighbours:
            return arena.narrow(dim, self.host[0], len(self.host))
        return arena.index_select(dim, self.index)


class RowsAt(Rows):
    """Rows that a device tensor `index` [B] names; the host does not know which, so a recording serves them all."""

    def __init__(self, index: Tensor) -> None:
        self.neighbours = False
        self.index = index


class Places:
    """Token slots [B, n] of the arena's rows `rows` [B, 1]."""

    def __init__(self, rows: Tensor, slots: Tensor) -> None:
        self.rows, self.slots = rows, slots

    def put(self, arena: Tensor, value: Tensor) -> None:
        """`value` [B, n, H, D] into `arena` [rows, slots, H, D]."""
        arena[self.rows, self.slots] = value


class Slices(Places):
    """The same where the host knows that each row's slots are neighbours: plain copies, which a CPU is fastest at."""

    def __init__(self, rows: Rows, starts: Sequence[int], count: int) -> None:
        if rows.neighbours and len(set(starts)) == 1:
            first = rows.host[0]
            self.parts = [(slice(first, first + len(starts)), slice(0, None), slice(starts[0], starts[0] + count))]
        else:
            self.parts = [
                (slice(row, row + 1), slice(item, item + 1), slice(start, start + count))
                for item, (row, start) in enumerate(zip(rows.host, starts))
            ]

    def put(self, arena: Tensor, value: Tensor) -> None:
        for rows, items, slots in self.parts:
            arena[rows, slots] = value[items]


class KVView(NamedTuple):
    """What one layer attends to: `k`, `v` [B, K, H, D]; `mask` bool [B, 1, 1, K], or None where all are visible."""

    k: Tensor
    v: Tensor
    mask: Tensor | None


class Spans(NamedTuple):
    """(end, start) of tokens that lie together: the chunk's own, and of all others that it sees."""

    own: list[tuple[int, int]]
    others: list[tuple[int, int]]


class KVChunk:
    """The chunk being drawn: a scratch place in the ring that every pass overwrites until `commit` makes it context.

    Args:
        recorded: None lets shapes follow what the host knows of the fill. A step that is recorded and replayed must not
            depend on that: "filling" attends to the whole ring under a mask that the device makes from its counters,
            "full" to the whole ring as it is.

    Attributes:
        memo: what a model computes once for all passes over the chunk.
        reuse: what keeps attention to the context from the first pass on; passes then write nothing, but where a
            storage reads whole grains. None: every pass attends to everything. Set `first` to False after the first.
    """

    def __init__(self, cache: KVCache, rows: Rows, num_frames: int, recorded: str | None = None) -> None:
        self.cache, self.rows, self.num_frames, self.recorded = cache, rows, num_frames, recorded
        self.memo: dict[Any, Any] = {}
        self.reuse: FlashBlock | None = None
        self.first = True
        self._views: dict[int, KVView] = {}

    @property
    def attends_in(self) -> torch.dtype | None:
        """The dtype that queries and keys are wanted in; None takes them as they are computed."""
        return self.cache.storage.attends_in

    @property
    def _ends(self) -> list[int]:
        return [self.cache.counts[row] + self.num_frames for row in self.rows.host]

    @property
    def fill(self) -> str:
        """ "full" when every row attends to its whole ring, else "filling"."""
        return "full" if min(self._ends) >= self._capacity and self.cache.spare == 0 else "filling"

    @property
    def _capacity(self) -> int:
        return self.cache.window.sinks + self.cache.ring

    def for_recording(self, index: Tensor | None = None) -> KVChunk:
        """The same chunk for a step to be recorded; `index` [B] names its rows, unless they are neighbours.

        ValueError: sinks that are turned before every chunk cannot be recorded.
        """
        if self.cache.position == "sink":
            raise ValueError('a cache with position="sink" cannot be recorded; make it with position="absolute"')
        rows = self.rows if index is None else RowsAt(index)
        return KVChunk(self.cache, rows, self.num_frames, self.fill)

    def twin(self) -> Self:
        """The same chunk with nothing computed yet: a step that is recorded computes all it needs itself."""
        return type(self)(self.cache, self.rows, self.num_frames, self.recorded)

    @property
    def layout(self) -> Hashable:
        """Where the chunk's frames lie and what they see. Of chunks of one layout, only the device's counters differ:
        what is recorded over one of them serves all of its rows' others."""
        return self.num_frames, self._length, self._mask is None, tuple(map(tuple, self._slots)), tuple(self.rows.host)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [B, num_frames], the index of each frame in its stream."""
        return self.rows.take(self.cache.frames)[:, None] + torch.arange(self.num_frames, device=self.cache.device)

    @cached_property
    def _slots(self) -> list[list[int]]:
        """Where each row's frames lie, as the host knows it."""
        window, ring = self.cache.window, self.cache.ring
        return [
            [frame if frame < window.sinks else window.sinks + (frame - window.sinks) % ring for frame in frames]
            for frames in (range(end - self.num_frames, end) for end in self._ends)
        ]

    @cached_property
    def _places(self) -> Places:
        window, ring, tokens = self.cache.window, self.cache.ring, self.cache.tokens_per_frame
        if self.recorded is None and all(row[-1] - row[0] == self.num_frames - 1 for row in self._slots):
            slices = Slices(self.rows, [row[0] * tokens for row in self._slots], self.num_frames * tokens)
            if self.cache.device.type == "cpu" or len(slices.parts) == 1:
                return slices
        slot = torch.where(
            self.positions < window.sinks, self.positions, window.sinks + (self.positions - window.sinks) % ring
        )
        token = torch.arange(tokens, device=self.cache.device)
        return Places(self.rows.index[:, None], (slot[..., None] * tokens + token).flatten(1))

    @cached_property
    def _length(self) -> int:
        """How many frames of the arena are attended to."""
        return self._capacity if self.recorded else min(max(self._ends), self._capacity)

    @cached_property
    def _mask(self) -> Tensor | None:
        if self.recorded:
            return None if self.recorded == "full" else self._visible_slots()
        ends = self._ends
        same_fill = len(set(ends)) == 1 or min(ends) >= self._capacity
        hides_none = self.cache.spare == 0 or max(ends) <= self.cache.window.frames
        return None if same_fill and hides_none else self._visible_slots()

    @cached_property
    def slot_frames(self) -> Tensor:
        """int64 [B, frames attended to]: which frame of the stream each place of the ring holds, -1 where it holds none
        that this chunk may see."""
        window, ring = self.cache.window, self.cache.ring
        end = self.positions[:, -1:]
        slot = torch.arange(self._length, device=self.cache.device)[None]
        newest = end - (end - slot) % ring  # a ring slot holds the newest frame that is equal to it modulo the ring
        frame = torch.where(slot < window.sinks, slot, newest)
        recent = frame > end - (window.frames - window.sinks)
        visible = (frame <= end) & (recent | (slot < window.sinks)) & (frame >= slot.clamp_max(window.sinks))
        return torch.where(visible, frame, -1)

    def _visible_slots(self) -> Tensor:
        """Bool [B, 1, 1, K]: which slots hold a frame that this chunk may see."""
        return (self.slot_frames >= 0).repeat_interleave(self.cache.tokens_per_frame, 1)[:, None, None]

    def turn_sinks(self) -> None:
        """Sinks move by as much as the window has moved past them: sink i then stands at window start - sinks + i."""
        cache = self.cache
        if cache.position != "sink" or max(self._ends) + cache.spare <= cache.window.frames:
            return
        delta = (self.positions[:, -1] + 1 - cache.window.frames).clamp_min(0)
        places = Places(self.rows.index[:, None], torch.arange(cache.sink_k.shape[2], device=cache.device)[None])
        for layer, sink_k in enumerate(cache.sink_k):
            cache.storage.write(cache.k, layer, places, shift_frames(self.rows.take(sink_k), delta))

    def attend_view(self, layer: int, k: Tensor, v: Tensor) -> KVView:
        """Context plus this chunk's `k` (rotated to `positions`) and `v`, [B, num_frames * tokens_per_frame, H, D]."""
        cache, place = self.cache, self._place(layer)
        cache.storage.write(cache.k, place, self._places, k)
        cache.storage.values.write(cache.v, place, self._places, v)
        if cache.position == "sink":
            self._keep_sinks(place, k)
        view = self._views.get(place)
        if view is None:
            view = KVView(*self._read(layer, self._length * cache.tokens_per_frame), self._mask)
            if self.rows.neighbours and cache.storage.reads_views:
                self._views[place] = view  # which the next pass finds as it will then be
        return view

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, plan: Callable[..., BlockPlan | None] | None = None
    ) -> Tensor:
        """Attention [B, L, H, D] of the chunk's tokens to everything they may see; `k`, `v` as in `attend_view`.

        `plan` makes the plan of a layer from (layer, q, k, v, mask). Under a plan nothing is reused.
        """
        storage = self.cache.storage
        if self.reuse is None or plan is not None or (storage.grain > 1 and self._spans is None):
            keys, values, mask = self.attend_view(layer, k, v)
            if plan is None:
                return storage.attend(q, keys, values, mask=mask)
            q, keys, values = storage.widened(q, keys, values)
            blocks = plan(layer, q, keys, values, mask)
            return attend(q, keys, values, blocks, mask=None if blocks is not None else mask)
        inside = k, v
        if storage.grain > 1:
            assert self._spans is not None, "as was just asked"
            self.attend_view(layer, k, v)
            inside = self._read(layer, *self._spans.own[0])
        outside = self.outside(layer) if self.first else []
        return self.reuse.attend(layer, q, inside, outside, first=self.first, attend=storage.attend)

    def outside(self, layer: int) -> list[tuple[Tensor, ...]]:
        """Keys and values of what the chunk sees besides itself: in pieces that lie together where the host knows
        where; else in one, with a mask bool [B, 1, 1, K] of what is seen."""
        if self._spans is not None:
            return [self._read(layer, *span) for span in self._spans.others]
        tokens = self.cache.tokens_per_frame
        seen = (self.slot_frames >= 0) & (self.slot_frames < self.positions[:, :1])
        whole = self._read(layer, self._length * tokens)
        return [(*whole, seen.repeat_interleave(tokens, 1)[:, None, None])]

    @cached_property
    def _spans(self) -> Spans | None:
        """None where the host does not know them, or where a storage with a grain would need two for the chunk. With a
        grain some neighbours are counted to the chunk, in every pass."""
        if self.recorded or self._mask is not None or any(slots != self._slots[0] for slots in self._slots):
            return None
        slots, tokens, grain = self._slots[0], self.cache.tokens_per_frame, self.cache.storage.grain
        runs = [[slot for _, slot in run] for _, run in groupby(enumerate(sorted(slots)), lambda at: at[1] - at[0])]
        if grain > 1 and len(runs) > 1:
            return None
        end = self._length * tokens
        starts = [run[0] * tokens // grain * grain for run in runs]
        stops = [min(-(-(run[-1] + 1) * tokens // grain) * grain, end) for run in runs]
        others = [(stop, start) for start, stop in zip([0, *stops], [*starts, end]) if start < stop]
        return Spans(list(zip(stops, starts)), others)

    def _read(self, layer: int, end: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of some tokens, as the storage's `attend` wants them."""
        cache, place = self.cache, self._place(layer)
        keys = cache.storage.read(cache.k, place, self.rows, end, start)
        return keys, cache.storage.values.read(cache.v, place, self.rows, end, start)

    def _place(self, layer: int) -> int:
        """Where the cache has this layer."""
        return layer

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
        self.advance()
        self.count()

    def advance(self) -> None:
        """The device's half of `commit`, which a recording may hold."""
        step = torch.full_like(self.rows.index, self.num_frames)
        self.cache.frames.index_add_(0, self.rows.index, step)

    def count(self) -> None:
        """The host's half of `commit`."""
        for row in self.rows.host:
            self.cache.counts[row] += self.num_frames
