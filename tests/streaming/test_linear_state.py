"""The cache of a hybrid model: linear states beside keys, row by row, chunk by chunk, forwards and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.kernels import linear_attend
from millstream.streaming.kv_cache import KVCache, Window
from millstream.streaming.linear_state import HybridCache
from millstream.streaming.snapshot import Snapshot

TOKENS, HEADS, DIM = 3, 2, 4
LINEAR = {0: "query", 2: "channel", 3: "none"}  # layer 1 keeps softmax


def cache(rows=1, block=1, spare=0, frames=6, **others):
    return HybridCache(
        layers=4,
        linear=LINEAR,
        rows=rows,
        heads=HEADS,
        head_dim=DIM,
        tokens_per_frame=TOKENS,
        window=Window(frames, block=block),
        spare=spare,
        **others,
    )


def stream(seed, frames):
    """q, k, v of one layer for a whole stream."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, frames * TOKENS, HEADS, DIM, generator=generator).abs()


DECAY = torch.tensor([0.9, 0.5])


def attend(layer, q, k, v, state=None, block=TOKENS):
    normalize = LINEAR[layer]
    decay = None if normalize == "channel" else DECAY
    return linear_attend(q, k, v, block=block, decay=decay, normalize=normalize, state=state)


def draw(memory, rows, parts, passes=2):
    """One chunk as a sampler draws it: passes whose results are thrown away, then the one that counts."""
    chunk = memory.open(rows, parts.shape[2] // TOKENS)
    outs = {}
    for number in reversed(range(passes)):
        for layer in LINEAR:
            q, k, v = parts.transpose(0, 1) + number
            outs[layer], state = attend(layer, q, k, v, chunk.state(layer), q.shape[1])
            chunk.keep(layer, state)
        chunk.attend_view(1, *parts.transpose(0, 1)[1:])
    chunk.commit()
    return outs


def whole(layer, data, block=1):
    return attend(layer, *data[:, None], block=block * TOKENS)[0]


@pytest.mark.parametrize("block", [1, 2])
def test_a_stream_in_chunks_equals_the_whole(block):
    memory, data = cache(block=block), stream(0, 20)
    outs = [draw(memory, [0], part[None]) for part in data.split(block * TOKENS, dim=1)]
    for layer in LINEAR:
        seen = torch.cat([out[layer] for out in outs], dim=1)
        torch.testing.assert_close(seen, whole(layer, data, block), atol=1e-5, rtol=1e-5)


def test_rows_of_different_age_do_not_touch_each_other():
    memory, data = cache(rows=3), [stream(row, 8) for row in range(3)]
    seen = [{layer: [] for layer in LINEAR} for _ in data]
    at = [0, 0, 0]
    for rows in ([0], [0, 2], [2], [2, 1, 0], [1, 2], [0, 1, 2]):
        parts = torch.stack([data[row][:, at[row] * TOKENS : (at[row] + 1) * TOKENS] for row in rows])
        out = draw(memory, rows, parts)
        for item, row in enumerate(rows):
            at[row] += 1
            for layer in LINEAR:
                seen[row][layer].append(out[layer][item])
    for row, data_of_row in enumerate(data):
        for layer in LINEAR:
            expected = whole(layer, data_of_row)[0, : at[row] * TOKENS]
            torch.testing.assert_close(torch.cat(seen[row][layer]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("block", "spare", "back"), [(1, 3, 1), (1, 3, 3), (2, 4, 2), (2, 4, 4), (2, 3, 2), (1, 3, 0)])
def test_rolled_back_frames_have_never_been(block, spare, back):
    memory, straight = cache(block=block, spare=spare), cache(block=block, spare=spare)
    parts, wrong = (stream(seed, 24).split(block * TOKENS, dim=1) for seed in (0, 1))
    for part in parts[:6]:
        draw(memory, [0], part[None])
        draw(straight, [0], part[None])
    for part in wrong[: back // block]:
        draw(memory, [0], part[None])
    memory.rollback(0, back)
    for part in parts[6:10]:
        a, b = draw(memory, [0], part[None]), draw(straight, [0], part[None])
        assert all(torch.equal(a[layer], b[layer]) for layer in LINEAR)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_whatever_happened_a_row_remembers_what_was_committed_and_not_undone(data):
    """Two rows drawn, dropped, rolled back, saved, copied over each other and reset at random."""
    memory, logs, saved = cache(rows=2, spare=2), [[], []], None
    for number in range(data.draw(st.integers(1, 14))):
        row = data.draw(st.integers(0, 1))
        action = data.draw(st.sampled_from(["draw", "draw", "both", "drop", "back", "save", "load", "reset"]))
        parts = torch.stack([stream(2 * number + which, 1) for which in range(2)])
        if action == "draw":
            draw(memory, [row], parts[:1])
            logs[row].append(parts[0])
        elif action == "both":
            draw(memory, [1, 0], parts)
            logs[1].append(parts[0])
            logs[0].append(parts[1])
        elif action == "drop":
            chunk = memory.open([row])
            for layer in LINEAR:
                chunk.keep(layer, attend(layer, *parts[:1].transpose(0, 1), chunk.state(layer))[1])
        elif action == "back":
            target = data.draw(st.sampled_from(memory.ends[row]))
            memory.rollback(row, memory.counts[row] - target)
            del logs[row][target:]
        elif action == "save":
            saved = memory.snapshot(row), list(logs[row])
        elif action == "load" and saved is not None:
            memory.restore(row, saved[0])
            logs[row] = list(saved[1])
        elif action == "reset":
            memory.reset(row)
            logs[row] = []
    for row, log in enumerate(logs):
        log.append(stream(99, 1))
        out = draw(memory, [row], log[-1][None])
        for layer in LINEAR:
            expected = whole(layer, torch.cat(log, dim=1))[:, -TOKENS:]
            torch.testing.assert_close(out[layer], expected, atol=1e-5, rtol=1e-5)


def test_a_part_of_a_chunk_cannot_be_rolled_back():
    memory = cache(block=2, spare=4)
    for part in stream(0, 8).split(2 * TOKENS, dim=1):
        draw(memory, [0], part[None])
    with pytest.raises(ValueError, match=r"roll back 1 frames: .* row 0 can return to frames \[4, 6\], not to 7"):
        memory.rollback(0, 1)
    with pytest.raises(ValueError, match=r"made with spare=4"):
        memory.rollback(0, 6)
    assert memory.counts == [8]
    memory.rollback(0, 4)
    assert memory.counts == [4]


def test_a_reset_row_begins_anew():
    memory, fresh, data = cache(), cache(), stream(0, 5)
    memory.linear_kv.fill_(torch.nan)
    memory.linear_norm.fill_(torch.nan)
    memory.reset(0)
    for part in data.split(TOKENS, dim=1):
        a, b = draw(memory, [0], part[None]), draw(fresh, [0], part[None])
        assert all(torch.equal(a[layer], b[layer]) for layer in LINEAR)


def test_a_snapshot_goes_through_a_file_into_another_row_and_back_in_time(tmp_path):
    memory, other, data = cache(spare=2), cache(rows=2, spare=2), stream(0, 12)
    parts = data.split(TOKENS, dim=1)
    for part in parts[:7]:
        draw(memory, [0], part[None])
    path = Snapshot(memory.snapshot(0), {}, None, "Control").save(tmp_path / "row.safetensors")
    other.restore(1, Snapshot.load(path).leaves)
    for back in (0, 2):
        memory.rollback(0, back)
        other.rollback(1, back)
        for part in parts[7 - back : 9]:
            a, b = draw(memory, [0], part[None]), draw(other, [1], part[None])
            assert all(torch.equal(a[layer], b[layer]) for layer in LINEAR)


def test_a_recorded_step_serves_every_chunk():
    """What a recording does: it asks for the same chunk once more, and moves the device's counters itself."""
    memory, live, data = cache(rows=2), cache(rows=2), [stream(row, 9) for row in range(2)]
    index = torch.tensor([1, 0])
    for number in range(9):
        parts = torch.stack([data[row][:, number * TOKENS : (number + 1) * TOKENS] for row in (1, 0)])
        chunk = memory.open([1, 0])
        for layer in LINEAR:
            again = chunk.for_recording(index)
            q, k, v = parts.transpose(0, 1)
            out, state = attend(layer, q, k, v, again.state(layer))
            again.keep(layer, state)
            assert torch.equal(out, attend(layer, q, k, v, live.open([1, 0]).state(layer))[0])
        chunk.for_recording(index).advance()
        chunk.count()
        draw(live, [1, 0], parts, passes=1)
    assert memory.counts == live.counts == [9, 9]
    assert memory.ends == live.ends
    assert torch.equal(memory.chunks, live.chunks)


def test_memory_is_fixed_and_small():
    memory = cache(frames=6)
    assert memory.k.shape[0] == 1  # keys for the softmax layer alone
    before = memory.bytes, memory.linear_kv.data_ptr()
    for part in stream(0, 40).split(TOKENS, dim=1):
        draw(memory, [0], part[None])
    assert (memory.bytes, memory.linear_kv.data_ptr()) == before
    keys = KVCache(layers=4, rows=1, heads=HEADS, head_dim=DIM, tokens_per_frame=TOKENS, window=Window(6)).bytes
    states = 3 * 2 * HEADS * (DIM * DIM + DIM) * 4
    assert memory.bytes == keys // 4 + states
    assert len(memory.ends[0]) == 1


def test_what_does_not_fit_is_refused():
    shape = {"rows": 1, "heads": 1, "head_dim": 2, "tokens_per_frame": 1, "window": Window(2)}
    for linear in ({}, {2: "none"}):
        with pytest.raises(ValueError, match="some of the layers 0 to 1, got"):
            HybridCache(layers=2, linear=linear, **shape)
    shape |= {"heads": HEADS, "head_dim": DIM, "tokens_per_frame": TOKENS, "window": Window(6)}
    plain = KVCache(layers=1, **shape)
    memory = cache()
    with pytest.raises(ValueError, match=r"saved linear_kv is None, this cache needs shape \(3, 2, 2, 4, 4\)"):
        memory.restore(0, plain.snapshot(0))
    for ends in ([3], [], [-1, 0], [0, 0], 0, [[0]]):
        with pytest.raises(ValueError, match=r"snapshot is damaged: states after .* 0 frames in memory"):
            memory.restore(0, memory.snapshot(0) | {"ends": torch.tensor(ends)})
