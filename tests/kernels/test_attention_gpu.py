"""The attention kernel on a GPU, at full size: exactness, odd lengths, poisoned memory, graphs, compilation."""

from __future__ import annotations

import math

import pytest
import torch

from millstream.kernels import BlockPlan, attend, merge
from millstream.kernels import planners as P
from millstream.kernels.attention import BoxMask, KVSummary, RowMask, causal_frames
from millstream.kernels.attention.sparse import operands
from millstream.kernels.attention.sparse_reference import attend_plan_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GRID = (21, 30, 52)  # Wan 2.1 at 480x832: 32,760 tokens


def qkv(queries, keys=None, *, rows=1, heads=4, dim=128, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    keys = queries if keys is None else keys
    shapes = [(rows, queries, heads, dim), (rows, keys, heads, dim), (rows, keys, heads, dim)]
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]


def naive(q, k, v, dtype=torch.float64):
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.double().logsumexp(-1)


def drawn(*shape, share=0.5):
    return torch.rand(shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda") < share


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tokens", [63, 1000, 1560])
def test_all_blocks_are_as_good_as_plain_attention_in_the_same_type(tokens, dim, dtype):
    """FlashAttention's rule: at most twice the error of the plain formula, and a little."""
    q, k, v = qkv(tokens, dim=dim, dtype=dtype)
    truth, lse_truth = naive(q, k, v)
    bound = 2 * (naive(q, k, v, dtype)[0].double() - truth).abs().max() + (1e-3 if dtype != torch.float32 else 1e-5)
    for block in ((128, 128), (64, 64), (128, 64)):
        out, lse = attend(q, k, v, BlockPlan.dense(tokens, tokens, block, "cuda"), return_lse=True)
        assert out.dtype == dtype
        assert (out.double() - truth).abs().max() <= bound
        assert (lse.double() - lse_truth).abs().max() < 2e-3


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_full_size_agrees_with_float64_on_sampled_queries(share):
    tokens = math.prod(GRID)
    q, k, v = qkv(tokens)
    visit = drawn(1, 4, 256, 256, share=share)
    out, lse = attend(q, k, v, BlockPlan.of(visit, (128, 128), tokens), return_lse=True)
    rows = torch.linspace(0, tokens - 1, 256, device="cuda").long()
    for head in range(4):
        scores = q[0, rows, head].double() @ k[0, :, head].double().T * 128**-0.5
        seen = visit[0, head, rows // 128].repeat_interleave(128, -1)[:, :tokens]
        scores = scores.masked_fill(~seen, -math.inf)
        torch.testing.assert_close(
            out[0, rows, head].double(), scores.softmax(-1) @ v[0, :, head].double(), atol=4e-3, rtol=0
        )
        torch.testing.assert_close(lse[0, head, rows].double(), scores.logsumexp(-1), atol=1e-3, rtol=0)


def cases():
    """name: (queries, keys, plan) with every feature of the kernel, alone and together."""
    at, key_at = torch.arange(1560, device="cuda"), torch.arange(3000, device="cuda")
    causal = causal_frames(at + 1440, key_at, window=700, sinks=100)
    rows = RowMask.of(drawn(1, 4, 1560, 47, share=0.3), causal_frames(at + 1440, key_at))
    visit = drawn(1, 4, 13, 47)
    table = torch.randperm(47, generator=torch.Generator("cuda").manual_seed(2), device="cuda")[None].to(torch.int32)
    lengths = (
        torch.full((1, 1, 13), 120, dtype=torch.int32, device="cuda"),
        torch.randint(0, 65, (1, 1, 47), generator=torch.Generator("cuda").manual_seed(3), device="cuda").to(
            torch.int32
        ),
    )
    bias = torch.randn((1, 4, 47), generator=torch.Generator("cuda").manual_seed(4), device="cuda")
    block = (128, 64)
    return {
        "some blocks": (1560, 3000, BlockPlan.of(visit, block, 3000)),
        "bias": (1560, 3000, BlockPlan.of(visit, block, 3000, bias=bias)),
        "causal": (1560, 3000, BlockPlan.of_mask(causal, 1560, 3000, block)),
        "rows": (1560, 3000, BlockPlan.of_mask(rows, 1560, 3000, block)),
        "pages": (1560, 3008, BlockPlan.of(visit, block, 3008, table=table, lengths=lengths, bias=bias)),
        "centroid": (1560, 3000, BlockPlan.of(visit, block, 3000, rest="centroid", bias=bias)),
        "first order": (1560, 3000, BlockPlan.of(visit, block, 3000, rest="centroid", first_order=True)),
        "pages and centroid": (
            1560, 3008, BlockPlan.of(visit, block, 3008, table=table, lengths=lengths, rest="centroid")
        ),
        "blocks of 384": (1560, 3000, BlockPlan.of(drawn(1, 4, 5, 8), (384, 384), 3000)),
        "window": (2080, 2080, P.window((4, 20, 26), (3, 7, 7), device="cuda")),
        "dilated window": (2080, 2080, P.window((4, 20, 26), (2, 5, 5), dilation=(2, 2, 3), device="cuda")),
        "temporal": (2080, 2080, P.temporal((4, 20, 26), device="cuda")),
    }  # fmt: skip


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "name",
    ["some blocks", "bias", "causal", "rows", "pages", "centroid", "first order", "pages and centroid", "blocks of 384",
     "window", "dilated window", "temporal"],
)  # fmt: skip
def test_every_feature_agrees_with_the_reference(name, dim):
    queries, keys, plan = cases()[name]
    q, k, v = qkv(queries, keys, rows=2, dim=dim)
    if "pages" in name:  # the memory of a ring that was never written
        valid = torch.zeros(keys, dtype=torch.bool, device="cuda")
        for block, place in enumerate(plan.table[0].tolist()):
            valid[place * 64 : place * 64 + int(plan.lengths[1][0, 0, block])] = True
        k, v = (x.masked_fill(~valid[None, :, None, None], math.nan) for x in (k, v))
    out, lse = attend(q, k, v, plan, return_lse=True)
    truth, lse_truth = reference(q, k, v, plan)
    torch.testing.assert_close(out.float(), truth.float(), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, lse_truth, atol=1e-2, rtol=1e-3)
    assert (out.float() - truth.float()).norm() < 0.01 * truth.float().norm()


def reference(q, k, v, plan):
    from millstream.kernels.attention.sparse import take_slots

    if plan.permutation is not None and plan.permutation.k_source is not None:
        k, v = (take_slots(x, plan.permutation.k_source) for x in (k, v))
    summary = None
    if plan.rest == "centroid":
        lengths = None if plan.lengths is None else plan.lengths[1]
        summary = KVSummary.of(k, v, plan.block[1], lengths=lengths, table=plan.table, first_order=plan.first_order)
    return attend_plan_reference(q, k, v, plan, summary, q.shape[-1] ** -0.5)


@pytest.mark.parametrize("splits", [2, 5])
def test_few_queries_are_split_over_programs(splits):
    from millstream.kernels.attention.launch import attend_blocks

    q, k, v = qkv(200, 5000)
    plan = BlockPlan.dense(200, 5000, (128, 64), "cuda")
    truth, lse_truth = naive(q, k, v)
    for out, lse in (
        attend_blocks(*operands(q, k, v, plan, None, 128**-0.5), splits=splits),
        attend(q, k, v, plan, return_lse=True),
    ):
        assert (out.double() - truth).abs().max() < 4e-3
        assert (lse.double() - lse_truth).abs().max() < 1e-3


@pytest.mark.parametrize(("how", "bound"), [("fp8", 0.08), ("int8", 0.03)])
@pytest.mark.parametrize("dim", [64, 128])
def test_eight_bits_stay_near(how, bound, dim):
    if how == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    q, k, v = qkv(1560, 3000, dim=dim)
    k = k + 2.0
    truth, lse_truth = naive(q, k, v)
    out, lse = attend(q, k, v, BlockPlan.dense(1560, 3000, (128, 128), "cuda"), quantize=how, return_lse=True)
    assert (out.double() - truth).norm() / truth.norm() < bound
    assert (lse.double() - lse_truth).abs().max() < 0.1


def test_strided_views_are_read_where_they_lie():
    joint = torch.randn((2, 1560, 3, 4, 128), device="cuda", dtype=torch.bfloat16)
    q, k, v = joint.unbind(2)
    plan = BlockPlan.dense(1560, 1560, (128, 64), "cuda")
    assert torch.equal(attend(q, k, v, plan), attend(*(x.contiguous() for x in (q, k, v)), plan))
    store = torch.full((2, 4000, 4, 128), math.nan, device="cuda", dtype=torch.bfloat16)  # a cache that is not full
    store[:, :1560] = k
    assert torch.equal(attend(q, store[:, :1560], v, plan), attend(q, k.contiguous(), v, plan))


def test_a_graph_replays_what_runs_eagerly_and_follows_the_plan():
    q, k, v = qkv(1560)
    plan = BlockPlan.of(drawn(1, 4, 13, 13), (128, 128), 1560)
    attend(q, k, v, plan)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v, plan)
    other = BlockPlan.of(~drawn(1, 4, 13, 13), (128, 128), 1560)
    for name in ("indices", "n_full", "n_masked"):
        getattr(plan, name).copy_(getattr(other, name))
    q.copy_(q.flip(1))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, attend(q, k, v, other))


def test_other_lengths_and_plans_compile_nothing_new():
    from millstream.kernels.attention.triton import attend_kernel

    def variants():
        return sum(len(cache[0]) for cache in attend_kernel.device_caches.values())

    def go(tokens, share):
        q, k, v = qkv(tokens)
        blocks = -(-tokens // 128)
        attend(q, k, v, BlockPlan.of(drawn(1, 4, blocks, blocks, share=share), (128, 128), tokens))

    go(20000, 0.5)
    before = variants()
    for tokens in (20001, 23456, 32760):
        go(tokens, 0.2)
    assert variants() == before


def test_the_operator_is_what_compilers_expect():
    from millstream.kernels.attention.launch import operator

    q, k, v = qkv(300)
    plan = BlockPlan.dense(300, 300, (128, 128), "cuda")
    torch.library.opcheck(
        operator, operands(q, k, v, plan, None, 128**-0.5), test_utils=("test_schema", "test_faketensor")
    )
    compiled = torch.compile(lambda q, k, v: attend(q * 2, k, v, plan) + 1)
    torch.testing.assert_close(compiled(q, k, v), attend(q * 2, k, v, plan) + 1)


def test_reading_past_the_end_of_a_plan_or_of_memory_finds_nothing():
    """Lists end in rubbish, outputs begin as NaN, keys end where their memory ends."""
    q, k, v = qkv(1000)
    plan = BlockPlan.of(drawn(1, 4, 8, 8), (128, 128), 1000)
    truth = attend(q, k, v, plan)
    used = torch.arange(8, device="cuda") < (plan.n_full + plan.n_masked)[..., None]
    plan.indices.copy_(torch.where(used, plan.indices, 7))
    poison = [torch.full_like(q, math.nan) for _ in range(4)]
    del poison  # the allocator hands this memory out again
    out = attend(q, k, v, plan)
    assert out.isfinite().all()
    assert torch.equal(out, truth)


def test_merging_is_one_softmax_and_keeps_empty_parts_out():
    q, k, v = qkv(1560, 4000)
    parts = [attend(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in ((0, 1000), (1000, 1000), (1000, 4000))]
    out, lse = merge(parts)
    truth, lse_truth = naive(q, k, v)
    assert (out.double() - truth).abs().max() < 4e-3
    assert (lse.double() - lse_truth).abs().max() < 1e-3


def test_memory_does_not_grow_with_the_keys():
    def extra(keys):
        q, k, v = qkv(512, keys)
        plan = BlockPlan.dense(512, keys, (128, 128), "cuda")
        attend(q, k, v, plan)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        attend(q, k, v, plan)
        return torch.cuda.max_memory_allocated() - before

    assert extra(32768) <= extra(4096) + 1_000_000


def test_planners_of_the_whole_grid_run_at_full_size():
    q, k, v = qkv(math.prod(GRID), heads=2)
    tiling = P.tile_grid(GRID, device="cuda")
    plans = {
        "window": P.window(GRID, (9, 13, 21), device="cuda"),
        "sliding tile": P.sliding_tile(GRID, (3, 3, 3), device="cuda"),
        "radial": P.radial(21, 1560, device="cuda"),
        "vmoba": P.vmoba(q, k, tiling),
        "sparge": P.sparge(q, k),
        "pisa": P.pisa(q, k, v, first_order=True),
        "svg_ear": P.svg_ear(q, k, v),
        "svg1": P.svg1(q, k, v, GRID),
        "svg2": P.svg2(q, k)[0],
        "pbs": P.pbs(q, k),
        "moba": P.moba(q, k, moba_topk=32),
    }
    for name, plan in plans.items():
        out, lse = attend(q, k, v, plan, return_lse=True)
        assert out.isfinite().all(), name
        assert lse.isfinite().all(), name


def test_masks_are_boxes_of_any_number_of_axes():
    at = torch.randint(0, 5, (5, 700), generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(torch.int32)
    mask = BoxMask((at - 2)[None, None], (at + 2)[None, None], at[None, None])
    q, k, v = qkv(700)
    plan = BlockPlan.of_mask(mask, 700, 700, (128, 64))
    seen = ((at[:, :, None] - at[:, None]).abs() <= 2).all(0)
    scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).double() * 128**-0.5
    truth = (scores.masked_fill(~seen, -math.inf).softmax(-1) @ v.transpose(1, 2).double()).transpose(1, 2)
    assert (attend(q, k, v, plan).double() - truth).norm() < 0.01 * truth.norm()
