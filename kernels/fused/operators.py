"""The fused ops as operators of PyTorch, so that `torch.compile` and CUDA graphs take them whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import runs_triton
from . import reference

# Where tensor cores, or conversions, know the type.
CAPABILITY = {torch.int8: (8, 0), torch.float8_e4m3fn: (8, 9)}


def runs_in(dtype: torch.dtype, x: Tensor) -> bool:
    return runs_triton(x, what=f"the {str(dtype)[6:]} Triton kernel", capability=CAPABILITY.get(dtype, (0, 0)))


@torch.library.custom_op(
    "millstream::norm_rotary",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor cos, Tensor sin, int heads, float eps, Tensor? permutation, "
    "ScalarType dtype) -> Tensor",
)
def norm_rotary(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    permutation: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    if not runs_in(dtype, x):
        return reference.norm_rotary_reference(x, weight, cos, sin, heads, eps, permutation, dtype).contiguous()
    from .triton import norm_rotary_triton

    return norm_rotary_triton(x, weight, cos, sin, heads, eps, permutation, dtype)


@norm_rotary.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    permutation: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], heads, x.shape[2] // heads), dtype=dtype)


@torch.library.custom_op(
    "millstream::norm_modulate",
    mutates_args=(),
    schema="(Tensor x, Tensor shift, Tensor scale, Tensor? weight, Tensor? bias, float eps, ScalarType? dtype) "
    "-> (Tensor, Tensor)",
)
def norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    if not runs_in(dtype or x.dtype, x):
        out = reference.norm_modulate_reference(x, shift, scale, weight, bias, eps).contiguous()
        return reference.rows_reference(out, dtype)
    from .triton import norm_modulate_triton

    return norm_modulate_triton(x, shift, scale, weight, bias, eps, dtype)


@norm_modulate.register_fake
def _(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    return reference.empty_rows(x, dtype)


@torch.library.custom_op(
    "millstream::gate_residual", mutates_args=(), schema="(Tensor x, Tensor y, Tensor gate) -> Tensor"
)
def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    if not runs_triton(x):
        return reference.gate_residual_reference(x, y, gate).contiguous()
    from .triton import gate_residual_triton

    return gate_residual_triton(x, y, gate)


@gate_residual.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("millstream::gated_silu", mutates_args=(), schema="(Tensor x) -> Tensor")
def gated_silu(x: Tensor) -> Tensor:
    if not runs_triton(x):
        return reference.gated_silu_reference(x)
    from .triton import gated_silu_triton

    return gated_silu_triton(x)


@gated_silu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.custom_op(
    "millstream::gate_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, float eps, "
    "ScalarType? dtype) -> (Tensor, Tensor, Tensor)",
)
def gate_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if not runs_in(dtype or x.dtype, x):
        total, out = reference.gate_norm_reference(x, y, gate, shift, scale, weight, bias, eps)
        return total.contiguous(), *reference.rows_reference(out.contiguous(), dtype)
    from .triton_join import gate_norm_triton

    return gate_norm_triton(x, y, gate, shift, scale, weight, bias, eps, dtype)


@gate_norm.register_fake
def _(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *reference.empty_rows(x, dtype)


@torch.library.custom_op(
    "millstream::quantize_rows", mutates_args=(), schema="(Tensor x, ScalarType dtype, bool gelu) -> (Tensor, Tensor)"
)
def quantize_rows(x: Tensor, dtype: torch.dtype, gelu: bool) -> tuple[Tensor, Tensor]:
    if not runs_in(dtype, x):
        values, scale = reference.quantize_rows_reference(x, dtype, gelu)
        return values.contiguous(), scale.contiguous()
    from .triton import quantize_rows_triton

    return quantize_rows_triton(x, dtype, gelu)


@quantize_rows.register_fake
def _(x: Tensor, dtype: torch.dtype, gelu: bool) -> tuple[Tensor, Tensor]:
    return reference.empty_rows(x, dtype)


@torch.library.custom_op(
    "millstream::quantized_product",
    mutates_args=(),
    schema="(Tensor values, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType dtype) "
    "-> Tensor",
)
def quantized_product(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if not runs_in(values.dtype, values):
        return reference.quantized_product_reference(values, scale, weight, weight_scale, bias, dtype)
    if _suits_cutlass(values, weight, dtype):
        bias = None if bias is None else bias.to(dtype)
        return torch._scaled_mm(
            values, weight.t(), scale, weight_scale.t(), bias=bias, out_dtype=dtype, use_fast_accum=True
        )
    from .triton_linear import quantized_product_triton

    return quantized_product_triton(values, scale, weight, weight_scale, bias, dtype)


def _suits_cutlass(values: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Is PyTorch's own float8 product the faster one? On an H100 from about a thousand rows (106 against 143 us at 4680
    x 1536 x 8960); for 48 rows it takes half as long again as ours."""
    return (
        values.dtype == torch.float8_e4m3fn
        and dtype == torch.bfloat16
        and values.shape[0] >= 512
        and values.shape[1] % 16 == weight.shape[0] % 16 == 0
        and torch.version.hip is None
        and torch.cuda.get_device_capability(values.device) >= (9, 0)
    )


@quantized_product.register_fake
def _(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return values.new_empty((values.shape[0], weight.shape[0]), dtype=dtype)
