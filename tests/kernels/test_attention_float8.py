"""Attention over float8 as it lies in memory: values turned wherever they begin, and results near the definition."""

from __future__ import annotations

import pytest
import torch

from millstream.kernels import attend
from millstream.kernels.attention.float8 import attend_float8, float8_serves
from millstream.kernels.attention.turned import GRAIN, key_order, turn_values, turned_back, turned_place
from millstream.kernels.float8 import FLOAT8, to_float8
from millstream.streaming.kv_cache import Float8, KVCache, Window

gpu = pytest.mark.gpu
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="FP8 attention wants Hopper"
)


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def turned(v, start=0, end=None):
    tokens = end or start + v.shape[1]
    out = torch.zeros((v.shape[0], *v.shape[2:], -(-tokens // GRAIN) * GRAIN), dtype=FLOAT8, device=v.device)
    turn_values(v, out, start)
    return out


def test_float8_ends_where_its_numbers_end():
    x = torch.tensor([1e4, -1e4, 448.0, 0.3, 0.0])
    assert to_float8(x).float().tolist() == [448, -448, 448, 0.3125, 0]
    assert to_float8(to_float8(x)).dtype == FLOAT8


def test_places_of_turned_values_are_the_inverse_of_their_order():
    order = key_order(64, torch.device("cpu"))
    assert torch.equal(turned_place(order), torch.arange(64))
    assert torch.equal(order[turned_place(torch.arange(64))], torch.arange(64))


@pytest.mark.parametrize("start", [0, 8, 13, 16])
def test_values_are_turned_where_they_stand_and_nothing_else_is_touched(start):
    whole = turned(draw(0, 2, 61, 3, 8))
    before, v = turned_back(whole, 61).float(), draw(1, 2, 21, 3, 8)
    turn_values(v, whole, start)
    after = turned_back(whole, 61).float()
    assert torch.equal(after[:, start : start + 21], to_float8(v).float())
    assert torch.equal(after[:, :start], before[:, :start])
    assert torch.equal(after[:, start + 21 :], before[:, start + 21 :])


@pytest.mark.parametrize("hidden", [False, True])
def test_it_is_attention_of_the_numbers_as_they_are_kept(hidden):
    q, k, v = (to_float8(draw(i, 2, n, 3, 16)) for i, n in enumerate((7, 37, 37)))
    mask = torch.arange(37) % 3 > 0 if hidden else None
    out, lse = attend_float8(q, k, turned(v.float()), mask=mask)
    wide = [x.float() for x in (q, k, v)]
    expected, expected_lse = attend(*wide, mask=mask, return_lse=True)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(lse, expected_lse, atol=0.02, rtol=0)


def test_other_numbers_and_shapes_are_refused():
    q, k, v = (to_float8(draw(i, 1, 5, 2, 16)) for i in range(3))
    with pytest.raises(TypeError, match="wants float8_e4m3fn, got"):
        attend_float8(q.float(), k, turned(v))
    with pytest.raises(ValueError, match=r"a multiple of 16 from Lk on, got .* and \[1, 5, 2, 16\]"):
        attend_float8(q, k, v)
    with pytest.raises(ValueError, match="a multiple of 16 from Lk on"):
        attend_float8(q, k, turned(v)[..., :5])


@pytest.mark.parametrize(("position", "tokens"), [("absolute", 10), ("absolute", 16), ("sink", 10)])
@pytest.mark.parametrize("rows", [[1], [0, 1]])
def test_a_cache_of_float8_attends_as_one_of_full_numbers_does(position, tokens, rows):
    shape = {"layers": 1, "rows": 2, "heads": 2, "head_dim": 16, "tokens_per_frame": tokens, "position": position}
    caches = [KVCache(**shape, window=Window(6, sinks=2, block=2), storage=store) for store in (None, Float8())]
    for step in range(7):
        q, k, v = draw(step, 3, len(rows), 2 * tokens, 2, 16).unbind()
        outs = []
        for cache in caches:
            chunk = cache.open(rows)
            outs.append(chunk.attend(0, q, k, v).float())
            chunk.commit()
        assert 0 < (outs[0] - outs[1]).norm() / outs[0].norm() < 0.1
    saved, other = caches[1].snapshot(rows[-1]), 1 - rows[-1]
    caches[1].restore(other, saved)
    assert torch.equal(caches[1].v[:, other].view(torch.uint8), caches[1].v[:, rows[-1]].view(torch.uint8))
    with pytest.raises(ValueError, match=r"the saved (k is kept in|v has shape)"):
        caches[0].restore(0, saved)
    assert caches[1].bytes < 0.4 * caches[0].bytes


@pytest.mark.parametrize("block", [1, 2, 3])
def test_attention_in_two_parts_is_attention_wherever_the_ring_stands(block):
    """Frames of 10 tokens begin and end within a grain of 16: its neighbours are counted to the chunk."""
    from millstream.kernels.planners import FlashBlock

    shape = {"layers": 1, "rows": 1, "heads": 2, "head_dim": 16, "tokens_per_frame": 10}
    whole, parts = (KVCache(**shape, window=Window(6, sinks=2, block=block), storage=Float8()) for _ in range(2))
    for step in range(12):
        q, k, v = draw(step, 3, 1, block * 10, 2, 16).unbind()
        one, other = whole.open([0]), parts.open([0])
        other.reuse = FlashBlock()
        assert block == 3 or other._spans is not None  # three frames come to lie in two pieces, and are not parted
        other.attend(0, q, k, v)
        other.first = False  # a later pass: what lies outside is kept, and the chunk's own keys are new
        k, v = draw(100 + step, 2, 1, block * 10, 2, 16).unbind()
        expected = one.attend(0, q, k, v).float()
        torch.testing.assert_close(other.attend(0, q, k, v).float(), expected, atol=0.02, rtol=0.02)
        assert torch.equal(whole.v.view(torch.uint8), parts.v.view(torch.uint8))
        one.commit()
        other.commit()


def test_a_plan_is_given_what_it_knows():
    cache = KVCache(layers=1, rows=1, heads=1, head_dim=16, tokens_per_frame=4, window=Window(2), storage=Float8())
    plain = KVCache(layers=1, rows=1, heads=1, head_dim=16, tokens_per_frame=4, window=Window(2))
    seen = []

    def plan(layer, q, k, v, mask):
        seen.append([x.shape for x in (q, k, v)])

    q, k, v = draw(0, 3, 1, 4, 1, 16)
    planned, expected = (each.open([0]).attend(0, q, k, v, plan) for each in (cache, plain))
    assert seen[0] == seen[1]
    assert (planned.float() - expected).norm() / expected.norm() < 0.1


@gpu
@hopper
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(4680, 18720), (1560, 9360), (63, 1000), (130, 16)])
@torch.no_grad()
def test_cuda_multiplies_in_float8_and_stays_near_float64(dim, queries, keys):
    q, k, v = (draw(i, 1, n, 2, dim).cuda().bfloat16() for i, n in enumerate((queries, keys, keys)))
    arena = torch.full((1, 2, dim, 18736), 7.0, device="cuda").to(FLOAT8)  # what lies past the keys is another's
    turn_values(v, arena)
    q, k = to_float8(q), to_float8(k)
    assert float8_serves(q.device, dim)
    out, lse = attend_float8(q, k, arena[..., : -(-keys // GRAIN) * GRAIN])
    truth, truth_lse = attend(q[:, :200].double(), k.double(), to_float8(v).double(), return_lse=True)
    assert (out[:, :200].double() - truth).norm() / truth.norm() < 0.04  # weights are rounded to 8 bits too
    torch.testing.assert_close(lse[..., :200].double(), truth_lse.double(), atol=2e-3, rtol=0)


@gpu
@hopper
@pytest.mark.parametrize("start", [0, 8, 4680, 9365])
@torch.no_grad()
def test_cuda_turns_values_as_the_reference_does(start):
    joint = draw(0, 1, 1560, 3, 2 * 128).cuda().bfloat16() * 300
    v = joint[:, :, 2].unflatten(-1, (2, 128))  # strided, as a joint projection gives it
    seen = torch.full((1, 2, 128, 10928), 3.0, device="cuda").to(FLOAT8)
    wanted = seen.cpu()
    turn_values(v, seen, start)
    turn_values(v.cpu(), wanted, start)
    assert torch.equal(seen.cpu().view(torch.uint8), wanted.view(torch.uint8))
