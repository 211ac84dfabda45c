"""Gradients through the block-sparse kernel against the reference in float64; without a GPU in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from millstream.kernels import BlockPlan, attend, planners
from millstream.kernels.attention import RowMask, causal_frames, sparse, window_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """The kernel's own path, by its operators, on this machine's device."""
    from millstream.kernels.attention import backward, launch

    if DEVICE == "cpu":
        launch.operator.register_kernel("cpu")(launch.attend_blocks)
        backward.operator.register_kernel("cpu")(backward.attend_blocks_backward)
        monkeypatch.setattr(sparse, "runs_triton", lambda q: q.dtype != torch.float64)
    return launch.operator


def drawn(*shape, share=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) < share


def rows_seen():
    return RowMask.of(torch.rand((1, 2, 128, 3), generator=torch.Generator().manual_seed(4)) < 0.5)


def holed():
    """Some query blocks see nothing."""
    visit = drawn(2, 2, 2, 4)
    visit[0, 0, 1] = False
    return visit


FRAMES = torch.arange(150) // 10
PLACES = torch.stack(torch.meshgrid(torch.arange(10), torch.arange(15), indexing="ij")).flatten(1)
PLANS = {
    "dense": (63, 100, lambda: BlockPlan.dense(63, 100, (64, 64))),
    "blocks per row and head, biases": (
        120, 250, lambda: BlockPlan.of(holed(), (64, 64), 250, bias=drawn(2, 2, 4).float()),
    ),
    "causal frames with sinks": (
        150, 150, lambda: BlockPlan.of_mask(causal_frames(FRAMES, FRAMES, window=5, sinks=2), 150, 150, (128, 64)),
    ),
    "window in one word": (
        150, 150, lambda: BlockPlan.of_mask(window_mask(PLACES, (10, 15), (3, 5)), 150, 150, (64, 64)),
    ),
    "bits of rows": (
        128, 150, lambda: BlockPlan.of(torch.ones(1, 1, 2, 3, dtype=torch.bool), (64, 64), 150, mask=rows_seen()),
    ),
    "tiles": (4 * 5 * 7, 4 * 5 * 7, lambda: planners.window((4, 5, 7), (3, 3, 5))),
    "clusters": (130, 130, lambda: clusters()),
}  # fmt: skip


def clusters():
    q, k = (torch.randn((1, 130, 2, 16), generator=torch.Generator().manual_seed(n)) for n in (5, 6))
    return planners.svg2(q, k, num_q_clusters=3, num_k_clusters=4, top_p=0.7, block=(64, 64))[0]


def moved(plan):
    if DEVICE == "cpu":
        return plan

    def move(value):
        if isinstance(value, torch.Tensor):
            return value.to(DEVICE)
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return tuple(move(item) for item in value)
        return replace(value, **{k: move(v) for k, v in vars(value).items()}) if hasattr(value, "__dict__") else value

    return move(plan)


def gradients(dtype, plan, queries, keys):
    """Of a loss that reads the output and the log-sum-exp."""
    generator = torch.Generator().manual_seed(1)
    rows = plan.indices.shape[0]
    draw = [torch.randn((rows, n, 2, 16), generator=generator) for n in (queries, keys, keys, queries)]
    q, k, v, weight = (x.to(DEVICE, dtype) for x in draw)
    other = torch.randn((rows, 2, queries), generator=generator).to(DEVICE)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attend(q, k, v, plan, return_lse=True)
    seen = lse.isfinite()
    ((out * weight).sum() + (lse.masked_fill(~seen, 0.0) * other).sum()).backward()
    return [x.grad.double() for x in leaves]


@pytest.mark.parametrize("name", PLANS)
def test_gradients_are_those_of_the_reference_in_float64(name):
    queries, keys, make = PLANS[name]
    plan = moved(make())
    truths = gradients(torch.float64, plan, queries, keys)
    for ours, truth in zip(gradients(torch.float32, plan, queries, keys), truths, strict=True):
        assert (ours - truth).norm() <= 1e-5 * truth.norm()


def test_the_kernel_makes_them(monkeypatch):
    """And not the reference, to which only what it cannot differentiate goes."""

    def refuse(*_):
        raise AssertionError("the reference ran")

    plan = moved(BlockPlan.dense(64, 64, (64, 64)))
    monkeypatch.setattr(sparse, "_reference", refuse)
    gradients(torch.float32, plan, 64, 64)
    with pytest.raises(AssertionError, match="the reference ran"):
        gradients(torch.float32, replace(plan, rest="centroid"), 64, 64)


def test_the_transposed_plan_lists_the_same_pairs():
    from millstream.kernels.attention.backward import transposed

    plan = BlockPlan.of(drawn(2, 3, 5, 7), (64, 64), 430)
    indices, n_full, n_masked = transposed(plan.indices, plan.n_full, plan.n_masked, 7)
    turned = BlockPlan((64, 64), indices, n_full, n_masked)
    assert torch.equal(turned.listed(5), plan.listed(7).mT)
    assert int(n_full.sum()) == int(plan.n_full.sum())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1000, 1560])
def test_half_precision_learns_as_well_as_plain_half_precision(tokens):
    generator = torch.Generator(DEVICE).manual_seed(2)
    draw = [torch.randn((1, tokens, 4, 64), generator=generator, device=DEVICE) for _ in range(4)]
    plan = BlockPlan.dense(tokens, tokens, (128, 128), DEVICE)

    def grads(dtype, given):
        q, k, v, weight = (x.to(dtype) for x in draw)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        (attend(q, k, v, given) * weight).sum().backward()
        return [x.grad.double() for x in leaves]

    truths, plain = grads(torch.float64, None), grads(torch.bfloat16, None)
    for ours, theirs, truth in zip(grads(torch.bfloat16, plan), plain, truths, strict=True):
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + 1e-3 * truth.norm()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_the_operators_are_what_compilers_expect(kernel):
    q, k, v = (torch.randn(1, 300, 2, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    plan = BlockPlan.dense(300, 300, (128, 128), DEVICE)
    torch.library.opcheck(
        kernel, sparse.operands(q, k, v, plan, None, 0.125),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip
    compiled = torch.compile(lambda q, k, v: attend(q * 2, k, v, plan).float().square().sum())
    grads = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    eager = torch.autograd.grad(attend(q * 2, k, v, plan).float().square().sum(), (q, k, v))
    for a, b in zip(grads, eager, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
