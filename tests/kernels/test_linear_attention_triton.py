"""The Triton kernels of linear attention: under their interpreter at small size, on CUDA at full size."""

from __future__ import annotations

import pytest
import torch

from millstream.kernels import linear_attend
from millstream.kernels.linear_attention import LinearState

INTERPRETED = """
import torch
from millstream.kernels.linear_attention.reference import chunked, recurrent
from millstream.kernels.linear_attention.triton import linear_attention_triton

generator = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(shape, generator=generator)
cases = [(1, 1, 2, 16, 16), (63, 1, 1, 16, 16), (130, 1, 2, 20, 5), (100, 1, 1, 80, 72), (70, 1, 1, 16, 1)]
cases += [(65, 65, 1, 16, 24), (2 * 130, 130, 1, 20, 16), (300, 300, 2, 16, 70), (192, 64, 1, 66, 1)]
cases += [(144, 48, 1, 16, 16)]
for length, block, heads, D, E in cases:
    for channels in (None, 1, D):
        # strided views, as a joint projection of q, k and v gives them; values may be one repeated number
        rows = 2 if length < 100 else 1
        q, k, extra = draw(rows, length, heads, 3, D).unbind(3)
        v = draw(rows, length, heads, E + 1)[..., :E] if E > 1 else torch.ones(1).expand(rows, length, heads, 1)
        g = None if channels is None else -3 * draw(rows, length // block, heads, channels).abs()
        state = draw(rows, heads, D, E)
        seen = linear_attention_triton(q, k, v, g, state, block, torch.float32)
        for a, b in zip(seen, (chunked if block == 1 else recurrent)(q, k, v, g, state, block)):
            assert a.shape == b.shape and a.isfinite().all()
            assert torch.allclose(a, b, atol=2e-4, rtol=2e-4), (length, block, heads, D, E, channels)
for block in (1, 48):  # half precision: the interpreter has no bfloat16
    for channels in (None, 1, 16):
        q, k, v = draw(1, 96, 1, 3, 16).half().unbind(3)
        g = None if channels is None else -draw(1, 96 // block, 1, channels).abs()
        arguments = q, k, v, g, draw(1, 1, 16, 16), block
        out, state = linear_attention_triton(*arguments, torch.float16)
        exact, last = (chunked if block == 1 else recurrent)(*arguments)
        assert out.dtype == torch.float16 and (out - exact).norm() < 1e-3 * exact.norm()
        torch.testing.assert_close(state, last, atol=1e-4, rtol=1e-4)
print("equal")
"""


def test_the_triton_kernels_give_the_same_under_their_interpreter(interpret):
    printed, complaints = interpret(INTERPRETED)
    assert printed == "equal", complaints


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


FARTHEST = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3, torch.float32: 2e-5}  # a few roundings of each type


def on_cuda(length, dim, kind, block, dtype, rows=1, heads=12):
    """q, k, v with a gate, drawn on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    q, k, v = (draw(rows, length, heads, dim).to(dtype) for _ in range(3))
    shape = {"none": None, "head": (rows, length // block, heads), "channel": (rows, length // block, heads, dim)}[kind]
    return q / dim**0.5, k, v, None if shape is None else -0.05 * draw(*shape).abs()


# Exact products of float32 take long to compile, so that type is met at small sizes.
SIZES = [(4680, 4680, 128), (4680, 1560, 128), (4680, 1, 128), (1000, 1, 64), (144, 48, 64), (63, 1, 64)]
CASES = [(*size, torch.bfloat16) for size in SIZES]
CASES += [(*size, dtype) for size in SIZES[3:5] for dtype in (torch.float16, torch.float32)]


@gpu
@pytest.mark.parametrize(("length", "block", "dim", "dtype"), CASES)
@pytest.mark.parametrize("kind", ["none", "head", "channel"])
@torch.no_grad()
def test_cuda_differs_from_float64_by_a_few_roundings(length, block, dim, kind, dtype):
    q, k, v, gate = on_cuda(length, dim, kind, block, dtype)
    out, state = linear_attend(q, k, v, block=block, gate=gate)
    exact, last = linear_attend(q.double(), k.double(), v.double(), block=block, gate=gate)
    assert out.dtype == dtype
    assert (out.double() - exact).norm() / exact.norm() < FARTHEST[dtype]
    assert (state.kv.double() - last.kv).norm() / last.kv.norm() < FARTHEST[dtype]


@gpu
@pytest.mark.parametrize("normalize", ["query", "channel"])
@pytest.mark.parametrize("block", [1, 1560])
@torch.no_grad()
def test_cuda_normalises_and_continues_a_stream(normalize, block):
    q, k, v, _ = on_cuda(4680, 128, "none", block, torch.bfloat16, rows=2)
    if normalize == "query":
        q, k = q.relu() + 1e-6, k.relu() + 1e-6
    options = {"block": block, "normalize": normalize}
    exact, _ = linear_attend(q.double(), k.double(), v.double(), **options)
    state, outs = None, []
    for part in zip(q.split(1560, 1), k.split(1560, 1), v.split(1560, 1)):
        out, state = linear_attend(*part, state=state, **options)
        outs.append(out)
    error = (torch.cat(outs, 1).double() - exact).norm() / exact.norm()
    assert error < 1.5e-2


@gpu
@torch.no_grad()
def test_cuda_strong_gates_and_memory_full_of_nan():
    q, k, v, _ = on_cuda(1000, 128, "none", 1, torch.bfloat16)
    gate = torch.full((1, 1000, 12, 128), -30.0, device="cuda")
    gate[:, ::7] = -torch.inf
    torch.full((2**28,), torch.nan, device="cuda")  # what the allocator will hand out again
    out, state = linear_attend(q, k, v, gate=gate)
    exact, _ = linear_attend(q.double(), k.double(), v.double(), gate=gate)
    assert (out.double() - exact).norm() / exact.norm() < FARTHEST[torch.bfloat16]
    assert state.kv.isfinite().all()


@gpu
@torch.no_grad()
def test_a_cuda_graph_replays_and_compiles():
    q, k, v, gate = on_cuda(1560, 128, "head", 1560, torch.bfloat16)
    state = LinearState(torch.randn(1, 12, 128, 128, device="cuda"), torch.zeros(1, 12, 128, device="cuda"))
    expected, last = linear_attend(q, k, v, block=1560, gate=gate, state=state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, after = linear_attend(q, k, v, block=1560, gate=gate, state=state)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
    assert torch.equal(after.kv, last.kv)
    compiled = torch.compile(linear_attend, fullgraph=True)
    seen, _ = compiled(q, k, v, block=1560, gate=gate, state=state)
    torch.testing.assert_close(seen, expected, atol=2e-2, rtol=2e-2)


@gpu
@torch.no_grad()
def test_cuda_passes_pytorchs_own_checks():
    for block in (1, 65):
        q, k, v, _ = on_cuda(65, 16, "none", block, torch.float32)
        state = torch.zeros(1, 12, 16, 16, device="cuda")
        arguments = (q, k, v, None, state, block, torch.float32)
        torch.library.opcheck(torch.ops.millstream.linear_attention, arguments)
