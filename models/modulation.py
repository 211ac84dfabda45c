"""How a block's branches are modulated by the timestep and joined to the residual stream.

Shapes: B batch, L tokens, D model width, G groups of L / G neighbouring tokens that share a timestep.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.fused import gate_norm, gate_residual, norm_modulate


def in_one_kernel(x: Tensor) -> bool:
    """Do the fused kernels serve here? Not for gradients, and `torch.compile` fuses better what it can see."""
    return x.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def modulated(norm: FP32LayerNorm, x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Any:
    """norm(x) (1 + scale) + shift, `x` [B, L, D] with one shift and scale [B, G, D] per group of L / G tokens.

    A tensor; with the `dtype` of 8 bits that the next product wants, `Rows`: where quantising takes a pass of its own,
    it is left to the product.
    """
    if in_one_kernel(x):
        return norm_modulate(x, shift, scale, eps=norm.eps, dtype=dtype)
    if shift.shape[:2] == (1, 1):  # then they are a norm's own weights
        return F.layer_norm(x.to(shift.dtype), shift.shape[2:], 1 + scale[0, 0], shift[0, 0], norm.eps).type_as(x)
    normal = norm(x.float())
    if shift.shape[1] == 1:
        return torch.addcmul(shift, normal, 1 + scale).type_as(x)
    groups = (shift.shape[1], -1)
    wide = torch.addcmul(shift[:, :, None], normal.unflatten(1, groups), 1 + scale[:, :, None])
    return wide.flatten(1, 2).type_as(x)


def gated(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """x + y gate, grouped as in `modulated`; x + y where there is no gate."""
    if gate is None:
        return x + y
    if in_one_kernel(x):
        return gate_residual(x, y, gate)
    if gate.shape[1] == 1:
        return torch.addcmul(x.float(), y.float(), gate).type_as(x)
    groups = (gate.shape[1], -1)
    wide = torch.addcmul(x.float().unflatten(1, groups), y.float().unflatten(1, groups), gate[:, :, None])
    return wide.flatten(1, 2).type_as(x)


def joined(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    norm: FP32LayerNorm | nn.Identity,
    modulation: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Any]:
    """`gated`, and what `norm` makes of it, `modulated` by shift and scale if given, in `dtype` as there."""
    if isinstance(norm, FP32LayerNorm) and in_one_kernel(x):
        shift, scale = modulation or (None, None)
        own = {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}
        return gate_norm(x, y, gate, shift=shift, scale=scale, dtype=dtype, **own)
    x = gated(x, y, gate)
    if modulation is None or isinstance(norm, nn.Identity):
        return x, norm(x.float()).type_as(x)
    return x, modulated(norm, x, *modulation, dtype)
