"""Attention against the definition in float64, and partial results against the whole."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from millstream.kernels import attend, merge
from millstream.kernels.attention.reference import attend_reference

LENGTHS = [(1, 1), (5, 7), (63, 1000), (63, 1560), (48, 2049)]


def qkv(queries, keys, *, rows=2, heads=3, dim=16, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, queries, heads, dim), (rows, keys, heads, dim), (rows, keys, heads, dim)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def naive(q, k, v, mask=None, scale=None):
    """softmax(q k^T) v as it is written in the paper, in float64; empty rows are 0 and -inf."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2), scores.logsumexp(-1)


def assert_close(ours, truth, atol=2e-6):
    (out, lse), (out_truth, lse_truth) = ours, truth
    torch.testing.assert_close(out.double(), out_truth, atol=atol, rtol=0)
    torch.testing.assert_close(lse.double(), lse_truth, atol=1e-5, rtol=1e-6)


def masks(queries, keys, rows=2, heads=3):
    """Every way a mask may be broadcast, each with rows that see nothing where it can have them."""
    generator = torch.Generator().manual_seed(1)
    for shape in [(rows, heads, queries, keys), (rows, 1, 1, keys), (1, heads, queries, 1), (queries, keys), (keys,)]:
        mask = torch.rand(shape, generator=generator) < 0.5
        if mask.ndim > 1 and mask.shape[-2] > 1:
            mask[..., 1, :] = False
        yield mask
    yield torch.zeros((), dtype=torch.bool)


@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
def test_it_is_the_softmax_of_the_definition(queries, keys):
    q, k, v = qkv(queries, keys)
    for scale in (None, 0.3):
        truth = naive(q, k, v, scale=scale)
        assert_close(attend(q, k, v, scale=scale, return_lse=True), truth)
        torch.testing.assert_close(attend(q, k, v, scale=scale).double(), truth[0], atol=2e-6, rtol=0)


@pytest.mark.parametrize(("queries", "keys"), [(5, 7), (63, 1000)])
def test_masks_of_every_shape_and_queries_that_see_nothing(queries, keys):
    q, k, v = qkv(queries, keys)
    for mask in masks(queries, keys):
        truth = naive(q, k, v, mask)
        assert_close(attend(q, k, v, mask=mask, return_lse=True), truth)
        torch.testing.assert_close(attend(q, k, v, mask=mask).double(), truth[0], atol=2e-6, rtol=0)
        assert_close(attend_reference(q, k, v, mask.expand(2, 3, queries, keys), 0.25), truth)


def test_a_query_that_sees_nothing_gets_zero_and_minus_infinity():
    q, k, v = qkv(4, 6)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[2] = False
    out, lse = attend(q, k, v, mask=mask, return_lse=True)
    assert (out[:, 2] == 0).all()
    assert (lse[:, :, 2] == -math.inf).all()
    assert lse[:, :, [0, 1, 3]].isfinite().all()
    assert (attend(q, k, v, mask=mask)[:, 2] == 0).all()


def test_no_keys_at_all():
    q, k, v = qkv(4, 0)
    out, lse = attend(q, k, v, return_lse=True)
    assert out.shape == q.shape
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    assert (attend(q, k, v) == 0).all()


@pytest.mark.parametrize("with_lse", [False, True])
def test_gradients_are_those_of_the_definition_even_past_empty_rows(with_lse):
    mask = torch.rand(5, 9, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[3] = False
    ours, theirs = ([x.requires_grad_() for x in qkv(5, 9, dtype=torch.float64)] for _ in range(2))
    rows = [0, 1, 2, 4]
    if with_lse:
        out, lse = attend(*ours, mask=mask, return_lse=True)
        ((out**2).sum() + lse[:, :, rows].sum()).backward()
    else:
        (attend(*ours, mask=mask) ** 2).sum().backward()
    out, lse = naive(theirs[0][:, rows], *theirs[1:], mask[rows])
    ((out**2).sum() + (lse.sum() if with_lse else 0)).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6 if with_lse else 1e-9, rtol=0)


def test_a_block_mask_hides_what_the_same_bool_mask_hides():
    def near(row, head, query, key):
        return (query // 6 >= key // 6) & (query // 6 - key // 6 < 3)

    q, k, v = qkv(60, 60)
    position = torch.arange(60)
    mask = near(0, 0, position[:, None], position)
    blocks = create_block_mask(near, None, None, 60, 60, device="cpu")
    torch.testing.assert_close(attend(q, k, v, mask=blocks), attend(q, k, v, mask=mask), atol=2e-6, rtol=0)
    with pytest.raises(TypeError, match="return_lse needs a bool mask"):
        attend(q, k, v, mask=blocks, return_lse=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_plain_half_precision(dtype):
    """FlashAttention's rule: at most twice the error that the plain formula makes in the same type."""
    q, k, v = qkv(63, 1000, dim=64, dtype=dtype)
    truth, lse_truth = naive(q, k, v)
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * 64**-0.5
    plain = (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)
    bound = 2 * (plain.double() - truth).abs().max() + 1e-4
    out, lse = attend(q, k, v, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert (out.double() - truth).abs().max() <= bound
    assert (attend(q, k, v).double() - truth).abs().max() <= bound
    assert (lse.double() - lse_truth).abs().max() < 1e-3


def test_unusual_memory_layouts_change_nothing():
    q, k, v = qkv(5, 7)
    truth = naive(q, k, v)
    joined = torch.cat([k, v], dim=-1)
    assert_close(attend(q, joined[..., :16], joined[..., 16:], return_lse=True), truth)
    across = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    assert across[0].stride(-1) != 1
    assert_close(attend(*across, return_lse=True), truth)
    torch.testing.assert_close(attend(*across).double(), truth[0], atol=2e-6, rtol=0)


def test_no_copy_is_made_on_the_way():
    """The result lies in memory as [B, L, H, D], so that joining the heads is a view."""
    out = attend(*qkv(63, 100))
    assert out.flatten(2).data_ptr() == out.data_ptr()


@pytest.mark.parametrize(
    "attention", [lambda *x: attend(*x, return_lse=True), lambda *x: attend_reference(*x, None, 0.25)]
)
def test_scores_whose_exponential_overflows(attention):
    q, k, v = qkv(2, 5000, heads=1)
    q, k = q * 30, k * 30
    truth, lse_truth = naive(q, k, v)
    assert lse_truth.min() > 1000
    out, lse = attention(q, k, v)
    # A score of some thousands is known to 1e-4 or so in float32, and its exponential to as much, relatively.
    torch.testing.assert_close(out.double(), truth, atol=5e-3, rtol=0)
    torch.testing.assert_close(lse.double(), lse_truth, atol=0, rtol=1e-6)


@pytest.mark.parametrize("cuts", [[500], [1, 64, 999], [0, 300, 300]])
def test_merging_parts_is_attending_to_everything(cuts):
    q, k, v = qkv(63, 1000)
    edges = [0, *cuts, 1000]
    parts = [attend(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in pairwise(edges)]
    assert_close(merge(parts), naive(q, k, v))
    assert_close(merge(parts[::-1]), naive(q, k, v))


def test_merging_masked_parts_with_rows_that_are_empty_in_one_or_in_all():
    q, k, v = qkv(6, 40)
    mask = torch.rand(6, 40, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[1, :20] = False
    mask[2, 20:] = False
    mask[3] = False
    parts = [attend(q, k[:, s], v[:, s], mask=mask[:, s], return_lse=True) for s in (slice(0, 20), slice(20, 40))]
    assert_close(merge(parts), naive(q, k, v, mask))


def test_an_empty_part_changes_nothing():
    q, k, v = qkv(5, 9)
    whole = attend(q, k, v, return_lse=True)
    empty = attend(q, k[:, :0], v[:, :0], return_lse=True)
    for parts in ([whole], [whole, empty], [empty, whole], [empty, whole, empty]):
        out, lse = merge(parts)
        torch.testing.assert_close(out, whole[0])
        torch.testing.assert_close(lse, whole[1])
    out, lse = merge([empty, empty])
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_a_uniform_bias_on_some_keys_is_added_to_their_log_sum_exp():
    q, k, v = qkv(5, 9)
    bias = torch.zeros(9, dtype=torch.float64)
    bias[:4] = 1.7
    scores = torch.einsum("blhd,bkhd->bhlk", q.double(), k.double()) / 4 + bias
    truth = torch.einsum("bhlk,bkhd->blhd", scores.softmax(-1), v.double()), scores.logsumexp(-1)
    out, lse = attend(q, k[:, :4], v[:, :4], return_lse=True)
    assert_close(merge([(out, lse + 1.7), attend(q, k[:, 4:], v[:, 4:], return_lse=True)]), truth)


def test_merging_has_gradients():
    q, k, v = (x.requires_grad_() for x in qkv(3, 8, dtype=torch.float64))
    parts = [attend(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 3), slice(3, 8))]
    (merge(parts)[0] ** 2).sum().backward()
    q2, k2, v2 = (x.detach().requires_grad_() for x in (q, k, v))
    (naive(q2, k2, v2)[0] ** 2).sum().backward()
    for a, b in ((q, q2), (k, k2), (v, v2)):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=0)


def test_what_does_not_fit_is_refused_with_what_was_seen_and_wanted():
    q, k, v = qkv(4, 6)
    with pytest.raises(ValueError, match=r"k, v \[B, Lk, H, D\].*got q \[2, 4, 3, 16\], k \[2, 6, 2, 16\]"):
        attend(q, k[:, :, :2], v[:, :, :2])
    with pytest.raises(ValueError, match="got q"):
        attend(q, k, v[:, :5])
    with pytest.raises(TypeError, match=r"share one dtype, got torch.float32, torch.bfloat16"):
        attend(q, k.bfloat16(), v)
    with pytest.raises(TypeError, match=r"mask must be bool .* got torch.float32"):
        attend(q, k, v, mask=torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 6\], got \[4, 5\]"):
        attend(q, k, v, mask=torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one"):
        merge([])
    with pytest.raises(ValueError, match=r"lse \[2, 3, 3\]"):
        merge([(q, torch.zeros(2, 3, 4)), (q, torch.zeros(2, 3, 3))])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [20, 64, 128])
def test_cuda_agrees_with_the_definition(dtype, dim):
    atol = 2e-3 if dtype == torch.float32 else 2e-2  # float32 may use TF32
    for queries, keys in LENGTHS:
        q, k, v = qkv(queries, keys, dim=dim, dtype=dtype, device="cuda")
        for mask in (None, *masks(queries, keys)):
            mask = mask if mask is None else mask.cuda()
            truth, lse_truth = naive(q, k, v, mask)
            out, lse = attend(q, k, v, mask=mask, return_lse=True)
            torch.testing.assert_close(out.double(), truth, atol=atol, rtol=0)
            torch.testing.assert_close(lse.double(), lse_truth, atol=atol, rtol=1e-3)
            torch.testing.assert_close(attend(q, k, v, mask=mask).double(), truth, atol=atol, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_replays_what_eager_computes():
    q, k, v = qkv(63, 1000, dim=64, dtype=torch.bfloat16, device="cuda")
    mask = torch.rand(2, 1, 1, 1000, device="cuda") < 0.5

    def both():
        return merge([attend(q, k, v, mask=mask, return_lse=True), attend(q, k, v, return_lse=True)])

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    q.copy_(torch.randn_like(q))
    graph.replay()
    for a, b in zip(captured, both(), strict=True):
        torch.testing.assert_close(a, b)
