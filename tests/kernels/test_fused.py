"""Fused ops against their definitions, under Triton's interpreter at small size and on CUDA at full size."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from millstream.kernels import apply_rotary, rotary_angles
from millstream.kernels.fused import (
    Quantized,
    gate_norm,
    gate_residual,
    gated_silu,
    norm_modulate,
    norm_rotary,
    quantize_rows,
    quantized_linear,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_rotary_is_the_norm_then_the_rotation(dtype):
    x, weight = draw(0, 2, 30, 48, dtype=dtype), draw(1, 48, dtype=dtype)
    cos, sin = rotary_angles(torch.arange(5), 2, 3, 12)
    normal = F.rms_norm(x.double(), (48,), weight.double(), 1e-2).unflatten(-1, (4, 12))
    expected = apply_rotary(normal, cos, sin)
    seen = norm_rotary(x, weight, cos, sin, heads=4, eps=1e-2)
    assert seen.shape == (2, 30, 4, 12)
    assert seen.dtype == dtype
    near = {"atol": 4 * torch.finfo(dtype).eps, "rtol": torch.finfo(dtype).eps}
    torch.testing.assert_close(seen.double(), expected, **near)
    normal = F.rms_norm(x.double().unflatten(-1, (4, 12)), (12,), weight[:12].double(), 1e-2)
    seen = norm_rotary(x, weight[:12], cos, sin, heads=4, eps=1e-2)
    torch.testing.assert_close(seen.double(), apply_rotary(normal, cos, sin), **near)


def test_norm_rotary_in_float8_ends_where_its_numbers_end():
    x, weight = draw(0, 2, 6, 48), 300 * draw(1, 48)
    cos, sin = rotary_angles(torch.arange(6), 1, 1, 12)
    wide = norm_rotary(x, weight, cos, sin, heads=4)
    seen = norm_rotary(x, weight, cos, sin, heads=4, dtype=torch.float8_e4m3fn)
    assert wide.abs().max() > 448
    assert seen.dtype == torch.float8_e4m3fn
    assert torch.equal(seen.float(), wide.clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_norm_rotary_writes_tokens_in_another_order_each_at_its_own_position():
    x, weight = draw(0, 2, 30, 48), draw(1, 48)
    cos, sin = rotary_angles(torch.arange(5), 2, 3, 12)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    plain = norm_rotary(x, weight, cos, sin, heads=4)
    assert torch.equal(norm_rotary(x, weight, cos, sin, heads=4, permutation=order), plain[:, order])


@pytest.mark.parametrize("groups", [1, 5, 30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_modulate_and_gate_residual_are_their_formulas(dtype, groups):
    x, y = draw(0, 2, 30, 48, dtype=dtype) * 3 + 1, draw(1, 2, 30, 48, dtype=dtype)
    shift, scale, gate = draw(2, 2, groups, 3, 48).unbind(2)  # slices of one projection
    each = [part.double().repeat_interleave(30 // groups, dim=1) for part in (shift, scale, gate)]
    tolerance = {"atol": 8 * torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps, "rtol": 1e-2}
    expected = F.layer_norm(x.double(), (48,), eps=1e-3) * (1 + each[1]) + each[0]
    seen = norm_modulate(x, shift, scale, eps=1e-3)
    assert seen.dtype == dtype
    torch.testing.assert_close(seen.double(), expected, **tolerance)
    weight, bias = draw(5, 48), draw(6, 48)
    expected = F.layer_norm(x.double(), (48,), weight.double(), bias.double(), 1e-3) * (1 + each[1]) + each[0]
    torch.testing.assert_close(
        norm_modulate(x, shift, scale, weight=weight, bias=bias, eps=1e-3).double(), expected, **tolerance
    )
    seen = gate_residual(x, y, gate)
    assert seen.dtype == dtype
    torch.testing.assert_close(seen.double(), x.double() + y.double() * each[2], **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_norm_is_the_sum_and_the_norm_of_what_is_stored(dtype):
    x, y = draw(0, 2, 30, 48, dtype=dtype), draw(1, 2, 30, 48, dtype=dtype)
    shift, scale, gate = draw(2, 2, 5, 3, 48).unbind(2)
    weight, bias = draw(5, 48), draw(6, 48)
    total, normal = gate_norm(x, y, gate, shift=shift, scale=scale, eps=1e-3)
    assert torch.equal(total, gate_residual(x, y, gate))
    assert torch.equal(normal, norm_modulate(total, shift, scale, eps=1e-3))
    total, normal = gate_norm(x, y, None, weight=weight, bias=bias)
    assert torch.equal(total, x + y)
    none = torch.zeros(1, 1, 48)
    assert torch.equal(normal, norm_modulate(total, none, none, weight=weight, bias=bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_silu_is_its_formula(dtype):
    x = draw(0, 2, 30, 96, dtype=dtype)
    gate, value = x.double().chunk(2, dim=-1)
    seen = gated_silu(x)
    assert seen.dtype == dtype
    torch.testing.assert_close(seen.double(), F.silu(gate) * value, atol=1e-5, rtol=2 * torch.finfo(dtype).eps)
    with pytest.raises(ValueError, match=r"an even number of channels, got \[2, 30, 95\]"):
        gated_silu(x[..., 1:])


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_norms_in_eight_bits_are_their_rows_and_go_into_a_product_as_they_are(kind):
    x, y = draw(0, 2, 30, 48, dtype=torch.bfloat16), draw(1, 2, 30, 48, dtype=torch.bfloat16)
    shift, scale, gate = draw(3, 2, 5, 3, 48).unbind(2)
    weight = quantize_rows(draw(4, 20, 48), kind)
    rows = norm_modulate(x, shift, scale, dtype=kind)
    assert rows.values.dtype == kind
    assert rows.dtype == torch.bfloat16
    plain = norm_modulate(x, shift, scale)
    assert all(map(torch.equal, rows[:2], quantize_rows(plain, kind)[:2]))
    product = quantized_linear(rows, weight, draw(5, 20))
    assert product.dtype == torch.bfloat16
    assert torch.equal(product, quantized_linear(plain, weight, draw(5, 20)))
    total, rows = gate_norm(x, y, gate, shift=shift, scale=scale, dtype=kind)
    assert torch.equal(total, gate_residual(x, y, gate))
    assert torch.equal(rows.values, norm_modulate(total, shift, scale, dtype=kind).values)
    with pytest.raises(ValueError, match="GELU behind them"):
        quantized_linear(rows, weight, gelu=True)
    with pytest.raises(TypeError, match=r"torch\.int8 or torch\.float8_e4m3fn, got torch\.int16"):
        norm_modulate(x, shift, scale, dtype=torch.int16)


def test_one_row_of_modulation_serves_all():
    x, y, one = draw(0, 2, 6, 8), draw(1, 2, 6, 8), draw(2, 1, 3, 8)
    all_rows = one.expand(2, -1, -1)
    assert torch.equal(norm_modulate(x, one, one), norm_modulate(x, all_rows, all_rows))
    assert torch.equal(gate_residual(x, y, one), gate_residual(x, y, all_rows))


def test_gradients_reach_everything():
    tensors = [draw(0, 1, 4, 8), draw(1, 8), draw(2, 1, 2, 8), draw(3, 1, 2, 8), draw(4, 1, 4, 8)]
    x, weight, shift, scale, y = (t.double().requires_grad_() for t in tensors)
    cos, sin = rotary_angles(torch.arange(4), 1, 1, 4)
    assert torch.autograd.gradcheck(lambda x, w: norm_rotary(x, w, cos, sin, heads=2), (x, weight), atol=1e-4)
    assert torch.autograd.gradcheck(norm_modulate, (x, shift, scale))
    assert torch.autograd.gradcheck(gate_residual, (x, y, shift))


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_quantised_rows_come_back_within_half_a_step(dtype):
    x = draw(0, 3, 7, 40) * torch.logspace(-6, 4, 7)[:, None]
    x[0, 0] = 0
    x[0, 1, 0] = x[0, 1].abs().max() * 100  # an outlier costs its own row alone
    values, scale, _ = quantize_rows(x, dtype)
    assert values.dtype == dtype
    assert scale.shape == (3, 7, 1)
    assert not values[0, 0].float().any()
    most = 127 if dtype == torch.int8 else 448
    assert (values.float().abs().amax(-1)[x.any(-1)] == most).all()
    step = scale * 0.5 if dtype == torch.int8 else (x.abs() / 16).maximum(scale * 2**-9)
    assert ((values.float() * scale - x).abs() <= step * 1.001).all()


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_a_quantised_linear_layer_is_near_the_layer(dtype):
    x, weight, bias = draw(0, 2, 33, 256), draw(1, 48, 256) * torch.logspace(-2, 2, 48)[:, None], draw(2, 48)
    packed = quantize_rows(weight, dtype)
    seen = quantized_linear(x, packed, bias)
    expected = F.linear(x, weight, bias)
    assert seen.shape == (2, 33, 48)
    limit = 0.015 if dtype == torch.int8 else 0.055
    by_column = (seen - expected).flatten(0, 1).norm(dim=0) / expected.flatten(0, 1).norm(dim=0)
    assert (by_column < limit).all()  # weak columns are as exact as strong ones
    assert torch.equal(quantized_linear(x, packed), quantized_linear(x, packed, torch.zeros(48)))
    assert quantized_linear(x.bfloat16(), packed).dtype == torch.bfloat16
    activated = F.gelu(x, approximate="tanh")
    torch.testing.assert_close(quantized_linear(x, packed, gelu=True), quantized_linear(activated, packed))


def test_the_operators_pass_pytorchs_own_checks():
    ops, x = torch.ops.millstream, draw(0, 2, 6, 16)
    cos, sin = rotary_angles(torch.arange(6), 1, 1, 8)
    group = draw(1, 2, 3, 16)
    torch.library.opcheck(ops.norm_rotary, (x, draw(1, 16), cos, sin, 2, 1e-6, None, torch.float32))
    torch.library.opcheck(ops.norm_rotary, (x, draw(1, 16), cos, sin, 2, 1e-6, torch.randperm(6), torch.bfloat16))
    torch.library.opcheck(ops.norm_modulate, (x, group, group, None, None, 1e-6, None))
    torch.library.opcheck(ops.norm_modulate, (x, group, group, None, None, 1e-6, torch.int8))
    torch.library.opcheck(ops.gate_residual, (x, x, group))
    torch.library.opcheck(ops.gated_silu, (x,))
    torch.library.opcheck(ops.gate_norm, (x, x, group, group, group, None, None, 1e-6, torch.int8))
    torch.library.opcheck(ops.gate_norm, (x, x, None, None, None, draw(2, 16), draw(3, 16), 1e-6, None))
    for dtype in EIGHT_BITS:
        # The schema check multiplies results by numbers, which the CPU can't do in float8.
        checks = ["test_faketensor", "test_autograd_registration"] + ["test_schema"] * (dtype == torch.int8)
        torch.library.opcheck(ops.quantize_rows, (x, dtype, True), test_utils=checks)
        rows, columns = quantize_rows(draw(0, 5, 16), dtype)[:2], quantize_rows(draw(1, 7, 16), dtype)[:2]
        torch.library.opcheck(ops.quantized_product, (*rows, *columns, draw(2, 7), torch.float32), test_utils=checks)


def test_what_does_not_fit_is_refused_with_what_was_seen_and_wanted():
    x = draw(0, 2, 6, 16)
    cos, sin = rotary_angles(torch.arange(6), 1, 1, 8)
    with pytest.raises(ValueError, match=r"x \[2, 6, 16\], weight \[5\] and heads=2"):
        norm_rotary(x, draw(1, 5), cos, sin, heads=2)
    with pytest.raises(ValueError, match=r"an even D, got .* heads=16"):
        norm_rotary(x, draw(1, 16), cos, sin, heads=16)
    with pytest.raises(ValueError, match=r"\[2, 6, 2\], got \[6, 4\]"):
        norm_rotary(x, draw(1, 16), cos, sin, heads=4)
    with pytest.raises(ValueError, match=r"every token once, \[L\] = \[6\], got \[5\]"):
        norm_rotary(x, draw(1, 16), cos, sin, heads=2, permutation=torch.arange(5))
    with pytest.raises(ValueError, match=r"shift must be .* G a divisor of L, got \[2, 4, 16\] for \[2, 6, 16\]"):
        norm_modulate(x, draw(1, 2, 4, 16), draw(1, 2, 4, 16))
    with pytest.raises(ValueError, match=r"one shape, got \[2, 1, 16\] and \[2, 3, 16\]"):
        norm_modulate(x, draw(1, 2, 1, 16), draw(1, 2, 3, 16))
    with pytest.raises(ValueError, match=r"weight must be \[W\] = \[16\], got \[8\]"):
        norm_modulate(x, draw(1, 2, 1, 16), draw(1, 2, 1, 16), weight=draw(1, 8))
    with pytest.raises(ValueError, match=r"got \[2, 6, 16\] and \[2, 3, 16\]"):
        gate_residual(x, x[:, :3], draw(1, 2, 1, 16))
    group = draw(1, 2, 3, 16)
    with pytest.raises(ValueError, match=r"got \[2, 6, 16\] and \[2, 3, 16\]"):
        gate_norm(x, x[:, :3], group)
    with pytest.raises(ValueError, match=r"shift and scale must have one shape, or both be left out"):
        gate_norm(x, x, group, shift=group)
    with pytest.raises(ValueError, match=r"bias must be \[W\] = \[16\], got \[8\]"):
        gate_norm(x, x, group, bias=draw(1, 8))
    with pytest.raises(TypeError, match=r"got torch.float16"):
        quantize_rows(x, torch.float16)
    with pytest.raises(ValueError, match=r"\[N, 16\] with scales \[N, 1\], got \[4, 8\] and \[4, 1\]"):
        quantized_linear(x, quantize_rows(draw(0, 4, 8)))
    with pytest.raises(ValueError, match=r"got \[4, 16\] and \[1, 4\]"):
        quantized_linear(x, Quantized(quantize_rows(draw(0, 4, 16)).values, torch.ones(1, 4)))
    with pytest.raises(ValueError, match=r"bias must be \[N\] = \[4\], got \[5\]"):
        quantized_linear(x, quantize_rows(draw(0, 4, 16)), torch.ones(5))


INTERPRETED = """
import torch
from millstream.kernels import rotary_angles
from millstream.kernels.fused import reference as plain
from millstream.kernels.fused import triton as fast
from millstream.kernels.fused.triton_join import gate_norm_triton
from millstream.kernels.fused.triton_linear import Tiles, quantized_product_triton

generator = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(shape, generator=generator)
close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def near(seen, wanted):  # sums in another order round to another number here and there, a step away
    close(seen[1], wanted[1])
    bent = wanted[0].float()
    sure = torch.frexp(bent)[0].abs() != 0.5  # see below
    off = (seen[0].float() - bent).abs()[sure]
    assert (off <= (1 if wanted[0].dtype == torch.int8 else bent.abs()[sure] / 8 + 2**-9)).all()


for heads, dim in ((1, 16), (3, 16), (3, 12), (2, 40)):
    wide = draw(2, 6, 2, heads * dim)
    x, y = wide.unbind(2)  # strided, as a joint projection gives them
    cos, sin = rotary_angles(torch.arange(6), 1, 1, dim)
    each = torch.stack([cos, cos * 0.5]), torch.stack([sin, sin * 0.5])
    for turn in ((cos, sin), each, (cos[:1], sin[:1])):
        for order in (None, torch.tensor([3, 1, 5, 0, 2, 4])):
            arguments = x, draw(heads * dim), *turn, heads, 1e-6, order
            close(
                fast.norm_rotary_triton(*arguments, x.dtype), plain.norm_rotary_reference(*arguments, x.dtype)
            )
            if dim == 16:
                arguments = x, draw(dim), *turn, heads, 1e-6, order, x.dtype
                close(fast.norm_rotary_triton(*arguments), plain.norm_rotary_reference(*arguments))
            arguments = x, 400 * draw(heads * dim), *turn, heads, 1e-6, order, torch.float8_e4m3fn
            seen, wanted = fast.norm_rotary_triton(*arguments), plain.norm_rotary_reference(*arguments)
            seen, wanted = seen.float(), wanted.float()
            assert seen.abs().max() == 448
            sure = torch.frexp(wanted)[0].abs() != 0.5  # see below
            assert ((seen - wanted).abs()[sure] <= wanted.abs()[sure] / 8 + 2**-9).all()
    for groups in (1, 3, 6):
        shift, scale = draw(2, groups, 2, heads * dim).unbind(2)
        for weight, bias in ((None, None), (draw(heads * dim), draw(heads * dim))):
            arguments = x, shift, scale, weight, bias, 1e-6
            wanted = plain.norm_modulate_reference(*arguments)
            close(fast.norm_modulate_triton(*arguments)[0], wanted)
            for dtype in (torch.int8, torch.float8_e4m3fn):
                near(fast.norm_modulate_triton(*arguments, dtype), plain.quantize_rows_reference(wanted, dtype))
            arguments = x, shift[:1], scale[:1], weight, bias, 1e-6
            close(fast.norm_modulate_triton(*arguments)[0], plain.norm_modulate_reference(*arguments))
        for gate in (None, scale, scale[:1]):
            for parts in ((shift, scale, None, None), (None, None, draw(heads * dim), draw(heads * dim))):
                arguments = x, y, gate, *parts, 1e-6
                wanted, normal = plain.gate_norm_reference(*arguments)
                total, seen, _ = gate_norm_triton(*arguments)
                close(total, wanted)
                close(seen, normal)
                total, *seen = gate_norm_triton(*arguments, torch.int8)
                close(total, wanted)
                near(seen, plain.quantize_rows_reference(normal, torch.int8))
        for gate in (scale, scale[:1]):
            close(fast.gate_residual_triton(x, y, gate), plain.gate_residual_reference(x, y, gate))
for width in (1, 40, 1100):
    x = draw(2, 5, 2 * width + 6)[..., 3:-3]
    close(fast.gated_silu_triton(x), plain.gated_silu_reference(x))
for dtype in (torch.int8, torch.float8_e4m3fn):
    for rows, columns, depth in ((1, 1, 16), (70, 33, 40), (5, 130, 200), (70, 33, 80)):
        x, weight = draw(rows, depth), draw(columns, depth)
        x[0] = 0
        seen, wanted = fast.quantize_rows_triton(x, dtype), plain.quantize_rows_reference(x, dtype)
        assert torch.equal(seen[1], wanted[1])
        # The interpreter loses the carry where rounding to float8 ends at a power of two; the hardware does not.
        sure = torch.frexp(wanted[0].float())[0].abs() != 0.5
        assert torch.equal(seen[0].float()[sure], wanted[0].float()[sure])
        assert dtype != torch.int8 or torch.equal(seen[0], wanted[0])
        near(fast.quantize_rows_triton(x, dtype, True), plain.quantize_rows_reference(x, dtype, True))
        for bias in (None, draw(columns)):
            arguments = *wanted, *plain.quantize_rows_reference(weight, dtype), bias, torch.float32
            product = quantized_product_triton(*arguments)
            close(product, plain.quantized_product_reference(*arguments))
            resident = Tiles(32, 32, 32, resident=1), Tiles(32, 64, 32, bulk=True, resident=2)
            for tiles in (Tiles(64, 32, 64, bulk=True), *resident) if depth % 16 == 0 else ():
                other = quantized_product_triton(*arguments, tiles)
                close(other, product)
                assert dtype != torch.int8 or torch.equal(other, product)
print("equal")
"""


def test_the_triton_kernels_give_the_same_under_their_interpreter(interpret):
    printed, complaints = interpret(INTERPRETED)
    assert printed == "equal", complaints


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


SIZES = [(1, 4680, 12, 128), (1, 1560, 12, 128), (2, 1000, 12, 128), (3, 48, 4, 64), (1, 63, 1, 64)]


@gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES[1:])
@torch.no_grad()
def test_cuda_rounds_once(size, dtype):
    """The error against float64 is that of rounding the exact result to the dtype, and little more."""
    rows, tokens, heads, dim = size
    width = heads * dim
    x, y = (draw(i, rows, tokens, width, dtype=dtype).cuda() for i in range(2))
    weight = draw(2, width, dtype=dtype).cuda()
    frame, rest = (tokens // 48, 48) if tokens % 48 == 0 else (1, tokens)
    cos, sin = rotary_angles(torch.arange(frame, device="cuda"), 1, rest, dim)
    shift, scale, gate = draw(3, rows, frame, 3, width).cuda().unbind(2)
    order = torch.randperm(tokens, device="cuda")
    for run in (
        lambda x, y: norm_rotary(x, weight.to(x.dtype), cos, sin, heads=heads, permutation=order),
        lambda x, y: norm_rotary(x, weight.to(x.dtype)[:dim], cos, sin, heads=heads),
        lambda x, y: norm_modulate(x, shift, scale),
        lambda x, y: gate_residual(x, y, gate),
        lambda x, y: gated_silu(torch.cat([x, y], dim=-1)),
        lambda x, y: gate_norm(x, y, gate, shift=shift, scale=scale)[0],
    ):
        exact = _exact(run, x, y)
        seen = run(x, y)
        assert seen.dtype == dtype
        least = (exact.to(dtype).double() - exact).norm() / exact.norm()
        assert (seen.double() - exact).norm() / exact.norm() < 1.2 * least + 1e-6


@gpu
@pytest.mark.parametrize("dtype", DTYPES[1:])
@torch.no_grad()
def test_cuda_joins_a_branch_and_norms_it_as_one_after_the_other_does(dtype):
    x, y = (draw(i, 1, 4680, 1536, dtype=dtype).cuda() for i in range(2))
    shift, scale, gate = draw(3, 1, 3, 3, 1536).cuda().unbind(2)
    total, normal = gate_norm(x, y, gate, shift=shift, scale=scale)
    near = {"atol": 2e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 4e-2, "rtol": 1e-2}
    torch.testing.assert_close(total, gate_residual(x, y, gate), **near)
    torch.testing.assert_close(normal, norm_modulate(total, shift, scale), **near)
    for kind in EIGHT_BITS:
        same, rows = gate_norm(x, y, gate, shift=shift, scale=scale, dtype=kind)
        assert torch.equal(same, total)
        for seen in (rows, norm_modulate(total, shift, scale, dtype=kind)):
            wanted = quantize_rows(normal, kind)
            torch.testing.assert_close(seen.scale, wanted.scale, rtol=1e-2, atol=0)
            steps = seen.scale if kind == torch.int8 else normal.abs() / 8 + seen.scale / 512
            back = seen.values.float() * seen.scale
            assert ((back - normal).abs() <= 0.51 * steps + near["atol"] + near["rtol"] * normal.abs()).all()


def _exact(run, x, y):
    """In float64 by the reference: gradients are wanted, so no kernel runs."""
    with torch.enable_grad():
        return run(x.double().requires_grad_(), y.double()).detach()


@gpu
@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("size", [(4680, 1536, 8960), (1560, 8960, 1536), (63, 256, 896), (1, 1536, 1536)])
@torch.no_grad()
def test_cuda_quantises_and_multiplies_as_the_reference_does(dtype, size):
    tokens, depth, columns = size
    x, weight, bias = (
        draw(i, *shape).cuda() for i, shape in enumerate(((tokens, depth), (columns, depth), (columns,)))
    )
    packed = quantize_rows(weight, dtype)
    on_cpu = quantize_rows(weight[:64].cpu(), dtype)
    assert torch.equal(packed.values[:64].cpu().float(), on_cpu.values.float())
    torch.testing.assert_close(packed.scale[:64].cpu(), on_cpu.scale)
    seen = quantized_linear(x.bfloat16(), packed, bias)
    values, scale, _ = quantize_rows(x.bfloat16(), dtype)
    exact = (values.double() * scale) @ (packed.values.double() * packed.scale).t() + bias
    # int8 sums are exact and rounded to bfloat16; float8 sums are short inside the tensor cores.
    assert (seen.double() - exact).norm() / exact.norm() < (4e-3 if dtype == torch.int8 else 1e-2)
    bent = quantized_linear(F.gelu(x.bfloat16(), approximate="tanh"), packed, bias)
    assert (quantized_linear(x.bfloat16(), packed, bias, gelu=True) - bent).norm() / bent.norm() < 0.02
    plain = F.linear(x, weight, bias)
    assert (seen.float() - plain).norm() / plain.norm() < (0.015 if dtype == torch.int8 else 0.045)


@gpu
@torch.no_grad()
def test_cuda_products_in_any_tiles_are_the_same_and_a_warm_up_finds_the_fastest(monkeypatch):
    from millstream.kernels.fused import triton_linear as linear

    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("tiles are tried on Hopper")
    rows, columns = (
        quantize_rows(draw(i, *size).cuda(), torch.int8)[:2] for i, size in enumerate([(4680, 1536), (1000, 1536)])
    )
    arguments = *rows, *columns, draw(2, 1000).cuda(), torch.bfloat16
    expected = linear.quantized_product_triton(*arguments)
    for tiles in linear.CANDIDATES:
        assert torch.equal(linear.quantized_product_triton(*arguments, tiles), expected), tiles
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert torch.equal(linear.quantized_product_triton(*arguments), expected)
    assert linear._fastest[4680, 1000, 1536, rows.values.device] in linear.CANDIDATES


@gpu
@torch.no_grad()
def test_cuda_operators_are_captured_and_compiled():
    x = draw(0, 1, 48, 256).cuda().bfloat16()
    shift, scale, gate = draw(3, 1, 1, 3, 256).cuda().unbind(2)
    weight, packed = draw(1, 256).cuda(), quantize_rows(draw(2, 256, 256).cuda())
    cos, sin = rotary_angles(torch.arange(1, device="cuda"), 6, 8, 64)

    def block(x):
        y = norm_rotary(norm_modulate(x, shift, scale), weight, cos, sin, heads=4).flatten(2)
        return gate_residual(x, quantized_linear(y, packed), gate)

    expected = block(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block(x)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), expected, atol=0.05, rtol=0.05)
