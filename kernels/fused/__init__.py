"""What stands between the matrix products of a transformer block, each in one pass over memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import operators, reference
from .reference import LARGEST

__all__ = [
    "Quantized",
    "Rows",
    "gate_norm",
    "gate_residual",
    "gated_silu",
    "norm_modulate",
    "norm_rotary",
    "quantize_rows",
    "quantized_linear",
]


class Quantized(NamedTuple):
    """Rows of small numbers: `values * scale`, values int8 or float8_e4m3fn [..., K], scale float32 [..., 1].

    `dtype` is that of the numbers they stand for, and of products with them.
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype = torch.float32


Rows = Tensor | Quantized


def norm_rotary(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    eps: float = 1e-6,
    permutation: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Queries or keys ready for attention: RMSNorm over all heads together or over each, then Wan's rotary embedding.

    Args:
        x: a projection [B, L, heads * D], any floating dtype. Arithmetic is in float32, rounded once.
        weight: [heads * D], the norm's, or [D], for each head's own norm.
        cos, sin: from `rotary_angles`, [L, D // 2] or [B, L, D // 2]; a size of 1 broadcasts.
        eps: added to the mean square.
        permutation: int64 or int32 [L], the order in which tokens are written: `out[:, i]` is token `permutation[i]`,
            at its own position. For plans that sort tokens into tiles, at no extra cost.
        dtype: of the result, None for `x`'s. float8_e4m3fn holds what lies beyond 448 as 448, and gives no gradient.

    Returns:
        [B, L, heads, D], contiguous.

    Raises:
        ValueError: shapes that do not belong together.
    """
    norms = weight.shape in (x.shape[-1:], (x.shape[-1] // heads,))
    if x.ndim != 3 or x.shape[-1] % (2 * heads) or not norms:
        raise ValueError(
            f"norm_rotary wants x [B, L, W] and weight [W] or [D] with W = heads * D and an even D, got x "
            f"{list(x.shape)}, weight {list(weight.shape)} and heads={heads}"
        )
    full = (x.shape[0], x.shape[1], x.shape[2] // heads // 2)
    fits = all(a in (1, b) for a, b in zip(cos.shape[-2::-1], full[1::-1], strict=False))
    if cos.shape != sin.shape or cos.ndim not in (2, 3) or cos.shape[-1] != full[-1] or not fits:
        raise ValueError(
            f"cos and sin must both be [L, D // 2] or [B, L, D // 2] with [B, L, D // 2] = {list(full)}, "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
    if permutation is not None and permutation.shape != x.shape[1:2]:
        raise ValueError(f"permutation must name every token once, [L] = [{x.shape[1]}], got {list(permutation.shape)}")
    odd = weight.shape != x.shape[-1:] and full[2] & (full[2] - 1) != 0  # heads that no power of two holds
    plain = odd or _in_pytorch(x, weight, cos, sin)
    run = reference.norm_rotary_reference if plain else operators.norm_rotary
    return run(x, weight, cos, sin, heads, eps, permutation, dtype or x.dtype)


def norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> Rows:
    """Adaptive layer norm (DiT, arXiv:2212.09748): LayerNorm(x) (1 + scale) + shift.

    Args:
        x: [B, L, W], any floating dtype. Arithmetic is in float32, rounded once.
        shift, scale: [B, G, W], or [1, G, W] for all rows, with G equal groups of neighbouring tokens (1, the frames
            or the tokens).
        weight, bias: [W], of the norm itself.
        eps: added to the variance.
        dtype: int8 or float8_e4m3fn quantises the result as `quantize_rows` does, in the same pass; no gradient then.

    Returns:
        [B, L, W] in `x`'s dtype, or such rows in 8 bits.

    Raises:
        ValueError: shapes that do not belong together. TypeError: another `dtype`.
    """
    _check_groups("shift", x, shift)
    _check_groups("scale", x, scale)
    if shift.shape != scale.shape:
        raise ValueError(f"shift and scale must have one shape, got {list(shift.shape)} and {list(scale.shape)}")
    _check_width(x, weight, bias)
    _check_kind(dtype)
    if _in_pytorch(x, shift, scale, weight, bias):
        return _rows(reference.norm_modulate_reference(x, shift, scale, weight, bias, eps), dtype)
    out, scales = operators.norm_modulate(x, shift, scale, weight, bias, eps, dtype)
    return out if dtype is None else Quantized(out, scales, x.dtype)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate y, where a branch joins the residual stream.

    Args:
        x, y: [B, L, W], any floating dtypes. Arithmetic is in float32, rounded once.
        gate: [B, G, W] or [1, G, W], for G equal groups of neighbouring tokens.

    Returns:
        [B, L, W] in `x`'s dtype.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check_groups("gate", x, gate)
    if x.shape != y.shape:
        raise ValueError(f"x and y must have one shape, got {list(x.shape)} and {list(y.shape)}")
    return (reference.gate_residual_reference if _in_pytorch(x, y, gate) else operators.gate_residual)(x, y, gate)


def gated_silu(x: Tensor) -> Tensor:
    """silu(a) b for x = [a, b], what stands between the products of a SwiGLU (Shazeer 2020, arXiv:2002.05202).

    Args:
        x: [..., 2 W], any floating dtype. Arithmetic is in float32, rounded once.

    Returns:
        [..., W] in `x`'s dtype.

    Raises:
        ValueError: an odd number of channels.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"gated_silu wants an even number of channels, got {list(x.shape)}")
    return (reference.gated_silu_reference if _in_pytorch(x) else operators.gated_silu)(x)


def gate_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Rows]:
    """`gate_residual`, and `norm_modulate` of what it gives.

    Args: as theirs. `gate` None adds y as it is; without `shift` and `scale` it is the norm alone.

    Returns:
        The sum and its norm, both [B, L, W] in `x`'s dtype, or the norm in 8 bits. The norm is that of the sum as it is
        rounded.

    Raises:
        ValueError: shapes that do not belong together. TypeError: another `dtype`.
    """
    if x.shape != y.shape:
        raise ValueError(f"x and y must have one shape, got {list(x.shape)} and {list(y.shape)}")
    for name, part in (("gate", gate), ("shift", shift), ("scale", scale)):
        if part is not None:
            _check_groups(name, x, part)
    if (shift is None) != (scale is None) or (shift is not None and scale is not None and shift.shape != scale.shape):
        raise ValueError("shift and scale must have one shape, or both be left out")
    _check_width(x, weight, bias)
    _check_kind(dtype)
    if _in_pytorch(x, y, gate, shift, scale, weight, bias):
        total, normal = reference.gate_norm_reference(x, y, gate, shift, scale, weight, bias, eps)
        return total, _rows(normal, dtype)
    total, normal, scales = operators.gate_norm(x, y, gate, shift, scale, weight, bias, eps, dtype)
    return total, normal if dtype is None else Quantized(normal, scales, x.dtype)


def quantize_rows(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Quantized:
    """Each row to `dtype` with a scale of its own, its largest magnitude mapped to 127 (int8) or 448 (float8_e4m3fn).

    Weights [out, in] are quantised once and kept; activations as they come, inside `quantized_linear`.

    Args:
        x: [..., K], any floating dtype, finite. A row of zeros stays zeros.

    Raises:
        TypeError: another `dtype`.
    """
    _check_kind(dtype)
    values, scale = operators.quantize_rows(x.detach(), dtype, False)
    return Quantized(values, scale, x.dtype)


def quantized_linear(x: Rows, weight: Quantized, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """`x @ weight.T + bias` by 8-bit products: activations are quantised by row, results scaled back by row and column.

    There is no gradient: this is for inference with quantised weights.

    Args:
        x: [..., K], any floating dtype, or rows that are in 8 bits already.
        weight: [N, K] from `quantize_rows`; its dtype is the one that products are taken in.
        bias: [N].
        gelu: multiply GELU(x), by its tanh approximation, which is computed as rows are quantised.

    Returns:
        [..., N] in `x`'s dtype. int8 sums are exact; float8 sums are in float32 (tensor cores keep about 14 bits).

    Raises:
        ValueError: shapes that do not belong together.
    """
    values, scale = weight.values, weight.scale
    given = x.values if isinstance(x, Quantized) else x
    if values.ndim != 2 or values.shape[1] != given.shape[-1] or scale.shape != (values.shape[0], 1):
        raise ValueError(
            f"the weight must be [N, K] = [N, {given.shape[-1]}] with scales [N, 1], "
            f"got {list(values.shape)} and {list(scale.shape)}"
        )
    if bias is not None and bias.shape != values.shape[:1]:
        raise ValueError(f"bias must be [N] = [{values.shape[0]}], got {list(bias.shape)}")
    if isinstance(x, Quantized) and (gelu or given.dtype != values.dtype):
        raise ValueError(f"rows in 8 bits must be {values.dtype}, as the weight is, and have their GELU behind them")
    flat = given.detach().reshape(-1, given.shape[-1])
    ready = (flat, x.scale.reshape(-1, 1)) if isinstance(x, Quantized) else None
    # On a CPU calling an operator takes as long as it.
    if given.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = ready or reference.quantize_rows_reference(flat, values.dtype, gelu)
        out = reference.quantized_product_reference(*rows, values, scale, bias, x.dtype)
    else:
        rows = ready or operators.quantize_rows(flat, values.dtype, gelu)
        out = operators.quantized_product(*rows, values, scale, bias, x.dtype)
    return out.view(*given.shape[:-1], values.shape[0])


def _in_pytorch(*tensors: Tensor | None) -> bool:
    """Not by an operator: where a gradient or float64 is wanted, and on devices that the kernels do not serve."""
    wants_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    x = tensors[0]
    assert x is not None, "the first tensor is the one that is worked on"
    return wants_gradient or not x.is_cuda or x.dtype == torch.float64


def _rows(x: Tensor, dtype: torch.dtype | None) -> Rows:
    return x if dtype is None else quantize_rows(x, dtype)


def _check_kind(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in LARGEST:
        raise TypeError(f"dtype must be torch.int8 or torch.float8_e4m3fn, got {dtype}")


def _check_groups(name: str, x: Tensor, part: Tensor) -> None:
    fits = x.ndim == part.ndim == 3 and part.shape[0] in (1, x.shape[0]) and part.shape[2] == x.shape[2]
    if not fits or x.shape[1] % max(part.shape[1], 1):
        raise ValueError(
            f"{name} must be [B, G, W] or [1, G, W] for x [B, L, W], with G a divisor of L, "
            f"got {list(part.shape)} for {list(x.shape)}"
        )


def _check_width(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    for name, part in (("weight", weight), ("bias", bias)):
        if part is not None and part.shape != x.shape[-1:]:
            raise ValueError(f"{name} must be [W] = [{x.shape[-1]}], got {list(part.shape)}")
