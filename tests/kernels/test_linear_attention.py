"""Linear attention: three forms, one answer; parts of a stream equal the whole; methods equal their formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.kernels import linear_attend
from millstream.kernels.linear_attention import LinearState
from millstream.kernels.linear_attention.reference import chunked, naive, recurrent

LENGTHS = (1, 15, 16, 63, 64, 65, 130)


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(length, *, rows=2, heads=3, channels=4, values=5, seed=0, dtype=torch.float64):
    return [draw(seed + i, rows, length, heads, n, dtype=dtype) for i, n in enumerate((channels, channels, values))]


def gates(kind, blocks, *, rows=2, heads=3, channels=4, strength=1.0):
    if kind == "none":
        return None
    return -strength * draw(9, rows, blocks, heads, 1 if kind == "head" else channels).abs()


def close(seen, expected, tolerance=1e-12):
    torch.testing.assert_close(seen, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", ["none", "head", "channel"])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_recurrent_equals_naive(kind, length):
    for block in {1, 5, length}:
        if length % block == 0:
            q, k, v = inputs(length)
            arguments = q, k, v, gates(kind, length // block), draw(7, 2, 3, 4, 5), block
            expected = naive(*arguments)
            for form in (chunked, recurrent):
                for seen, wanted in zip(form(*arguments), expected):
                    close(seen, wanted, 1e-11)


@pytest.mark.parametrize("strength", [1e-6, 30.0, 1e4])
@pytest.mark.parametrize("kind", ["head", "channel"])
def test_weak_and_strong_gates_neither_overflow_nor_vanish(kind, strength):
    q, k, v = inputs(130, dtype=torch.float32)
    g = gates(kind, 130, strength=strength).squeeze(-1) if kind == "head" else gates(kind, 130, strength=strength)
    out, state = linear_attend(q, k, v, gate=g)
    assert out.isfinite().all()
    exact, last = linear_attend(q.double(), k.double(), v.double(), gate=g)
    torch.testing.assert_close(out.double(), exact, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(state.kv.double(), last.kv, atol=1e-4, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_parts_of_a_stream_equal_the_whole(data):
    block = data.draw(st.sampled_from([1, 3, 70]))
    blocks = data.draw(st.integers(1, 6))
    normalize = data.draw(st.sampled_from(["none", "query", "channel"]))
    kind = "none" if normalize == "channel" else data.draw(st.sampled_from(["none", "head", "channel"]))
    q, k, v = inputs(block * blocks, seed=data.draw(st.integers(0, 100)))
    if normalize == "query":
        q, k = q.abs(), k.abs()
    gate = gates(kind, blocks)
    gate = gate.squeeze(-1) if kind == "head" else gate
    decay = None if normalize == "channel" else torch.tensor([1.0, 0.5, 0.9])
    options = {"block": block, "normalize": normalize, "decay": decay}
    expected, last = linear_attend(q, k, v, gate=gate, **options)
    outs, state, at = [], None, 0
    for size in [*data.draw(st.lists(st.integers(0, blocks), max_size=5)), blocks]:
        end = min(at + size, blocks)
        part = slice(at * block, end * block)
        gate_part = None if gate is None else gate[:, at:end]
        out, state = linear_attend(q[:, part], k[:, part], v[:, part], gate=gate_part, state=state, **options)
        outs.append(out)
        at = end
    close(torch.cat(outs, dim=1), expected, 1e-11)
    for seen, wanted in zip(state, last):
        close(seen, wanted, 1e-11)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 60), st.integers(1, 40), st.integers(0, 1000))
def test_the_past_never_hears_of_the_future(at, length, seed):
    at %= length
    q, k, v = inputs(length, seed=seed)
    before, _ = linear_attend(q, k, v, decay=torch.tensor([1.0, 0.5, 0.9]))
    k[:, at:], v[:, at:] = 7.0, -3.0
    after, _ = linear_attend(q, k, v, decay=torch.tensor([1.0, 0.5, 0.9]))
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.allclose(before[:, at:], after[:, at:])


def test_lightning_is_its_formula():
    """o_i = sum over j <= i of (q_i k_j) lambda^(i - j) v_j."""
    q, k, v = inputs(70)
    decay = torch.tensor([1.0, 0.5, 0.97], dtype=torch.float64)
    distance = (torch.arange(70)[:, None] - torch.arange(70)).double()
    weight = decay[:, None, None].pow(distance.clamp_min(0)).tril()
    expected = torch.einsum("bihd,bjhd,hij,bjhe->bihe", q, k, weight, v)
    close(linear_attend(q, k, v, decay=decay)[0], expected)


def test_a_whole_block_is_linas_formula():
    """o = q (k^T v / N) / (q . mean k + 1e-6): the sum's epsilon is N times the mean's."""
    q, k, v = inputs(70)
    q, k = q.relu() + 1e-6, k.relu() + 1e-6
    expected = (q.transpose(1, 2) @ (k.transpose(1, 2).transpose(-1, -2) @ v.transpose(1, 2)) / 70).transpose(1, 2)
    expected = expected / ((q * k.mean(1, keepdim=True)).sum(-1, keepdim=True) + 1e-6)
    close(linear_attend(q, k, v, block=70, normalize="query", eps=70e-6)[0], expected)


def test_query_normalisation_is_a_mean_of_values_weighted_by_similarity():
    q, k, v = inputs(40)
    q, k = q.abs(), k.abs()
    constant = torch.full_like(v, 3.0)
    close(linear_attend(q, k, constant, normalize="query", eps=0.0)[0], constant)
    out, _ = linear_attend(q, k, v, block=8, normalize="query", eps=0.0)
    assert (out <= v.amax(1, keepdim=True)).all()
    assert (out >= v.amin(1, keepdim=True)).all()


def test_the_divisor_may_come_from_features_that_were_not_rotated():
    q, k, v = inputs(24)
    plain = q.abs(), k.abs()
    out, state = linear_attend(q, k, v, block=6, normalize="query", unrotated=plain, eps=0.0)
    above, _ = linear_attend(q, k, v, block=6)
    below, _ = linear_attend(*plain, torch.ones_like(v), block=6)
    close(out, above / below)
    close(state.norm, plain[1].sum(1))


@pytest.mark.parametrize("block", [1, 4, 64, 128])
def test_lightnet_is_a_softmax_over_the_tokens_so_far(block):
    q, k, v = inputs(128)
    k = 20 * k  # logits of any size
    out, state = linear_attend(q, k, v, block=block, normalize="channel")
    for at in (0, 63, 127):
        end = (at // block + 1) * block
        weight = k[:, :end].softmax(1)
        close(out[:, at], torch.einsum("bhd,bjhd,bjhe->bhe", q[:, at], weight, v[:, :end]), 1e-11)
    close(state.norm, k.logsumexp(1))


def test_lightnet_logits_far_apart_stay_finite():
    q, k, v = inputs(70, dtype=torch.float32)
    k[:, :35] -= 5000
    k[:, 35:] += 5000
    out, _ = linear_attend(q, k, v, normalize="channel")
    assert out.isfinite().all()
    alone, _ = linear_attend(q[:, 35:], k[:, 35:], v[:, 35:], normalize="channel")
    torch.testing.assert_close(out[:, 35:], alone, atol=1e-3, rtol=1e-3)  # the logits themselves are rounded


def test_a_gate_of_minus_infinity_forgets():
    q, k, v = inputs(9)
    gate = torch.zeros(2, 9, 3)
    gate[:, 5] = -torch.inf
    out, _ = linear_attend(q, k, v, gate=gate)
    close(out[:, 5:], linear_attend(q[:, 5:], k[:, 5:], v[:, 5:])[0])


def test_a_long_stream_stays_exact_and_its_state_does_not_grow():
    q, k, v = inputs(3000, rows=1, dtype=torch.float32)
    decay = torch.tensor([1.0, 0.99, 0.9])
    state = None
    for part in zip(q.split(8, 1), k.split(8, 1), v.split(8, 1)):
        out, state = linear_attend(*part, block=8, decay=decay, state=state)
    exact, last = linear_attend(q.double(), k.double(), v.double(), block=8, decay=decay)
    assert state.kv.shape == (1, 3, 4, 5)
    torch.testing.assert_close(out.double(), exact[:, -8:], atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(state.kv.double(), last.kv, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("normalize", ["none", "query", "channel"])
@pytest.mark.parametrize("block", [1, 66])
def test_gradients_are_right(normalize, block):
    q, k, v = (x.requires_grad_() for x in inputs(66, rows=1, heads=1, channels=2, values=2))
    if normalize == "query":
        q, k = (x.detach().abs().requires_grad_() for x in (q, k))
    gate = None
    if normalize != "channel":
        gate = (-draw(3, 1, 66 // block, 1, 2).abs()).requires_grad_()

    def run(q, k, v, gate):
        out, state = linear_attend(q, k, v, block=block, gate=gate, normalize=normalize)
        return out, state.kv, state.norm

    assert torch.autograd.gradcheck(run, (q, k, v, gate), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_kept_in_float32(dtype):
    q, k, v = inputs(640, dtype=dtype)
    out, state = linear_attend(q, k, v, block=64, decay=torch.tensor([1.0, 0.9, 0.5]))
    assert out.dtype == dtype
    assert state.kv.dtype == state.norm.dtype == torch.float32
    exact, last = linear_attend(q.double(), k.double(), v.double(), block=64, decay=torch.tensor([1.0, 0.9, 0.5]))
    torch.testing.assert_close(state.kv.double(), last.kv, atol=1e-3, rtol=1e-3)
    assert (out.double() - exact).norm() / exact.norm() < 2 * torch.finfo(dtype).eps + 1e-6


def test_nothing_given_is_nothing_done():
    q, k, v = inputs(0)
    state = LinearState(draw(0, 2, 3, 4, 5), draw(1, 2, 3, 4))
    out, after = linear_attend(q, k, v, state=state)
    assert out.shape == (2, 0, 3, 5)
    assert after is state


def test_the_state_given_is_not_written_to():
    q, k, v = inputs(6)
    state = LinearState(draw(0, 2, 3, 4, 5), draw(1, 2, 3, 4))
    kept = [x.clone() for x in state]
    linear_attend(q, k, v, state=state, normalize="query")
    assert all(torch.equal(a, b) for a, b in zip(state, kept))


def test_the_operator_passes_pytorchs_own_checks_and_compiles():
    for block, g in ((1, None), (65, -draw(1, 2, 1, 3, 4).abs().float()), (1, -draw(1, 2, 65, 3, 1).abs().float())):
        q, k, v = inputs(65, dtype=torch.float32)
        arguments = (q, k, v, g, draw(7, 2, 3, 4, 5, dtype=torch.float32), block, torch.float32)
        torch.library.opcheck(torch.ops.millstream.linear_attention, arguments)
    q, k, v = inputs(12, dtype=torch.float32)
    compiled = torch.compile(linear_attend, backend="aot_eager", fullgraph=True)
    decay = torch.tensor([1.0, 0.9, 0.5])
    torch.testing.assert_close(
        compiled(q, k, v, block=4, decay=decay)[0], linear_attend(q, k, v, block=4, decay=decay)[0]
    )


def test_what_does_not_fit_is_refused_with_what_was_seen_and_wanted():
    q, k, v = inputs(6)
    with pytest.raises(ValueError, match=r"got q \[2, 6, 3, 4\], k \[2, 5, 3, 4\]"):
        linear_attend(q, k[:, :5], v)
    with pytest.raises(TypeError, match=r"got torch.float32, torch.float64"):
        linear_attend(q.float(), k, v)
    with pytest.raises(ValueError, match=r"got 6 tokens and block=4"):
        linear_attend(q, k, v, block=4)
    with pytest.raises(ValueError, match=r"'none', 'query' or 'channel', got 'softmax'"):
        linear_attend(q, k, v, normalize="softmax")
    with pytest.raises(ValueError, match=r"one number per head, got \[2\]"):
        linear_attend(q, k, v, decay=torch.ones(2))
    with pytest.raises(ValueError, match=r"\(0, 1\], got values from 0.5 to 1.5"):
        linear_attend(q, k, v, decay=torch.tensor([1.0, 0.5, 1.5]))
    with pytest.raises(ValueError, match=r"gate must be .* \[2, 2, 3, 4\], got \[2, 6, 3\]"):
        linear_attend(q, k, v, block=3, gate=torch.zeros(2, 6, 3))
    with pytest.raises(ValueError, match=r"at most 0 .* got up to 0.25"):
        linear_attend(q, k, v, gate=torch.full((2, 6, 3), 0.25))
    with pytest.raises(ValueError, match="leave decay and gate out"):
        linear_attend(q, k, v, normalize="channel", decay=torch.ones(3))
    with pytest.raises(ValueError, match="unrotated shapes the divisor of normalize='query', got normalize='none'"):
        linear_attend(q, k, v, unrotated=(q, k))
    with pytest.raises(ValueError, match=r"kv \[2, 3, 4, 5\] and norm \[2, 3, 4\], got \[1, 3, 4, 5\]"):
        linear_attend(q, k, v, state=LinearState(draw(0, 1, 3, 4, 5), draw(1, 2, 3, 4)))
