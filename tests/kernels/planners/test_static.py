"""Static planners against their published rule, token by token."""

from __future__ import annotations

import math

import pytest
import torch

from millstream.kernels import attend
from millstream.kernels import planners as P


def qkv(tokens, heads=2, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((1, tokens, heads, dim), generator=generator, dtype=torch.float64) for _ in range(3)]


def places(grid):
    return torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij")).flatten(1)


def assert_sees(plan, seen, heads=2):
    """The plan attends to exactly what the bool mask [..., L, L] shows."""
    q, k, v = qkv(seen.shape[-1], heads)
    torch.testing.assert_close(attend(q, k, v, plan), attend(q, k, v, mask=seen), atol=1e-9, rtol=0)


@pytest.mark.parametrize("grid", [(5, 7, 9), (4, 6, 20), (130,), (11, 13)])
def test_a_tiling_holds_every_token_once(grid):
    tiling = P.tile_grid(grid)
    tokens = math.prod(grid)
    held = tiling.source[tiling.source >= 0]
    assert held.sort().values.tolist() == list(range(tokens))
    assert tiling.lengths.sum() == tokens
    assert tiling.block % 64 == 0
    inside = tiling.source.view(-1, tiling.block) >= 0
    assert torch.equal(inside.sum(1).int(), tiling.lengths)
    assert (inside.int().diff(dim=1) <= 0).all()  # tokens first, padding last
    slots = tiling.source >= 0
    assert torch.equal(tiling.coordinates[:, slots], places(grid)[:, tiling.source[slots].long()])


def test_the_best_tile_of_wan_wastes_little():
    tile = P.best_tile((21, 30, 52))
    blocks = math.prod(-(-n // t) for n, t in zip((21, 30, 52), tile))
    assert blocks * 128 < 1.15 * 21 * 30 * 52


def test_a_tile_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"from 1 to the grid's, got \(5, 2\)"):
        P.tile_grid((4, 4), (5, 2))


@pytest.mark.parametrize("grid", [(4, 6, 10), (9, 14), (150,)])
def test_a_window_is_seen_around_each_token(grid):
    kernel = [min(n, 3) for n in grid]
    at = places(grid)
    seen = torch.ones(at.shape[1], at.shape[1], dtype=torch.bool)
    for axis, (n, size) in enumerate(zip(grid, kernel)):
        centre = at[axis].clamp(size // 2, n - 1 - size // 2)
        seen &= (centre[:, None] - at[axis]).abs() <= size // 2
    assert_sees(P.window(grid, kernel), seen)


def test_a_window_as_large_as_the_grid_is_dense():
    q, k, v = qkv(4 * 5 * 8)
    torch.testing.assert_close(attend(q, k, v, P.window((4, 5, 8), (4, 5, 8))), attend(q, k, v))


def test_a_window_whose_stride_is_the_tile_has_no_masked_blocks():
    plan = P.window((4, 16, 16), (4, 16, 16), stride=(2, 8, 8), tile=(2, 8, 8))
    assert int(plan.n_masked.sum()) == 0
    plan = P.window((6, 24, 24), (2, 24, 8), stride=(2, 8, 8), tile=(2, 8, 8))
    assert int(plan.n_masked.sum()) == 0
    assert plan.density(27) == pytest.approx(1 / 9)


def test_a_window_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"axis 1 of length 6 needs .* got kernel 4, stride 1, dilation 2"):
        P.window((4, 6, 8), (2, 4, 2), dilation=(1, 2, 1))


def test_sliding_tiles_see_whole_tiles_around_them_per_head():
    grid, tile, windows = (6, 8, 12), (2, 4, 4), ((1, 1, 3), (3, 2, 1))
    at = places(grid) // torch.tensor(tile)[:, None]
    seen = []
    for window in windows:
        visible = torch.ones(at.shape[1], at.shape[1], dtype=torch.bool)
        for axis, size in enumerate(window):
            tiles, half = -(-grid[axis] // tile[axis]), size // 2
            centre = at[axis].clamp(min(half, tiles - 1), max(tiles - 1 - half, min(half, tiles - 1)))
            visible &= (centre[:, None] - at[axis]).abs() <= half
        seen.append(visible)
    assert_sees(P.sliding_tile(grid, windows, tile=tile), torch.stack(seen)[None])


def test_radial_bands_halve_with_distance_and_frame_0_stays():
    frames, tokens, block = 9, 520, 128
    plan = P.radial(frames, tokens, block=block)
    blocks = -(-frames * tokens // block)
    visited = plan.listed(blocks)[0, 0].repeat_interleave(block, 0).repeat_interleave(block, 1)
    visited = visited[: frames * tokens, : frames * tokens]
    at = torch.arange(frames * tokens)
    for distance in range(1, frames):
        width = max(tokens / 2 ** distance.bit_length(), 128)
        if distance % math.ceil(128 / (tokens / 2 ** distance.bit_length())):
            continue
        queries = at[distance * tokens :: 37]
        for query in queries.tolist():
            frame, place = divmod(query, tokens)
            low, high = max(0, math.ceil(place - width)), min(tokens - 1, math.floor(place + width))
            start = (frame - distance) * tokens
            assert visited[query, start + low : start + high + 1].all()
    assert visited[:, :tokens].all()
    assert all(visited[f * tokens : (f + 1) * tokens, f * tokens : (f + 1) * tokens].all() for f in range(frames))
    assert P.radial(21, 1560).density(256) < 0.5


def test_streaming_heads_see_sinks_and_what_is_recent():
    at = torch.arange(300)
    causal = at[:, None] >= at
    streaming = causal & ((at[:, None] - at < 50) | (at < 20))
    plan = P.duo(torch.tensor([True, False]), 300, sink_size=20, recent_size=50, block=64)
    assert_sees(plan, torch.stack([causal, streaming])[None])


def test_factorised_attention_stays_in_its_frame_or_at_its_place():
    grid = (4, 6, 10)
    frame, place = torch.arange(240) // 60, torch.arange(240) % 60
    assert_sees(P.spatial(grid), frame[:, None] == frame)
    assert_sees(P.temporal(grid), place[:, None] == place)
    assert_sees(P.interleaved(grid, 0), frame[:, None] == frame)
    assert_sees(P.interleaved(grid, 1), place[:, None] == place)
