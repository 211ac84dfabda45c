"""What stands between the matrix products of a transformer block, in plain PyTorch.

Dimensions: B rows, L tokens, W channels, H heads of D channels (W = H * D), G groups of L / G tokens. Arithmetic is in
float32, or float64 where the inputs are float64; results are rounded once, to the dtype of `x`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..float8 import to_float8
from ..rotary.reference import apply_rotary_reference

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST = 1e-12  # stands in for the largest magnitude of a row of zeros


def norm_rotary_reference(
    x_BLW: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    permutation: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """RMSNorm over as many channels as there are weights, rotation of pairs of channels, then tokens in another order:
    [B, L, H, D]."""
    x = _wide(x_BLW).unflatten(-1, (-1, weight.shape[0]))
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
    out = apply_rotary_reference(x.flatten(2).unflatten(-1, (heads, -1)), cos, sin)
    out = out if permutation is None else out.index_select(1, permutation)
    return to_float8(out) if dtype == torch.float8_e4m3fn else out.to(dtype)


def norm_modulate_reference(
    x_BLW: Tensor, shift_BGW: Tensor, scale_BGW: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """LayerNorm, then (1 + scale) and shift of the token's group: [B, L, W]."""
    x = _wide(x_BLW)
    weight, bias = (part if part is None else part.to(x.dtype) for part in (weight, bias))
    normal = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps).unflatten(1, (shift_BGW.shape[1], -1))
    out = normal * (1 + scale_BGW.to(x.dtype)).unsqueeze(2) + shift_BGW.to(x.dtype).unsqueeze(2)
    return out.flatten(1, 2).to(x_BLW.dtype)


def gate_residual_reference(x_BLW: Tensor, y_BLW: Tensor, gate_BGW: Tensor) -> Tensor:
    """x + gate y with the gate of the token's group: [B, L, W]."""
    x, y = (_wide(part).unflatten(1, (gate_BGW.shape[1], -1)) for part in (x_BLW, y_BLW))
    return torch.addcmul(x, y.to(x.dtype), gate_BGW.to(x.dtype).unsqueeze(2)).flatten(1, 2).to(x_BLW.dtype)


def gate_norm_reference(
    x_BLW: Tensor,
    y_BLW: Tensor,
    gate_BGW: Tensor | None,
    shift_BGW: Tensor | None,
    scale_BGW: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The sum [B, L, W], and its norm."""
    none = x_BLW.new_zeros((1, 1, x_BLW.shape[-1]))
    total = gate_residual_reference(x_BLW, y_BLW, none + 1 if gate_BGW is None else gate_BGW)
    shift, scale = (none if part is None else part for part in (shift_BGW, scale_BGW))
    return total, norm_modulate_reference(total, shift, scale, weight, bias, eps)


def gated_silu_reference(x: Tensor) -> Tensor:
    """SiLU of the first half of the channels times the second."""
    gate, value = _wide(x).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * value).to(x.dtype)


def empty_rows(x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Where rows of the shape of x go in `dtype`, and their scales; None is x's own dtype, without scales."""
    scales = (0,) if dtype is None else (*x.shape[:-1], 1)
    return x.new_empty(x.shape, dtype=dtype or x.dtype), x.new_empty(scales, dtype=torch.float32)


def rows_reference(x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """x in 8 bits and its scales, or as it is without any."""
    return (x, x.new_empty(0, dtype=torch.float32)) if dtype is None else quantize_rows_reference(x, dtype)


def quantize_rows_reference(x: Tensor, dtype: torch.dtype, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """Values of `dtype` and scales float32 [..., 1], so that x, or GELU(x) by tanh, is about values * scale."""
    x = torch.nn.functional.gelu(x.float(), approximate="tanh") if gelu else x.float()
    most = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    values = x * torch.full_like(most, LARGEST[dtype]).div(most)  # a number / a tensor would round twice
    values = values.round() if dtype == torch.int8 else values
    return values.to(dtype), most / LARGEST[dtype]


def quantized_product_reference(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """values [M, K] times weight [N, K] transposed, scaled back by row and column, plus bias: [M, N]."""
    if values.dtype == torch.int8 and values.device.type == "cpu" and _has_fast_integers():
        out = torch._int_mm(values, weight.t()).float()  # eight times as fast as the same product in float32
    else:
        out = values.float() @ weight.float().t()
    out = out.mul_(scale).mul_(weight_scale.t())
    return (out if bias is None else out.add_(bias)).to(dtype)


@cache
def _has_fast_integers() -> bool:
    """Where oneDNN lacks them, PyTorch multiplies integers one by one."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
