"""Dense attention by PyTorch's own kernels, with the log-sum-exp where they can give it.

Masks are bool [B or 1, H or 1, Lq or 1, Lk], True where a query sees a key.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from .reference import attend_reference


def attend_blocks(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """FlexAttention on transposed views; returns [B, L, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
    return flex_attention(q, k, v, block_mask=mask, scale=scale).transpose(1, 2)


def attend_dense(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """SDPA on transposed views; returns [B, L, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
    if mask is None and _cudnn_serves(q, k, v):
        return _cudnn(q, k, v, scale, lse=False)[0].transpose(1, 2)
    if mask is None or q.device.type == "cpu":  # where PyTorch itself gives rows without keys 0, gradients included
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
    mask, empty = _without_empty_rows(mask)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.masked_fill(empty, 0.0).transpose(1, 2)


def attend_dense_with_lse(
    q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns (out [B, L, H, D], lse float32 [B, H, L])."""
    if not _kernels_give_lse(q_BLHD, k_BLHD, v_BLHD):
        return attend_reference(q_BLHD, k_BLHD, v_BLHD, mask, scale)
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
    if mask is None and _cudnn_serves(q, k, v):
        out, lse = _cudnn(q, k, v, scale, lse=True)
        return out.transpose(1, 2), lse
    bias = empty = None
    if mask is not None:
        mask, empty = _without_empty_rows(mask)
        bias = _additive(mask, q)
    if not q.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    elif bias is None and q.dtype != torch.float32:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)
    lse = lse[..., : q.shape[2]].float()  # the memory-efficient kernel pads it to a multiple of 32 queries
    if empty is not None:
        out = out.masked_fill(empty, 0.0)
        lse = lse.masked_fill(empty.squeeze(-1), -torch.inf)
    return out.transpose(1, 2), lse


def _cudnn_serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Is cuDNN's the fastest dense attention here? On Hopper it takes 0.55 of flash attention's time (4,680 queries,
    18,720 keys), but PyTorch does not choose it by itself. It takes any strides, so no ring is copied for it."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or torch.version.hip is not None:
        return False
    if torch.compiler.is_compiling():  # whose graph cannot hold the questions below
        return False
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False
    last = q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    return last and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and k.shape[2] > 1 and _has_cudnn(q.device)


@cache
def _has_cudnn(device: torch.device) -> bool:
    if not torch.backends.cudnn.is_available() or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    probe = torch.zeros((1, 1, 128, 64), device=device, dtype=torch.bfloat16)
    try:
        _cudnn(probe, probe, probe, 1.0, lse=True)
    except RuntimeError:  # an installation whose cuDNN lacks it
        return False
    return True


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float, *, lse: bool) -> tuple[Tensor, Tensor]:
    """q, k, v [B, H, L, D]; returns (out like q, lse float32 [B, H, L] if asked for)."""
    out, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, lse, scale=scale)
    return out, sums.reshape(q.shape[:3]) if lse else sums


def _kernels_give_lse(q: Tensor, k: Tensor, v: Tensor) -> bool:
    # They give no gradient through the log-sum-exp, and a merged result needs one.
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False
    if q.shape[1] == 0 or not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        return False
    if q.is_cuda:
        return q.dtype != torch.float64 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return q.device.type == "cpu"


def _without_empty_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A mask whose empty rows see every key, and which rows those were [..., Lq, 1].

    Kernels disagree on a row without keys (zero, NaN, the mean of the values), and a NaN would spoil gradients even if
    the output were overwritten; a row that sees something is safe everywhere and is set to zero afterwards.
    """
    empty = ~mask.any(-1, keepdim=True)
    return mask | empty, empty


def _additive(mask: Tensor, q: Tensor) -> Tensor:
    """The mask as a bias of 0 and -inf; its rows start at multiples of 16 values, as the CUDA kernels want them."""
    keys = mask.shape[-1]
    bias = q.new_zeros((*mask.shape[:-1], -(-keys // 16) * 16))[..., :keys]
    bias.masked_fill_(~mask, -torch.inf)
    return bias.expand(*q.shape[:3], keys)
