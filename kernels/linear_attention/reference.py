"""Linear attention in plain PyTorch: one operator in three forms that give the same numbers.

Tokens come in blocks of `block`, which see each other whole; the recurrence runs over blocks n:
    S_n = exp(g_n) S_{n-1} + sum of k_j v_j^T over the block's tokens j,     out_i = q_i S_n for its tokens i.
Dimensions: B rows, L tokens, N = L / block, H heads, D key and E value channels. `g` [B, N, H, 1 or D] are logarithms,
at most 0, or None for no decay. Everything is computed in the dtype of `state`, float32 or float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens of a chunk in which scores are formed: longer for one gate per head, whose products are matrix products.
HEAD_CHUNK, CHANNEL_CHUNK = 64, 16
# Blocks of so many tokens, frames as a rule, are cheaper through their state alone than through scores.
FRAME = 32


def naive(
    q_BLHD: Tensor, k_BLHD: Tensor, v_BLHE: Tensor, g: Tensor | None, state_BHDE: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """The definition, unrolled: every query meets every key under its product of gates. Memory L x L x D."""
    q, k, v = (x.to(state_BHDE.dtype) for x in (q_BLHD, k_BLHD, v_BLHE))
    passed = _since_start(q, g, block)
    number = torch.arange(q.shape[1], device=q.device) // block
    seen = (number[:, None] >= number)[:, :, None, None]
    weight = (passed[:, :, None] - passed[:, None]).masked_fill(~seen, -torch.inf).exp()
    out = torch.einsum("bihd,bijhd,bjhd,bjhe->bihe", q, weight.expand(-1, -1, -1, -1, q.shape[-1]), k, v)
    out = out + torch.einsum("bihd,bhde->bihe", q * passed.exp(), state_BHDE)
    left = (passed[:, -1:] - passed).exp()
    state = passed[:, -1].exp().unsqueeze(-1) * state_BHDE + torch.einsum("bjhd,bjhe->bhde", k * left, v)
    return out, state


def recurrent(
    q_BLHD: Tensor, k_BLHD: Tensor, v_BLHE: Tensor, g: Tensor | None, state_BHDE: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """Block after block. The cheapest form where blocks are frames: two products of 2 L D E each, no score at all."""
    dtype, state, outs = state_BHDE.dtype, state_BHDE, []
    q, k, v = (x.unflatten(1, (-1, block)).transpose(2, 3).to(dtype) for x in (q_BLHD, k_BLHD, v_BLHE))
    for n in range(q.shape[1]):
        new = k[:, n].transpose(-1, -2) @ v[:, n]
        state = new + (state if g is None else g[:, n].exp().unsqueeze(-1) * state)
        outs.append(q[:, n] @ state)
    return torch.stack(outs, dim=1).transpose(2, 3).flatten(1, 2), state


def chunked(
    q_BLHD: Tensor, k_BLHD: Tensor, v_BLHE: Tensor, g: Tensor | None, state_BHDE: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """Chunks of whole small blocks: scores inside a chunk, the state between chunks.

    Lightning Attention-2 (arXiv:2401.04658, algorithm 1); with one gate per channel, GLA (arXiv:2312.06635, section 4).
    Gates enter as exp(G_i - G_j) with i at or after j, at most 1: nothing overflows however strong they are.
    """
    size = CHANNEL_CHUNK if g is not None and g.shape[-1] > 1 else HEAD_CHUNK
    size = max(size // block, 1) * block
    number = torch.arange(size, device=q_BLHD.device) // block
    state, outs = state_BHDE, []
    for start in range(0, q_BLHD.shape[1], size):
        q, k, v = (x[:, start : start + size].to(state.dtype) for x in (q_BLHD, k_BLHD, v_BLHE))
        length = q.shape[1]
        gates = None if g is None else g[:, start // block : (start + length) // block]
        passed = _since_start(q, gates, block)
        seen = (number[:length, None] >= number[:length])[:, :, None, None]
        weight = (passed[:, :, None] - passed[:, None]).masked_fill(~seen, -torch.inf).exp()
        if weight.shape[-1] == 1:
            scores = torch.einsum("bihd,bjhd->bijh", q, k) * weight.squeeze(-1)
        else:
            scores = torch.einsum("bihd,bijhd,bjhd->bijh", q, weight, k)
        out = torch.einsum("bijh,bjhe->bihe", scores, v)
        outs.append(out + torch.einsum("bihd,bhde->bihe", q * passed.exp(), state))
        left = (passed[:, -1:] - passed).exp()
        state = passed[:, -1].exp().unsqueeze(-1) * state + torch.einsum("bjhd,bjhe->bhde", k * left, v)
    return torch.cat(outs, dim=1), state


def _since_start(q: Tensor, g: Tensor | None, block: int) -> Tensor:
    """Logarithm of what is left, at each token, of the state from before the first: [B, L, H, 1 or D]."""
    if g is None:
        return q.new_zeros((*q.shape[:3], 1))
    return g.to(q.dtype).cumsum(1).repeat_interleave(block, dim=1)
