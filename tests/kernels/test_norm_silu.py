"""Norm and SiLU in one: equal to their formula, in any layout, and nothing beside `out` is touched."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch.nn import functional as F

from millstream.kernels.norm_silu import norm_silu


def buffers(shape, kept=2, dtype=torch.float32, device="cpu"):
    """x, gamma, a larger channels-last buffer full of 7s, and the part of it that is written."""
    batch, channels, frames, height, width = shape
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last_3d)
    gamma = torch.rand(channels, 1, 1, 1, dtype=dtype, device=device) + 0.5
    whole = torch.full((batch, frames + kept, height, width, channels), 7.0, dtype=dtype, device=device)
    whole = whole.permute(0, 4, 1, 2, 3)
    return x, gamma, whole, whole[:, :, kept:]


SHAPES = [(1, 96, 3, 4, 5), (2, 5, 1, 3, 3), (1, 384, 2, 1, 1), (2, 1, 4, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_diffusers_norm_and_silu(shape):
    x, gamma, whole, out = buffers(shape)
    norm = WanRMS_norm(shape[1], images=False)
    norm.gamma.data.copy_(gamma)
    norm_silu(x, gamma, out=out)
    torch.testing.assert_close(out, F.silu(norm(x)).detach(), atol=1e-6, rtol=1e-5)
    assert (whole[:, :, :2] == 7).all()


def test_a_place_without_length_stays_zero():
    x, gamma, _, out = buffers((1, 8, 1, 2, 2))
    norm_silu(torch.zeros_like(x), gamma, out=out)
    assert not out.any()


def test_shapes_that_do_not_belong_together_are_refused():
    x, gamma, _, out = buffers((1, 8, 2, 2, 2))
    for wrong in ((x[0], gamma, out[0]), (x, gamma[:7], out), (x[:, :, :1], gamma, out)):
        with pytest.raises(ValueError, match="norm_silu wants x and out of one shape"):
            norm_silu(wrong[0], wrong[1], out=wrong[2])


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_kept_frames_go_in_front_and_move_on(frames):
    x, gamma, _, _ = buffers((2, 5, 7, 3, 4))
    alone = torch.empty_like(x)
    norm_silu(x, gamma, out=alone)
    kept = torch.zeros_like(x[:, :, :2])
    seen = []
    for part in x.split(frames, dim=2):
        both = x.new_empty((2, 5, 2 + part.shape[2], 3, 4))
        norm_silu(part, gamma, out=both, kept=kept)
        assert torch.equal(both[:, :, -2:], kept)
        assert not seen or torch.equal(both[:, :, :2], seen[-1][:, :, -2:])
        seen.append(both)
    torch.testing.assert_close(torch.cat([both[:, :, 2:] for both in seen], dim=2), alone)


def test_what_is_added_is_added_first_and_holds_the_sum():
    x, gamma, _, out = buffers((1, 8, 2, 3, 3))
    more, expected = x.flip(1).clone(), torch.empty_like(x)
    total = x + more
    norm_silu(total, gamma, out=expected)
    norm_silu(x, gamma, out=out, more=more)
    assert torch.equal(more, total)
    assert torch.equal(out, expected)


def test_kept_and_added_frames_of_another_shape_are_refused():
    x, gamma, whole, _ = buffers((1, 8, 2, 2, 2))
    with pytest.raises(ValueError, match="kept frames must be like those of x"):
        norm_silu(x, gamma, out=whole, kept=x[:, :4])
    with pytest.raises(ValueError, match="what is added must be like x"):
        norm_silu(x, gamma, out=whole, kept=x, more=x[:, :, :1])


INTERPRETED = """
import importlib.util, torch
spec = importlib.util.spec_from_file_location("tests_here", {path!r})
here = importlib.util.module_from_spec(spec)
spec.loader.exec_module(here)
from millstream.kernels.norm_silu.reference import norm_silu_reference
from millstream.kernels.norm_silu.triton import norm_silu_triton, serves
last = torch.channels_last_3d
for dtype, near in ((torch.float32, 1e-5), (torch.float16, 4e-3)):
    for shape in here.SHAPES:
        x, gamma, whole, out = here.buffers(shape, dtype=dtype)
        norm_silu_triton(x, gamma, out)
        expected = torch.empty_like(x)
        norm_silu_reference(x, gamma, expected)
        torch.testing.assert_close(out, expected, atol=near, rtol=near)
        assert (whole[:, :, :2] == 7).all()
        kept = torch.randn_like(whole[:, :, :2])
        same, both, twice = kept.clone(), torch.empty_like(whole), (x.flip(1) * 0.5).contiguous(memory_format=last)
        add = twice.clone(memory_format=torch.preserve_format)
        assert serves(x, whole, kept, add)
        norm_silu_triton(x, gamma, whole, kept, add)
        norm_silu_reference(x, gamma, both, same, twice)
        for seen, wanted in ((whole, both), (kept, same), (add, twice)):
            torch.testing.assert_close(seen, wanted, atol=near, rtol=near)
print("equal")
"""


def test_the_triton_kernel_gives_the_same_under_its_interpreter(interpret):
    printed, complaints = interpret(INTERPRETED.format(path=__file__))
    assert printed == "equal", complaints


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 96, 12, 60, 104), (1, 1024, 2, 6, 7)])
def test_on_a_gpu_it_is_what_it_is_in_float64(shape, dtype):
    x, gamma, whole, out = buffers(shape, dtype=dtype, device="cuda")
    norm_silu(x, gamma, out=out)
    exact = x.double() / x.double().norm(dim=1, keepdim=True) * shape[1] ** 0.5 * gamma.double()
    near = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), F.silu(exact), atol=near, rtol=near)
    assert (whole[:, :, :2] == 7).all()
    kept = torch.randn_like(whole[:, :, :2])
    before, more = kept.clone(), torch.zeros_like(x)
    norm_silu(x, gamma, out=whole, kept=kept, more=more)
    assert torch.equal(more, x)
    assert torch.equal(whole[:, :, :2], before)
    assert torch.equal(kept, whole[:, :, -2:])
    torch.testing.assert_close(whole[:, :, 2:].double(), F.silu(exact), atol=near, rtol=near)
