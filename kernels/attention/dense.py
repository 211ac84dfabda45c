"""Dense attention by PyTorch's own kernels, with the log-sum-exp where they can give it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .reference import attend_reference


def attend_dense(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """SDPA on transposed views; returns [B, L, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
    if mask is None:
        return scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    mask, empty = _without_empty_rows(mask)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.masked_fill(empty, 0.0).transpose(1, 2)


def attend_dense_with_lse(
    q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns (out [B, L, H, D], lse float32 [B, H, L])."""
    # PyTorch's kernels give no gradient through the log-sum-exp, and a merged result needs one.
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BLHD, k_BLHD, v_BLHD))
    half = q_BLHD.dtype in (torch.float16, torch.bfloat16)
    aligned = q_BLHD.shape[-1] % 8 == 0 and q_BLHD.shape[-1] <= 256
    if not q_BLHD.is_cuda or differentiable or not aligned or q_BLHD.dtype == torch.float64:
        return attend_reference(q_BLHD, k_BLHD, v_BLHD, mask, scale)
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
    if mask is None and half:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
        return out.transpose(1, 2), lse
    bias, empty = None, None
    if mask is not None:
        mask, empty = _without_empty_rows(mask)
        bias = _aligned_bias(mask, q, k.shape[2])
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)
    lse = lse[..., : q.shape[2]]  # the kernel pads queries to a multiple of 32
    if empty is not None:
        out = out.masked_fill(empty, 0.0)
        lse = lse.masked_fill(empty.squeeze(-1), -torch.inf)
    return out.transpose(1, 2), lse


def _without_empty_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A mask whose empty rows see every key, and which rows those were [..., Lq, 1].

    Backends disagree on a row without keys (zero, NaN, the mean of the values), and a NaN would spoil gradients even
    if the output were overwritten; a row that sees something is safe everywhere and is set to zero afterwards.
    """
    empty = ~mask.any(-1, keepdim=True)
    return mask | empty, empty


def _aligned_bias(mask: Tensor, q: Tensor, keys: int) -> Tensor:
    """The mask as an additive bias whose rows start at multiples of 16 bytes, as the kernel wants them."""
    shape = mask.shape[:-1] + (-(-keys // 8) * 8,)
    bias = q.new_zeros(shape)
    bias[..., :keys].masked_fill_(~mask, -torch.inf)
    return bias[..., :keys].expand(*q.shape[:3], keys)
