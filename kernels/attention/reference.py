"""Attention in plain PyTorch: online softmax over key chunks, and the merging of partial results.

Dimensions: B rows, L tokens, H heads, D channels per head. Everything is computed in float32, or in float64 where
the inputs are float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KEY_CHUNK = 1024


def attend_reference(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, mask: Tensor | None, scale: float):
    """Returns (out [B, L, H, D] in q's dtype, lse float32 [B, H, L]); extra memory does not grow with the keys."""
    dtype = torch.promote_types(q_BLHD.dtype, torch.float32)
    q = q_BLHD.transpose(1, 2).to(dtype) * scale
    k, v = k_BLHD.transpose(1, 2), v_BLHD.transpose(1, 2)
    highest = q.new_full(q.shape[:3], -torch.inf)
    total = q.new_zeros(q.shape[:3])
    out = torch.zeros_like(q)
    for start in range(0, k.shape[2], KEY_CHUNK):
        keys = slice(start, start + KEY_CHUNK)
        scores = q @ k[:, :, keys].to(dtype).transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask[..., keys], -torch.inf)
        before, highest = highest, torch.maximum(highest, scores.amax(-1))
        # A row that has seen no key yet has highest = -inf; -inf - -inf is NaN, so it is shifted by 0 instead.
        shift = highest.masked_fill(highest == -torch.inf, 0.0)
        weights = (scores - shift.unsqueeze(-1)).exp()
        decay = (before - shift).exp()
        total = total * decay + weights.sum(-1)
        out = out * decay.unsqueeze(-1) + weights @ v[:, :, keys].to(dtype)
    out = out / total.masked_fill(total == 0.0, 1.0).unsqueeze(-1)
    return out.transpose(1, 2).to(q_BLHD.dtype), (highest + total.log()).float()


def merge_reference(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Softmax over the union of the parts' keys; see `millstream.kernels.merge`."""
    lses = torch.stack([lse for _, lse in parts])
    lse = lses.logsumexp(0)
    weights = (lses - lse.masked_fill(lse == -torch.inf, 0.0)).exp().transpose(2, 3).unsqueeze(-1)
    merged = weights[0] * parts[0][0]
    for weight, (out, _) in zip(weights[1:], parts[1:], strict=True):
        merged = merged + weight * out
    return merged.to(parts[0][0].dtype), lse
