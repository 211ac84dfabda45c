"""Attention under a plan against the definition in float64: the reference, and the Triton kernel beside it.

Without a GPU the kernel runs in Triton's interpreter, at the same small sizes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from millstream.kernels import BlockPlan, attend, merge
from millstream.kernels.attention import BoxMask, KVSummary, Permutation, RowMask, causal_frames, window_mask
from millstream.kernels.attention.quantize import quantize_attention
from millstream.kernels.attention.sparse import operands, take_slots

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.filterwarnings("ignore:divide by zero"))]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def qkv(queries, keys, *, rows=1, heads=2, dim=64, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, queries, heads, dim), (rows, keys, heads, dim), (rows, keys, heads, dim)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def drawn(*shape, share=0.5, seed=9):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def naive(q, k, v, mask=None, bias=None):
    """softmax(q k^T + bias) v as it is written in the papers, in float64; empty rows are 0 and -inf."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2), scores.logsumexp(-1)


def moved(plan, device):
    """The plan, with every tensor in it, on another device."""

    def move(value):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, tuple):
            return tuple(move(item) for item in value)
        if isinstance(value, (BoxMask, RowMask, Permutation, KVSummary)):
            return type(value)(**{name: move(item) for name, item in vars(value).items()})
        return value

    return replace(plan, **{name: move(value) for name, value in vars(plan).items()})


def run(backend, q, k, v, plan, *, splits=0):
    """(out, lse) on the CPU, by the reference or the kernel."""
    if backend == "reference":
        return attend(q, k, v, plan, return_lse=True)
    if DEVICE == "cuda" and not splits:
        out, lse = attend(*(x.cuda() for x in (q, k, v)), moved(plan, "cuda"), return_lse=True)
        return out.cpu(), lse.cpu()
    return launch(q, k, v, plan, splits=splits)


def launch(q, k, v, plan, **options):
    from millstream.kernels.attention.launch import attend_blocks

    q, k, v, plan = q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), moved(plan, DEVICE)
    if plan.permutation is not None and plan.permutation.k_source is not None:
        k, v = (take_slots(x, plan.permutation.k_source) for x in (k, v))
    summary = plan.summary
    if plan.rest == "centroid" and summary is None:
        lengths = None if plan.lengths is None else plan.lengths[1]
        summary = KVSummary.of(k, v, plan.block[1], lengths=lengths, table=plan.table, first_order=plan.first_order)
    out, lse = attend_blocks(*operands(q, k, v, plan, summary, q.shape[-1] ** -0.5), **options)
    return out.cpu(), lse.cpu()


def assert_close(ours, truth, atol=5e-6):
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, atol=atol, rtol=1e-5)


def spread(blocks, block, queries, keys):
    """A mask over blocks as a mask over tokens."""
    mask = blocks.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return mask[..., :queries, :keys]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("queries", "keys"), [(63, 200), (130, 64)])
def test_all_blocks_listed_is_dense_attention(backend, queries, keys):
    q, k, v = qkv(queries, keys)
    plan = BlockPlan.dense(queries, keys, (64, 64))
    assert_close(run(backend, q, k, v, plan), naive(q, k, v))


@pytest.mark.parametrize("splits", [1, 3])
def test_splitting_the_keys_over_programs_changes_nothing(splits):
    q, k, v = qkv(70, 330)
    visit = drawn(1, 2, 2, 6)
    visit[0, 0, 1] = False
    truth = naive(q, k, v, spread(visit, (64, 64), 70, 330))
    assert_close(launch(q, k, v, BlockPlan.of(visit, (64, 64), 330), splits=splits), truth)


def test_reading_ahead_changes_nothing():
    from millstream.kernels.attention.launch import Config

    q, k, v = qkv(130, 300)
    bias = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(3))
    plan = BlockPlan.of(drawn(1, 2, 3, 5), (64, 64), 300, bias=bias)
    for tile_k in (32, 64):
        ahead, plain = (launch(q, k, v, plan, config=Config(64, tile_k, 4, 1, ahead=on)) for on in (True, False))
        assert torch.equal(ahead[0], plain[0])
        assert torch.equal(ahead[1], plain[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_each_row_and_head_with_biases_and_queries_that_see_nothing(backend):
    q, k, v = qkv(200, 300, rows=2)
    visit = drawn(2, 2, 4, 5)
    visit[0, 0, 1] = False
    bias = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(3))
    bias[1, 1, 0] = -math.inf
    mask = spread(visit, (64, 64), 200, 300)
    truth = naive(q, k, v, mask, bias.repeat_interleave(64, -1)[:, :, None, :300])
    out, lse = run(backend, q, k, v, BlockPlan.of(visit, (64, 64), 300, bias=bias))
    assert_close((out, lse), truth)
    assert (out[0, 64:128, 0] == 0).all()
    assert (lse[0, 0, 64:128] == -math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_per_pair_of_blocks(backend):
    q, k, v = qkv(128, 192)
    bias = torch.randn(1, 2, 2, 3, generator=torch.Generator().manual_seed(3))
    plan = BlockPlan.of(torch.ones(1, 1, 2, 3, dtype=torch.bool), (64, 64), 192, bias=bias)
    truth = naive(q, k, v, bias=spread(bias, (64, 64), 128, 192))
    assert_close(run(backend, q, k, v, plan), truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_frames_with_a_window_and_sinks(backend):
    q, k, v = qkv(130, 300)
    query_frames, key_frames = torch.arange(130) // 10 + 12, torch.arange(300) // 10
    mask = causal_frames(query_frames, key_frames, window=4, sinks=2)
    plan = BlockPlan.of_mask(mask, 130, 300, (64, 64))
    distance = query_frames[:, None] - key_frames
    seen = (distance >= 0) & ((distance < 4) | (key_frames < 2))
    assert_close(run(backend, q, k, v, plan), naive(q, k, v, seen))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("stride", "dilation", "causal"), [(1, 1, False), (2, (1, 2, 2), False), (1, 1, (True, False, False))]
)
def test_neighbourhoods_follow_the_rule_token_by_token(backend, stride, dilation, causal):
    grid, kernel = (4, 6, 8), (2, 3, 3)
    at = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij")).flatten(1)
    q, k, v = qkv(192, 192)
    plan = BlockPlan.of_mask(
        window_mask(at, grid, kernel, stride=stride, dilation=dilation, causal=causal), 192, 192, (64, 64)
    )  # fmt: skip
    rule = (grid, kernel, stride, dilation, causal)
    seen = torch.tensor([[neighbour(a, b, *rule) for b in at.T.tolist()] for a in at.T.tolist()])
    assert seen.any(-1).all()
    assert_close(run(backend, q, k, v, plan), naive(q, k, v, seen))


def neighbour(q, k, grid, kernel, stride, dilation, causal):
    """NATTEN's rule for one pair, axis by axis, in plain integers."""
    for axis in range(3):
        d = dilation if isinstance(dilation, int) else dilation[axis]
        is_causal = causal if isinstance(causal, bool) else causal[axis]
        size = kernel[axis]
        if q[axis] % d != k[axis] % d:
            return False
        n = len(range(q[axis] % d, grid[axis], d))
        a, b = q[axis] // d, k[axis] // d
        if is_causal:
            leader = min(a // stride * stride + stride - 1, n - 1)
            visible = b <= a and leader - b < size
        else:
            leader = min(a // stride * stride + stride // 2, n - 1)
            centre = max(size // 2, min(leader, n - 1 - (size // 2 + size % 2 - 1)))
            visible = centre - size // 2 <= b <= centre + size // 2 + size % 2 - 1
        if not visible:
            return False
    return True


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_row_bits_choose_key_blocks_per_query(backend, causal):
    q, k, v = qkv(64, 34 * 64)
    chosen = drawn(1, 2, 64, 34) & drawn(1, 2, 1, 34, share=0.15, seed=4)
    chosen[..., 31] = True  # the last bit of a word, which is a sign
    at, key_at = torch.arange(64) + 2090, torch.arange(34 * 64)
    mask = RowMask.of(chosen, causal_frames(at, key_at) if causal else None)
    seen = chosen.repeat_interleave(64, -1)
    seen = seen & (key_at <= at[:, None]) if causal else seen
    assert_close(run(backend, q, k, v, BlockPlan.of_mask(mask, 64, 34 * 64, (64, 64))), naive(q, k, v, seen))


def ragged():
    """A plan over a table of pages, whose blocks hold 64, 10, 0, 64 and 30 keys, and 64, 5 queries."""
    table = torch.tensor([[3, 1, 4, 0, 2]], dtype=torch.int32)
    lengths = torch.tensor([[[64, 5]]], dtype=torch.int32), torch.tensor([[[64, 10, 0, 64, 30]]], dtype=torch.int32)
    visit = torch.tensor([[[[1, 1, 1, 0, 1], [0, 0, 1, 0, 0]]]], dtype=torch.bool)
    return BlockPlan.of(visit, (64, 64), 320, lengths=lengths, table=table), visit


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_with_ragged_blocks_read_nothing_but_valid_keys(backend):
    plan, visit = ragged()
    q, k, v = qkv(100, 320, rows=2)
    valid = torch.zeros(320, dtype=torch.bool)
    for block, place in enumerate(plan.table[0].tolist()):
        valid[place * 64 : place * 64 + int(plan.lengths[1][0, 0, block])] = True
    order = torch.cat([torch.arange(64) + 64 * place for place in plan.table[0].tolist()])
    seen = spread(visit, (64, 64), 100, 320) & valid[order]
    seen = seen & (torch.arange(100) < 69)[:, None]
    truth = naive(q, k[:, order], v[:, order], seen)
    poisoned = [x.masked_fill(~valid[None, :, None, None], math.nan) for x in (k, v)]
    out, lse = run(backend, q, *poisoned, plan)
    assert_close((out, lse), truth)
    assert (out[:, 64:] == 0).all()  # the second block lists an empty key block, and holds 5 queries


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_listed_block_without_valid_keys_gives_nothing(backend):
    plan, _ = ragged()
    empty = plan.lengths[1].clone().zero_()
    listed = replace(plan, lengths=(plan.lengths[0], empty), n_full=plan.n_full * 0, n_masked=plan.n_masked * 0 + 5,
                     indices=torch.arange(5, dtype=torch.int32).expand(1, 1, 2, 5).contiguous())  # fmt: skip
    q, k, v = qkv(100, 320)
    out, lse = run(backend, q, k * math.nan, v * math.nan, listed)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_turning_a_ring_changes_nothing(backend):
    q, k, v = qkv(64, 256)
    visit = drawn(1, 2, 1, 4, share=0.7)
    whole = run(backend, q, k, v, BlockPlan.of(visit, (64, 64), 256))
    turned = [x.roll(128, dims=1) for x in (k, v)]
    table = torch.tensor([[2, 3, 0, 1]], dtype=torch.int32)
    again = run(backend, q, *turned, BlockPlan.of(visit, (64, 64), 256, table=table))
    assert torch.equal(again[0], whole[0])
    assert torch.equal(again[1], whole[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_head", [False, True])
def test_a_permutation_and_its_inverse_are_nothing(backend, per_head):
    q, k, v = qkv(150, 150, rows=2)
    generator = torch.Generator().manual_seed(5)
    source = torch.full((1, 2 if per_head else 1, 192), -1, dtype=torch.int32)
    for head in range(source.shape[1]):
        order = torch.randperm(150, generator=generator).to(torch.int32)
        source[0, head, :64], source[0, head, 64:100], source[0, head, 128:178] = order[:64], order[64:100], order[100:]
    lengths = torch.tensor([[[64, 36, 50]]], dtype=torch.int32)
    plan = BlockPlan.of(
        torch.ones(1, 1, 3, 3, dtype=torch.bool), (64, 64), 192,
        lengths=(lengths, lengths), permutation=Permutation(source, source),
    )  # fmt: skip
    assert_close(run(backend, q, k, v, plan), naive(q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_centroids_are_exact_when_the_keys_of_a_block_are_equal(backend):
    q, k, v = qkv(130, 300)
    k = k[:, ::64].repeat_interleave(64, 1)[:, :300]
    plan = BlockPlan.of(drawn(1, 2, 3, 5, share=0.3), (64, 64), 300, rest="centroid")
    assert_close(run(backend, q, k, v, plan), naive(q, k, v), atol=2e-5)


@pytest.mark.parametrize("first_order", [False, True])
def test_the_kernel_approximates_as_the_reference_does(first_order):
    q, k, v = qkv(130, 300, rows=2)
    bias = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(3))
    plan = BlockPlan.of(
        drawn(1, 2, 3, 5, share=0.3), (64, 64), 300, rest="centroid", first_order=first_order, bias=bias
    )  # fmt: skip
    theirs = [x.double() for x in run("reference", q, k, v, plan)]
    assert_close(run("triton", q, k, v, plan), theirs, atol=2e-5)
    assert_close(launch(q, k, v, plan, splits=2), theirs, atol=2e-5)


def test_the_first_order_term_brings_the_approximation_nearer():
    """Keys of one spread, and values that follow them: what the shared slope is made for."""
    generator = torch.Generator().manual_seed(6)
    q, centres = (torch.randn(1, n, 1, 32, generator=generator) * 0.5 for n in (64, 8))
    inside = torch.randn(1, 512, 1, 32, generator=generator) * 0.5
    k = centres.repeat_interleave(64, 1) + inside
    v = torch.randn(1, 8, 1, 32, generator=generator).repeat_interleave(64, 1) + 2 * inside
    truth = naive(q, k, v)[0]
    none = torch.zeros(1, 1, 1, 8, dtype=torch.bool)
    errors = [
        (attend(q, k, v, BlockPlan.of(none, (64, 64), 512, rest="centroid", first_order=first)).double() - truth).norm()
        for first in (False, True)
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(("how", "bound"), [("int8", 0.02), ("fp8", 0.1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_eight_bits_stay_near(how, bound, backend):
    q, k, v = qkv(130, 300)
    k = k + 3.0  # keys share a large mean, as they do in trained models: INT8 takes it off first
    plan = BlockPlan.dense(130, 300, (64, 64))
    truth, lse_truth = naive(q, k, v)
    if backend == "reference":
        out, lse = attend(q, k, v, plan, quantize=how, return_lse=True)
        assert (lse - lse_truth).abs().max() < 0.1
    else:
        eight = quantize_attention(*(x.to(DEVICE) for x in (q, k, v)), plan.block, how)
        from millstream.kernels.attention.launch import attend_blocks

        given = operands(eight.q, eight.k, eight.v, moved(plan, DEVICE), None, 64**-0.5, eight, torch.float32)
        out, lse = (x.cpu() for x in attend_blocks(*given))
        shift = 64**-0.5 * torch.einsum("blhd,bhd->bhl", q, eight.mean_key.cpu())
        assert (lse + shift - lse_truth).abs().max() < 0.1
    assert (out - truth).norm() / truth.norm() < bound


def test_eight_bits_of_zeros_are_zeros():
    q, k, v = (torch.zeros(1, 64, 1, 64) for _ in range(3))
    for how in ("int8", "fp8"):
        assert (attend(q, k, v, BlockPlan.dense(64, 64, (64, 64)), quantize=how) == 0).all()


def test_merging_plans_over_disjoint_blocks_is_one_plan_over_all():
    q, k, v = qkv(70, 320)
    visit = drawn(1, 2, 2, 5)
    visit[0, 1] = False  # one head has everything in the second part
    parts = [attend(q, k, v, BlockPlan.of(part, (64, 64), 320), return_lse=True) for part in (visit, ~visit)]
    out, lse = merge(parts)
    assert_close((out, lse), naive(q, k, v))
    bias = torch.full((1, 1, 5), 0.7)
    shifted = attend(q, k, v, BlockPlan.of(visit, (64, 64), 320, bias=bias), return_lse=True)
    assert_close(merge([(parts[0][0], parts[0][1] + 0.7), parts[1]]), [x.double() for x in merge([shifted, parts[1]])])


def test_the_merging_kernel_does_what_its_reference_does():
    from millstream.kernels.attention.merge_triton import merge_pair
    from millstream.kernels.attention.reference import merge_reference

    q, k, v = qkv(70, 320, rows=2)
    visit = drawn(2, 2, 2, 5)
    visit[0, 0] = False
    parts = [attend(q, k, v, BlockPlan.of(part, (64, 64), 320), return_lse=True) for part in (visit, visit & False)]
    parts[1][1][:, 1] = 0.5  # one head's second part counts, with an output of zeros
    out, lse = merge_pair(*(x.to(DEVICE) for part in parts for x in part))
    assert_close((out.cpu(), lse.cpu()), [x.double() for x in merge_reference(parts)])
    assert (out[0, :, 0] == 0).all()


def test_a_gpu_that_cannot_run_the_kernel_is_told_why_once(monkeypatch):
    from millstream.kernels.attention import sparse

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    why = sparse._refusal(torch.device("cuda"), torch.float16, 64, (64, 64))
    assert why == "compute capability 8.0 or newer, got 7.5"
    monkeypatch.setattr(sparse, "runs_triton", lambda q: True)
    monkeypatch.setattr(sparse, "_refusal", lambda *_: why)
    sparse._say_once.cache_clear()
    q, k, v = qkv(64, 64)
    plan = BlockPlan.dense(64, 64, (64, 64))

    def steps():
        for _ in range(3):
            assert_close(attend(q, k, v, plan, return_lse=True), naive(q, k, v))

    with pytest.warns(UserWarning, match="needs compute capability 8.0 or newer, got 7.5; using the reference") as seen:
        steps()
    assert len([w for w in seen if "compute capability" in str(w.message)]) == 1


def test_gradients_pass_through_a_plan():
    visit = drawn(1, 2, 2, 3)
    ours, theirs = ([x.requires_grad_() for x in qkv(128, 192, dtype=torch.float64)] for _ in range(2))
    out, lse = attend(*ours, BlockPlan.of(visit, (64, 64), 192), return_lse=True)
    seen = spread(visit, (64, 64), 128, 192)
    (out.square().sum() + lse.masked_fill(lse == -math.inf, 0.0).sum()).backward()
    rows = seen.any(-1)
    expected, expected_lse = naive(*theirs, seen | ~rows[..., None])
    kept = rows.transpose(1, 2)[..., None]
    (torch.where(kept, expected, 0.0).square().sum() + torch.where(rows, expected_lse, 0.0).sum()).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=0)


@pytest.mark.parametrize("keys", [448, 430])
@pytest.mark.parametrize("count", [0, 3, 99])
def test_the_best_blocks_are_listed_as_any_choice_is(keys, count):
    scores = torch.rand((2, 3, 5, 7), generator=torch.Generator().manual_seed(2))
    plan = BlockPlan.best(scores, count, (64, 64), keys)
    count = min(max(1, count), 7)
    chosen = scores >= scores.sort(dim=-1, descending=True).values[..., count - 1 : count]
    truth = BlockPlan.of(chosen, (64, 64), keys, width=count)
    for name in ("indices", "n_full", "n_masked"):
        assert torch.equal(getattr(plan, name), getattr(truth, name)), name


def test_lists_are_cut_at_the_width_and_full_blocks_stay():
    visit = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    full = torch.tensor([[[[False, True, False, True]]]])
    plan = BlockPlan.of(visit, (64, 64), 256, full=full, width=3)
    assert plan.indices[0, 0, 0].tolist() == [1, 3, 0]
    assert (int(plan.n_full), int(plan.n_masked)) == (2, 1)
    assert plan.listed(4)[0, 0, 0].tolist() == [True, True, False, True]
    assert plan.density(4) == 0.75


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 0.0}, "scale above 0"),
        ({"quantize": "int4"}, "'fp8' or 'int8', got 'int4'"),
        ({"mask": torch.ones(64, 64, dtype=torch.bool)}, "put the mask into the plan"),
        ({"plan": BlockPlan.dense(200, 64, (64, 64))}, "4 query blocks of 64, but 64 queries make 1"),
        ({"plan": BlockPlan.of(torch.ones(1, 3, 1, 1, dtype=torch.bool), (64, 64), 64)}, "for 3 heads, q has 2"),
        ({"plan": BlockPlan.dense(64, 200, (64, 64))}, "4 key blocks of 64, but 64 keys make 1"),
        ({"plan": None, "quantize": "fp8"}, "needs a plan"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(change, message):
    q, k, v = qkv(64, 64)
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, **{"plan": BlockPlan.dense(64, 64, (64, 64)), **change})
