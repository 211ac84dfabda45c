"""Planners that look at queries and keys: they find what is planted, and keep their published promises."""

from __future__ import annotations

import math

import pytest
import torch

from millstream.kernels import attend
from millstream.kernels import planners as P
from millstream.kernels.planners.scores import top_share

GRID = (4, 8, 16)
TOKENS = math.prod(GRID)


def qkv(tokens=TOKENS, heads=2, dim=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((1, tokens, heads, dim), generator=generator) for _ in range(3)]


def planted(block=64, tokens=TOKENS, heads=2, dim=32):
    """Queries and keys in blocks; query block i belongs to key block partner[i], whose keys all point its way."""
    generator = torch.Generator().manual_seed(1)
    blocks = tokens // block
    partner = torch.randperm(blocks, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn((blocks, heads, dim), generator=generator), dim=-1) * 9
    noise = [torch.randn((1, tokens, heads, dim), generator=generator) * 0.2 for _ in range(2)]
    k = direction.repeat_interleave(block, 0)[None] + noise[0]
    q = direction[partner].repeat_interleave(block, 0)[None] + noise[1]
    return q, k, torch.randn((1, tokens, heads, dim), generator=generator), partner


def error(plan, q, k, v):
    truth = attend(q, k, v)
    return float((attend(q, k, v, plan) - truth).norm() / truth.norm())


def planners(block, tiling):
    gate = torch.eye(32).expand(2, 32, 32)
    return {
        "moba": lambda q, k, v: P.moba(q, k, moba_chunk_size=block, moba_topk=2, is_causal=False),
        "moba pooled": lambda q, k, v: P.moba(q, k, moba_chunk_size=block, moba_topk=2, gate="pooled", is_causal=False),
        "biformer": lambda q, k, v: P.biformer(q, k, tiling, topk=2),
        "vmoba": lambda q, k, v: P.vmoba(q, k, tiling, simsum_threshold=0.6),
        "sparge": lambda q, k, v: P.sparge(q, k, block=(block, block), simthreshd1=0.1),
        "seer": lambda q, k, v: P.seer(q, k, gate, torch.cat([gate * 0, gate * 0, gate], 1), block=block),
        "proxy": lambda q, k, v: P.proxy(q, k, groups=2, block=block),
        "pisa": lambda q, k, v: P.pisa(q, k, v, density=0.25, block=block),
        "svg_ear": lambda q, k, v: P.svg_ear(q, k, v, density=0.25, block=block),
        "svg2": lambda q, k, v: P.svg2(q, k, num_q_clusters=8, num_k_clusters=8, kmeans_iterations=4, block=(64, 64))[
            0
        ],
    }


@pytest.mark.parametrize("name", planners(64, None))
def test_the_blocks_that_matter_are_found(name):
    q, k, v, _ = planted()
    tiling = P.tile_grid(GRID, (1, 4, 16))  # 64 neighbouring tokens each, as they were planted
    plan = planners(64, tiling)[name](q, k, v)
    key_blocks = plan.lengths[1].shape[-1] if plan.lengths is not None else TOKENS // 64
    assert error(plan, q, k, v) < 0.05
    assert plan.density(key_blocks) < 0.7


def test_the_top_share_is_the_fewest_that_hold_it():
    weights = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    assert top_share(weights, 0.7).tolist() == [[False, True, False, True]]
    assert top_share(weights, 0.76).tolist() == [[False, True, True, True]]
    assert top_share(weights, 1.1).all()


def test_moba_gates_each_query_and_cuts_the_future():
    q, k, v = qkv(256)
    plan = P.moba(q, k, moba_chunk_size=64, moba_topk=2)
    means = k.unflatten(1, (4, 64)).mean(2)
    gate = torch.einsum("blhd,bchd->bhlc", q, means)
    own = torch.arange(256) // 64
    gate = gate.masked_fill(torch.arange(4) > own[:, None], -math.inf).masked_fill(
        torch.arange(4) == own[:, None], math.inf
    )  # fmt: skip
    chosen = torch.zeros_like(gate, dtype=torch.bool).scatter_(-1, gate.topk(2, -1).indices, True) & (gate > -math.inf)
    seen = chosen.repeat_interleave(64, -1) & torch.ones(256, 256, dtype=torch.bool).tril()
    torch.testing.assert_close(attend(q, k, v, plan), attend(q, k, v, mask=seen), atol=2e-6, rtol=0)


def test_vmoba_takes_the_highest_pairs_of_the_whole_head():
    """A head whose weight lies in one query block gives that block its pairs, others keep only their own."""
    q, k, _ = qkv()
    q = q * 0.01
    q[:, :64] = k[:, 64:128].mean(1, keepdim=True) * 50
    tiling = P.tile_grid(GRID, (1, 4, 16))
    listed = P.vmoba(q, k, tiling, simsum_threshold=0.02).listed(8)[0]
    assert listed.diagonal(dim1=1, dim2=2).all()
    assert listed[:, 0, 1].all()
    assert (listed[:, 1:].sum(-1) <= 2).all()


def test_sparge_keeps_blocks_whose_tokens_differ():
    q, k, _, _ = planted()
    k[:, 64:128] = torch.randn(1, 64, 2, 32, generator=torch.Generator().manual_seed(2))
    plan = P.sparge(q, k, block=(64, 64), simthreshd1=0.3, cdfthreshd=0.5)
    assert plan.listed(TOKENS // 64)[..., 1].all()


def test_seer_takes_a_threshold_or_a_number():
    q, k, _ = qkv()
    weights = torch.randn(2, 32, 16) * 0.1, torch.randn(2, 96, 16) * 0.1
    plan = P.seer(q, k, *weights, topk=3)
    assert (plan.n_full + plan.n_masked == 3).all()
    assert (P.seer(q, k, *weights, threshold=0.9).n_full == 1).all()  # never nothing


def test_proxy_refuses_groups_that_do_not_divide():
    q, k, _ = qkv(heads=3)
    with pytest.raises(ValueError, match="3 heads make no 2 equal groups"):
        P.proxy(q, k, groups=2)


def test_centroids_stay_near_where_dropping_does_not():
    """Clustered keys and values under queries that favour none: PISA's case, 15 % exact."""
    generator = torch.Generator().manual_seed(3)

    def draw(count):
        return torch.randn((1, count, 2, 64), generator=generator)

    q = draw(2048)
    k, v = (draw(32).repeat_interleave(64, 1) + 0.3 * draw(2048) for _ in range(2))
    plan = P.pisa(q, k, v)
    dropped = type(plan)(plan.block, plan.indices, plan.n_full, plan.n_masked)
    assert error(dropped, q, k, v) > 1
    assert error(plan, q, k, v) < 0.1
    assert error(P.svg_ear(q, k, v), q, k, v) < 0.1
    assert plan.density(32) <= 0.16


def test_svg1_tells_spatial_heads_from_temporal_ones():
    generator = torch.Generator().manual_seed(4)
    frame = torch.randn((4, 1, 32), generator=generator).expand(4, 128, 32).reshape(512, 32) * 2
    place = torch.randn((1, 128, 32), generator=generator).expand(4, 128, 32).reshape(512, 32) * 2
    q = torch.stack([frame, place], 1)[None]
    plan = P.svg1(q, q, torch.randn(1, 512, 2, 32, generator=generator), GRID, sparsity=0.5, generator=generator)
    source = plan.permutation.q_source[0]
    assert source[0].tolist() == list(range(512))
    assert source[1][:5].tolist() == [0, 128, 256, 384, 1]


def test_svg2_with_everything_kept_is_dense_and_clusters_may_be_of_any_size():
    q, k, v = qkv(300)
    k[:, :200] = k[:, :1]  # one cluster of 200, others small or empty
    plan, centres = P.svg2(q, k, num_q_clusters=5, num_k_clusters=9, top_p=1.1)
    torch.testing.assert_close(attend(q, k, v, plan), attend(q, k, v), atol=2e-6, rtol=0)
    again, _ = P.svg2(q, k, num_q_clusters=5, num_k_clusters=9, top_p=1.1, start=centres)
    torch.testing.assert_close(attend(q, k, v, again), attend(q, k, v), atol=2e-6, rtol=0)


def test_pbs_with_everything_kept_is_causal_attention_at_any_length():
    for tokens in (512, 700):
        q, k, v = qkv(tokens)
        plan = P.pbs(q, k, threshold=1.1, segment_size=128, block=64)
        seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        torch.testing.assert_close(attend(q, k, v, plan), attend(q, k, v, mask=seen), atol=2e-6, rtol=0)


def test_pbs_gathers_heavy_keys_into_few_blocks():
    """Every 4th key is heavy: in order they touch every block, sorted they fill one block of each segment."""
    q, k, v = qkv(1024)
    heavy = torch.zeros(1024, dtype=torch.bool)
    heavy[::4] = True
    k = torch.where(heavy[:, None, None], 6 * torch.ones(32) / 32**0.5, k * 0.1)
    q = q * 0.1 + torch.ones(32) * 1.5
    seen = torch.ones(1024, 1024, dtype=torch.bool).tril()
    truth = attend(q, k, v, mask=seen)
    plan = P.pbs(q, k, threshold=0.9, segment_size=256, block=64)
    assert (attend(q, k, v, plan) - truth).norm() < 0.1 * truth.norm()
    assert plan.density(16) < 0.4


def test_paro_finds_the_order_in_which_blocks_are_few():
    """A head that attends along frames at one place, and one within frames: each is a diagonal in its own order."""
    place, frame = torch.arange(TOKENS) % 128, torch.arange(TOKENS) // 128
    maps = torch.stack([(place[:, None] == place), (frame[:, None] == frame)]).float()
    maps = maps / maps.sum(-1, keepdim=True)
    order, visit = P.paro_calibrate(maps, GRID, density=0.25, block=64)
    plan = P.paro(order, visit, GRID, block=64)
    q, k, v = qkv()
    assert torch.equal(visit.sum((1, 2)), torch.tensor([16, 16]))
    source = plan.permutation.q_source[0].long()
    blocks = [plan.listed(8)[0, head].repeat_interleave(64, 0).repeat_interleave(64, 1) for head in range(2)]
    assert all((maps[h][source[h]][:, source[h]] > 0).logical_and(~blocks[h]).sum() == 0 for h in range(2))
    assert attend(q, k, v, plan).isfinite().all()


def test_flashblock_is_exact_at_the_first_step_and_when_queries_stay():
    q, k, v = qkv(96)
    outside = qkv(400, seed=5)[1:]
    whole = attend(q, torch.cat([k, outside[0]], 1), torch.cat([v, outside[1]], 1))
    cache = P.FlashBlock()
    for first in (True, False):
        out = cache.attend(3, q, (k, v), outside if first else (k * math.nan, v * math.nan), first=first)
        torch.testing.assert_close(out, whole, atol=2e-6, rtol=0)
    with pytest.raises(RuntimeError, match="layer 0 has kept nothing yet"):
        cache.attend(0, q, (k, v), outside, first=False)


def test_sparsed_is_full_at_first_and_then_keeps_its_pattern():
    q, k, v, _ = planted()
    cache = P.SparseD(skip=2, select=0.25, block=64)
    assert cache.plan(0, 0, q, k) is None
    assert cache.plan(0, 1, q, k) is None
    plan = cache.plan(0, 2, q, k)
    assert plan.density(TOKENS // 64) == 0.25
    assert error(plan, q, k, v) < 0.05
    assert cache.plan(0, 3, q * 0, k * 0) is plan
    assert cache.plan(1, 3, q, k) is not plan


def test_a_refreshed_planner_plans_at_every_nth_step():
    q, k, _, _ = planted()
    planner = P.refreshed(lambda q, k: P.proxy(q, k, groups=1, block=64), 3)
    plans = [planner(step, q, k) for step in range(6)]
    assert plans[0] is plans[1] is plans[2]
    assert plans[3] is plans[5] is not plans[0]


def test_agents_as_many_as_tokens_that_are_far_apart_give_each_its_value():
    tokens = 49
    q = torch.eye(64)[:tokens][None, :, None] * 40
    v = torch.randn((1, tokens, 1, 64), generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(P.agent(q, q, v, (7, 7)), v, atol=1e-4, rtol=0)


def test_agents_add_the_depthwise_convolution():
    q, k, v = qkv(64)
    weights = torch.zeros(64, 1, 3, 3)
    weights[:, 0, 1, 1] = 2.0
    plain = P.agent(q, k, v, (8, 8), pool=(2, 2))
    torch.testing.assert_close(P.agent(q, k, v, (8, 8), pool=(2, 2), dwc=weights), plain + 2 * v, atol=1e-6, rtol=0)


def test_kmeans_finds_separate_clusters_and_keeps_empty_ones():
    generator = torch.Generator().manual_seed(7)
    centres = torch.randn((1, 2, 4, 8), generator=generator) * 10
    truth = torch.arange(200) % 4
    x = centres[:, :, truth] + 0.1 * torch.randn((1, 2, 200, 8), generator=generator)
    labels, found = P.kmeans(x, 4, start=x[:, :, :4])
    assert torch.equal(labels, truth.expand(1, 2, -1))
    torch.testing.assert_close(found, centres, atol=0.1, rtol=0)
    far = torch.cat([x[:, :, :4], torch.full((1, 2, 1, 8), 1e3)], 2)
    assert torch.equal(P.kmeans(x, 5, start=far)[1][:, :, 4], far[:, :, 4])
