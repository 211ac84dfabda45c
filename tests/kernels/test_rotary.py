"""Rotary embedding against diffusers' Wan, and against arithmetic that does not round."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed

from millstream.kernels import apply_rotary, rotary_angles, shift_frames


def diffusers_rotation(x_BLHD, grid):
    """What diffusers' own attention does to its queries, read from the call it makes to attention."""
    frames, height, width = grid
    heads, dim = x_BLHD.shape[2:]
    embedding = WanRotaryPosEmbed(dim, (1, 1, 1), 32)(torch.zeros(1, 1, frames, height, width))
    attention = WanAttention(dim=heads * dim, heads=heads, dim_head=dim, processor=WanAttnProcessor())
    attention.norm_q = attention.norm_k = torch.nn.Identity()
    with torch.no_grad():
        for layer in (attention.to_q, attention.to_k):
            layer.weight.copy_(torch.eye(heads * dim))
            layer.bias.zero_()
    seen = {}

    def record(query, *_, **__):
        seen["query"] = query
        return query

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("diffusers.models.transformers.transformer_wan.dispatch_attention_fn", record)
        attention(x_BLHD.flatten(2), rotary_emb=embedding)
    return seen["query"]


@pytest.mark.parametrize("head_dim", [12, 32, 64, 128])
@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 2, 5), (21, 6, 8)])
def test_angles_are_those_of_diffusers(head_dim, grid):
    frames, height, width = grid
    cos, sin = rotary_angles(torch.arange(frames), height, width, head_dim)
    their_cos, their_sin = WanRotaryPosEmbed(head_dim, (1, 1, 1), 32)(torch.zeros(1, 1, *grid))
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos, their_cos[0, :, 0, 0::2], atol=1e-6, rtol=0)
    torch.testing.assert_close(sin, their_sin[0, :, 0, 1::2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("head_dim", [12, 64, 128])
def test_the_rotation_is_that_of_diffusers(head_dim):
    grid = (3, 2, 5)
    x = torch.randn(2, 30, 4, head_dim, generator=torch.Generator().manual_seed(0))
    ours = apply_rotary(x, *rotary_angles(torch.arange(3), 2, 5, head_dim))
    torch.testing.assert_close(ours, diffusers_rotation(x, grid), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(ours, x, atol=0.1)


def exact_cos(frame: int, exponent: Fraction) -> float:
    """cos(frame * 10000^-exponent): the whole turns are taken off with 60 digits to spare."""
    from decimal import Decimal, getcontext

    getcontext().prec = 80
    pi = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")
    angle = frame * (-(Decimal(10000).ln()) * exponent.numerator / exponent.denominator).exp()
    return math.cos(float(angle % (2 * pi)))


@pytest.mark.parametrize("frame", [10, 10_000, 10_000_000, 10**9])
def test_any_frame_is_as_exact_as_the_tenth(frame):
    head_dim, time_dim = 64, 24
    cos, _ = rotary_angles(torch.tensor([frame]), 1, 1, head_dim)
    for i in range(time_dim // 2):
        assert cos[0, i].item() == pytest.approx(exact_cos(frame, Fraction(2 * i, time_dim)), abs=2e-7)


def test_rows_have_frames_of_their_own():
    frames = torch.tensor([[0, 1, 2], [7, 3, 10_000_000]])
    cos, sin = rotary_angles(frames, 2, 3, 64)
    assert cos.shape == sin.shape == (2, 18, 32)
    x = torch.randn(2, 18, 4, 64)
    together = apply_rotary(x, cos, sin)
    for row in range(2):
        alone = apply_rotary(x[row : row + 1], *rotary_angles(frames[row], 2, 3, 64))
        assert torch.equal(together[row : row + 1], alone)


def test_one_set_of_angles_serves_every_row():
    cos, sin = rotary_angles(torch.arange(2), 2, 3, 64)
    x = torch.randn(3, 12, 4, 64)
    assert torch.equal(apply_rotary(x, cos, sin), apply_rotary(x, cos.expand(3, -1, -1), sin.expand(3, -1, -1)))


def test_scores_see_only_the_distance_in_time():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 6, 2, 64, generator=generator) for _ in range(2))

    def scores(start):
        turned_q = apply_rotary(q, *rotary_angles(torch.tensor([start + 5]), 2, 3, 64))
        turned_k = apply_rotary(k, *rotary_angles(torch.tensor([start]), 2, 3, 64))
        return torch.einsum("blhd,bkhd->bhlk", turned_q, turned_k)

    torch.testing.assert_close(scores(0), scores(10_000_000), atol=2e-5, rtol=0)


@pytest.mark.parametrize("delta", [0, 1, -3, 9_999_990])
def test_shifting_rotated_keys_is_rotating_at_the_later_frame(delta):
    k = torch.randn(2, 12, 4, 64, generator=torch.Generator().manual_seed(0))
    frames = torch.tensor([10, 11])
    here = apply_rotary(k, *rotary_angles(frames, 2, 3, 64))
    there = apply_rotary(k, *rotary_angles(frames + delta, 2, 3, 64))
    torch.testing.assert_close(shift_frames(here, delta), there, atol=3e-6, rtol=0)
    torch.testing.assert_close(shift_frames(here, torch.tensor([delta, delta])), there, atol=3e-6, rtol=0)


def test_each_row_shifts_by_its_own_delta_and_only_in_time():
    k = torch.randn(2, 6, 4, 64)
    shifted = shift_frames(k, torch.tensor([0, 5]))
    assert torch.equal(shifted[0], k[0])
    assert torch.equal(shifted[1, ..., 24:], k[1, ..., 24:])
    assert not torch.allclose(shifted[1, ..., :24], k[1, ..., :24], atol=0.1)
    assert torch.equal(shifted[1:], shift_frames(k[1:], 5))


def test_another_theta_is_kept_by_the_shift():
    k = torch.randn(1, 2, 1, 12)
    here = apply_rotary(k, *rotary_angles(torch.tensor([4]), 1, 2, 12, theta=256.0))
    there = apply_rotary(k, *rotary_angles(torch.tensor([9]), 1, 2, 12, theta=256.0))
    torch.testing.assert_close(shift_frames(here, 5, theta=256.0), there, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_input_is_kept_and_rounded_once(dtype):
    x = torch.randn(1, 6, 2, 64).to(dtype)
    cos, sin = rotary_angles(torch.tensor([3]), 2, 3, 64)
    out = apply_rotary(x, cos, sin)
    assert out.dtype == dtype
    exact = apply_rotary(x.double(), cos, sin)
    torch.testing.assert_close(out.double(), exact, atol=1e-6, rtol=torch.finfo(dtype).eps)


def test_memory_layout_changes_nothing_and_the_input_is_not_touched():
    cos, sin = rotary_angles(torch.tensor([3]), 2, 3, 64)
    wide = torch.randn(2, 6, 4, 131)
    for x in (wide[..., 1:65], wide[..., :64], wide[..., 0:128:2], wide[:, :, ::2, 3:67]):
        before = x.clone()
        assert torch.equal(apply_rotary(x, cos, sin), apply_rotary(before, cos, sin))
        assert torch.equal(x, before)


def test_the_rotation_has_the_gradient_of_a_rotation():
    x = torch.randn(1, 6, 2, 12, dtype=torch.float64, requires_grad=True)
    cos, sin = rotary_angles(torch.tensor([3]), 2, 3, 12)
    g = torch.randn(1, 6, 2, 12, dtype=torch.float64)
    (apply_rotary(x, cos, sin) * g).sum().backward()
    torch.testing.assert_close(x.grad, apply_rotary(g, cos, -sin))


def test_what_does_not_fit_is_refused_with_what_was_seen_and_wanted():
    with pytest.raises(TypeError, match=r"integer frame indices, got torch.float32"):
        rotary_angles(torch.arange(3.0), 2, 3, 64)
    with pytest.raises(ValueError, match="got a scalar"):
        rotary_angles(torch.tensor(3), 2, 3, 64)
    with pytest.raises(ValueError, match="at least 1 token, got 0 x 3"):
        rotary_angles(torch.arange(3), 0, 3, 64)
    with pytest.raises(ValueError, match=r"even and at least 2 .* got 63"):
        rotary_angles(torch.arange(3), 2, 3, 63)
    cos, sin = rotary_angles(torch.arange(3), 2, 3, 64)
    with pytest.raises(ValueError, match=r"= \[1, 12, 32\], got \[18, 32\]"):
        apply_rotary(torch.zeros(1, 12, 2, 64), cos, sin)
    with pytest.raises(ValueError, match="even D"):
        apply_rotary(torch.zeros(1, 18, 2, 63), cos, sin)
    with pytest.raises(ValueError, match=r"cos and sin"):
        apply_rotary(torch.zeros(2, 18, 2, 64), cos.expand(3, -1, -1), sin.expand(3, -1, -1))
    with pytest.raises(TypeError, match="whole frames"):
        shift_frames(torch.zeros(1, 18, 2, 64), torch.tensor([0.5]))
    with pytest.raises(TypeError, match="whole frames"):
        shift_frames(torch.zeros(1, 18, 2, 64), 0.5)
    with pytest.raises(ValueError, match=r"\[B\] = \[1\], got \[3\]"):
        shift_frames(torch.zeros(1, 18, 2, 64), torch.arange(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_with_the_cpu(dtype):
    frames = torch.tensor([[0, 1], [10_000, 10_000_000]])
    x = torch.randn(2, 12, 4, 64).to(dtype)
    cos, sin = rotary_angles(frames, 2, 3, 64)
    cos_gpu, sin_gpu = rotary_angles(frames.cuda(), 2, 3, 64)
    torch.testing.assert_close(cos_gpu.cpu(), cos, atol=1e-7, rtol=0)
    tolerance = {"atol": 1e-6, "rtol": torch.finfo(dtype).eps}
    torch.testing.assert_close(apply_rotary(x.cuda(), cos_gpu, sin_gpu).cpu(), apply_rotary(x, cos, sin), **tolerance)
    delta = torch.tensor([3, -2])
    torch.testing.assert_close(shift_frames(x.cuda(), delta.cuda()).cpu(), shift_frames(x, delta), **tolerance)
