"""The KV cache against one forward over the whole history, and what it promises about memory and the device."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from millstream.kernels import apply_rotary, attend, rotary_angles
from millstream.streaming.kv_cache import KVCache, KVChunk, Window
from millstream.streaming.kv_chunk import RowsAt

LAYERS, HEADS, DIM, TOKENS = 2, 2, 12, 2
WINDOWS = [Window(4), Window(5, sinks=2), Window(6, block=3), Window(7, sinks=1, block=3), Window(9, sinks=3, block=3)]


def make(window: Window, rows: int = 1, **options) -> KVCache:
    shape = {"layers": LAYERS, "heads": HEADS, "head_dim": DIM, "tokens_per_frame": TOKENS}
    return KVCache(**shape, rows=rows, window=window, **options)


def history(frames: int, seed: int = 0) -> torch.Tensor:
    """Raw queries, keys and values [3, layers, 1, frames, tokens, heads, dim]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, LAYERS, 1, frames, TOKENS, HEADS, DIM, generator=generator)


def turn(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return apply_rotary(x, *rotary_angles(positions, 1, TOKENS, DIM))


def draw(cache: KVCache, rows: list[int], raw: torch.Tensor, *, commit: bool = True) -> torch.Tensor:
    """One chunk of `rows`: raw [3, layers, B, frames, ...] to attention output [layers, B, frames * tokens, ...]."""
    chunk = cache.open(rows, raw.shape[3])
    out = []
    for layer, (q, k, v) in enumerate(zip(*raw.flatten(3, 4))):
        q, k = turn(q, chunk.positions), turn(k, chunk.positions)
        view = chunk.attend_view(layer, k, v)
        out.append(attend(q, view.k, view.v, mask=view.mask))
    if commit:
        chunk.commit()
    return torch.stack(out)


def stream(cache: KVCache, raw: torch.Tensor, row: int = 0) -> torch.Tensor:
    block = cache.window.block
    return torch.cat([draw(cache, [row], part) for part in raw.split(block, dim=3)], dim=2)


def whole(window: Window, raw: torch.Tensor) -> torch.Tensor:
    frames = raw.shape[3]
    mask = window.mask(frames, TOKENS)
    positions = torch.arange(frames)
    return torch.stack(
        [attend(turn(q, positions), turn(k, positions), v, mask=mask) for q, k, v in zip(*raw.flatten(3, 4))]
    )


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 2e-6) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("spare", [0, 1, 3])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_stream_equals_one_forward_over_the_whole_history(window, spare):
    raw = history(10 * window.block)
    close(stream(make(window, spare=spare), raw), whole(window, raw))


def test_the_whole_history_is_what_a_loop_over_frames_says():
    window = Window(7, sinks=1, block=3)
    mask = window.mask(12, 1)
    for query in range(12):
        end = query // 3 * 3 + 2
        seen = {0} | set(range(max(0, end - 5), end + 1))
        assert mask[query].nonzero()[:, 0].tolist() == sorted(seen)


def test_passes_before_the_commit_leave_no_trace():
    raw, window = history(8), Window(3, sinks=1)
    cache = make(window)
    out = []
    for frame, part in enumerate(raw.split(1, dim=3)):
        for attempt in range(3):
            draw(cache, [0], history(1, seed=100 * frame + attempt), commit=False)
        out.append(draw(cache, [0], part))
    close(torch.cat(out, dim=2), whole(window, raw))


def test_where_the_ring_begins_changes_nothing():
    """The same frames from every start slot: a longer ring, or a stream that is that much older."""
    window, raw = Window(4), history(12)
    expected = stream(make(window), raw)
    tail = 4 * TOKENS
    for start in range(1, 6):
        cache = make(window)
        cache.restore(0, cache.snapshot(0) | {"count": start, "reached": start})
        close(stream(cache, raw)[:, :, tail:], expected[:, :, tail:], 1e-5)
        close(stream(make(window, spare=start), raw), expected)


@pytest.mark.parametrize("age", [10, 10_000, 1_000_000, 10**9])
@pytest.mark.parametrize(("window", "position"), [(Window(4), "absolute"), (Window(5, sinks=2), "sink")])
def test_an_old_stream_is_as_exact_as_a_young_one(window, position, age):
    raw = history(16)
    young = make(window, position=position)
    stream(young, raw[:, :, :, :6])
    old = make(window, position=position)
    old.restore(0, young.snapshot(0) | {"count": age, "reached": age})
    expected, seen = stream(young, raw[:, :, :, 6:]), stream(old, raw[:, :, :, 6:])
    filled = window.frames * TOKENS  # until then the window still holds frames from before the leap
    close(seen[:, :, filled:], expected[:, :, filled:], 1e-5)


def sink_reference(window: Window, raw: torch.Tensor) -> torch.Tensor:
    """Every raw key turned at the place it is assigned, one query block at a time, in float64."""
    frames, out = raw.shape[3], []
    for layer in range(LAYERS):
        q, k, v = raw[:, layer]
        parts = []
        for begin in range(0, frames, window.block):
            end = begin + window.block
            first = max(window.sinks, end - (window.frames - window.sinks))
            kept = list(range(min(window.sinks, end))) + list(range(first, end))
            places = [frame + max(0, end - window.frames) if frame < window.sinks else frame for frame in kept]
            keys = turn(k[:, kept].flatten(1, 2).double(), torch.tensor(places))
            queries = turn(q[:, begin:end].flatten(1, 2).double(), torch.arange(begin, end))
            scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / DIM**0.5
            parts.append(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, kept].flatten(1, 2).double()))
        out.append(torch.cat(parts, dim=1))
    return torch.stack(out).float()


@pytest.mark.parametrize("spare", [0, 2])
@pytest.mark.parametrize(
    "window", [Window(5, sinks=2), Window(7, sinks=1, block=3), Window(9, sinks=3, block=3)], ids=str
)
def test_sinks_stand_just_before_the_window(window, spare):
    raw = history(24)
    close(stream(make(window, position="sink", spare=spare), raw), sink_reference(window, raw), 1e-5)
    assert (whole(window, raw) - sink_reference(window, raw)).abs().max() > 1e-2  # and that differs from staying put


@pytest.mark.parametrize("position", ["absolute", "sink"])
@pytest.mark.parametrize("drawn", [4, 6, 7, 12])
@pytest.mark.parametrize("back", [1, 2, 3])
def test_rolling_back_equals_never_having_drawn(position, drawn, back):
    window, raw, other = Window(6, sinks=2), history(drawn), history(8, seed=1)
    cache = make(window, position=position, spare=3)
    stream(cache, raw)
    cache.rollback(0, back)
    fresh = make(window, position=position, spare=3)
    stream(fresh, raw[:, :, :, : drawn - back])
    close(stream(cache, other), stream(fresh, other))


def test_rolling_back_twice_stays_exact_or_is_refused():
    window, raw, other = Window(4), history(12), history(6, seed=1)
    cache, fresh = make(window, spare=2), make(window, spare=2)
    stream(cache, raw)
    cache.rollback(0, 2)
    cache.rollback(0, 1)  # the frame that is drawn next needs one frame of history less
    with pytest.raises(ValueError, match="spare=3 or more"):
        cache.rollback(0, 1)
    stream(fresh, raw[:, :, :, :9])
    close(stream(cache, other), stream(fresh, other))


def test_rollback_refuses_what_is_gone():
    cache = make(Window(4), spare=2)
    stream(cache, history(1))
    with pytest.raises(ValueError, match="cannot roll back 2 frames: 1 are committed"):
        cache.rollback(0, 2)
    stream(cache, history(8))
    with pytest.raises(ValueError, match="spare=2"):
        cache.rollback(0, 3)
    with pytest.raises(ValueError, match="cannot roll back -1"):
        cache.rollback(0, -1)


def test_a_large_chunk_may_be_dropped_while_the_window_survives():
    raw, window = history(10), Window(4)
    cache = make(window, spare=2)
    stream(cache, raw[:, :, :, :9])
    draw(cache, [0], history(3, seed=1), commit=False)
    close(draw(cache, [0], raw[:, :, :, 9:]), whole(window, raw)[:, :, -TOKENS:])
    cache = make(window)
    stream(cache, raw[:, :, :, :9])
    draw(cache, [0], history(3, seed=1), commit=False)
    with pytest.raises(ValueError, match="drawn up to frame 12"):
        cache.open([0])


@pytest.mark.parametrize("position", ["absolute", "sink"])
@pytest.mark.parametrize("drawn", [1, 4, 11])
def test_a_snapshot_goes_on_in_another_row_and_in_another_cache(position, drawn):
    window, raw, other = Window(5, sinks=2), history(drawn), history(7, seed=1)
    cache = make(window, rows=2, position=position)
    stream(cache, raw)
    saved = cache.snapshot(0)
    elsewhere = make(window, rows=3, position=position)
    stream(elsewhere, history(9, seed=2), row=2)  # what lay there must not show through
    elsewhere.restore(2, saved)
    cache.restore(1, saved)
    expected = stream(cache, other)  # after the snapshot: it is a copy
    close(stream(cache, other, row=1), expected)
    close(stream(elsewhere, other, row=2), expected)


def test_a_snapshot_keeps_how_far_its_row_was_drawn():
    cache = make(Window(4), rows=2, spare=1)
    stream(cache, history(9))
    cache.rollback(0, 1)
    cache.restore(1, cache.snapshot(0))
    cache.rollback(1, 1)
    with pytest.raises(ValueError, match="drawn up to frame 9"):
        cache.rollback(1, 1)


def test_a_snapshot_of_another_shape_is_refused():
    saved = make(Window(4)).snapshot(0)
    with pytest.raises(ValueError, match="the saved k has shape"):
        make(Window(5)).restore(0, saved)
    with pytest.raises(ValueError, match="the saved sink_k has shape"):
        make(Window(4, sinks=1), position="sink").restore(0, saved)


@pytest.mark.parametrize("rows", [[0, 1, 2], [3, 0, 1]], ids=str)
@pytest.mark.parametrize(("position", "spare"), [("absolute", 0), ("absolute", 2), ("sink", 0), ("sink", 2)])
def test_rows_of_different_fill_equal_each_alone(position, spare, rows):
    window, fills = Window(5, sinks=2), [0, 3, 13]
    together = make(window, rows=4, position=position, spare=spare)
    alone = [make(window, position=position, spare=spare) for _ in rows]
    for row, cache, fill in zip(rows, alone, fills):
        if fill:
            stream(cache, history(fill, seed=row))
            stream(together, history(fill, seed=row), row=row)
    for step in range(8):
        parts = [history(1, seed=50 + 10 * step + row) for row in rows]
        seen = draw(together, rows, torch.cat(parts, dim=2))
        close(seen, torch.cat([draw(cache, [0], part) for cache, part in zip(alone, parts)], dim=1))


def test_a_reset_row_is_a_new_one():
    for position in ("absolute", "sink"):
        window, raw = Window(5, sinks=2), history(9)
        cache = make(window, position=position)
        stream(cache, history(13, seed=1))
        cache.reset(0)
        close(stream(cache, raw), stream(make(window, position=position), raw))


@pytest.mark.parametrize("position", ["absolute", "sink"])
def test_memory_never_moves_or_grows(position):
    cache = make(Window(5, sinks=2), rows=2, position=position, spare=1)
    stores = (cache.k, cache.v, cache.sink_k, cache.frames)
    before = cache.bytes, [store.data_ptr() for store in stores]
    raw = history(1).repeat(1, 1, 2, 1, 1, 1, 1)
    for _ in range(100):
        draw(cache, [0, 1], raw)
    assert cache.frames.tolist() == cache.counts == [100, 100]
    assert (cache.bytes, [store.data_ptr() for store in (cache.k, cache.v, cache.sink_k, cache.frames)]) == before
    expected = 2 * LAYERS * 2 * (5 + 1) * TOKENS * HEADS * DIM * 4
    assert cache.bytes == expected + (LAYERS * 2 * 2 * TOKENS * HEADS * DIM * 4 if position == "sink" else 0)


class NoReading(TorchDispatchMode):
    """Fails on what makes the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "::item", "masked_select")), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("position", ["absolute", "sink"])
def test_nothing_is_read_from_the_device(position):
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReading():
        torch.zeros(1).item()
    cache = make(Window(5, sinks=2), rows=3, position=position, spare=1)
    raw = history(1)
    with NoReading():
        for _ in range(8):
            draw(cache, [0], raw)
        cache.rollback(0, 1)
        for _ in range(8):
            draw(cache, [2, 0], raw.repeat(1, 1, 2, 1, 1, 1, 1))
        cache.restore(1, cache.snapshot(0))
        cache.reset(0)
        draw(cache, [0, 1], raw.repeat(1, 1, 2, 1, 1, 1, 1))


@pytest.mark.parametrize(("frames", "sinks", "block"), [(0, 0, 1), (4, 0, 0), (4, -1, 1), (4, 4, 1), (4, 2, 3)])
def test_an_impossible_window_is_refused(frames, sinks, block):
    with pytest.raises(
        ValueError, match=rf"frames >= sinks \+ block; got frames={frames}, sinks={sinks}, block={block}"
    ):
        Window(frames, sinks, block)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="'absolute' or 'sink', got 'relative'"):
        make(Window(4), position="relative")
    with pytest.raises(ValueError, match="spare must be 0 or more frames, got -1"):
        make(Window(4), spare=-1)
    for frames in (0, 4):
        with pytest.raises(ValueError, match=f"a chunk of {frames} frames does not fit"):
            make(Window(4, sinks=1)).open([0], frames)


@pytest.mark.parametrize("by_index", [False, True])
@pytest.mark.parametrize("spare", [0, 2])
def test_a_chunk_for_recording_sees_and_writes_the_same_from_device_counters_alone(spare, by_index):
    """Whatever the host believes: its counters are wrong here, as they are in a recording that is replayed."""
    window, rows, fills = Window(5, sinks=2), [2, 1], [1, 3]
    usual, recorded = (make(window, rows=3, spare=spare) for _ in range(2))
    for cache in (usual, recorded):
        for row, fill in zip(rows, fills):
            stream(cache, history(fill, seed=row), row=row)
    for step in range(12):
        raw = history(1, seed=50 + step).repeat(1, 1, 2, 1, 1, 1, 1)
        expected = draw(usual, rows, raw)
        chunk = recorded.open(rows)
        fill = chunk.fill
        assert fill == ("full" if spare == 0 and step >= 3 else "filling")
        counts, recorded.counts = recorded.counts, [0, 0, 0]
        still = KVChunk(recorded, RowsAt(torch.tensor(rows)) if by_index else chunk.rows, 1, fill)
        out = []
        for layer, (q, k, v) in enumerate(zip(*raw.flatten(3, 4))):
            q, k = turn(q, still.positions), turn(k, still.positions)
            view = still.attend_view(layer, k, v)
            assert view.k.shape[1] == (window.frames + spare) * TOKENS, "one shape for all fills"
            out.append(attend(q, view.k, view.v, mask=view.mask))
        still.advance()
        recorded.counts = counts
        chunk.count()
        close(torch.stack(out), expected)
    assert recorded.frames.tolist() == recorded.counts == usual.counts


def test_sinks_that_turn_cannot_be_recorded():
    cache = make(Window(4, sinks=1), position="sink")
    with pytest.raises(ValueError, match='position="sink" cannot be recorded; make it with position="absolute"'):
        cache.open([0]).for_recording()


@pytest.mark.parametrize("window", [Window(4), Window(5, sinks=2), Window(7, sinks=1, block=3)], ids=str)
def test_slices_and_indices_write_to_the_same_places(window):
    """The CPU writes slices where it can, another device by index; the memory is the same afterwards."""
    caches = [make(window, rows=3) for _ in range(2)]
    for step in range(9):
        rows = [[0], [0, 1], [2, 0], [1, 2]][step % 4]
        raw = history(window.block, seed=step).repeat(1, 1, len(rows), 1, 1, 1, 1)
        draw(caches[0], rows, raw)
        chunk = caches[1].open(rows, window.block)
        still = chunk.for_recording()
        for layer, (_, k, v) in enumerate(zip(*raw.flatten(3, 4))):
            still.attend_view(layer, turn(k, still.positions), v)
        chunk.commit()
        assert torch.equal(caches[0].k, caches[1].k)
        assert torch.equal(caches[0].v, caches[1].v)
