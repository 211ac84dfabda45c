"""VAR's layers: the prompt is one vector that scales, shifts and gates them, instead of tokens that are attended to.

Source: VAR (arXiv:2404.02905), its public code for what the paper leaves open: queries and keys of unit length with a
learnt temperature for each head, tanh-approximated GELU, places that are learnt and not turned.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import attend

if TYPE_CHECKING:
    from .token_layers import Where

PARTS = 6  # what a layer is told: two gates, two scales, two shifts


class AdaptiveBlock(nn.Module):
    """Attention among tokens, then feed-forward, each told by the prompt.

    Args:
        shared: the prompt is projected once for all layers (`Modulation`), and a layer adds its own offsets.
    """

    def __init__(self, dim: int, heads: int, hidden: int, *, shared: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = None if shared else Modulation(dim, PARTS)
        self.offsets = nn.Parameter(torch.zeros(PARTS, dim)) if shared else None
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.temperature = nn.Parameter(torch.full((heads,), math.log(4.0)))
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor, where: Where, layer: int) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = self._told(where).unbind(2)
        q, k, v = self.to_qkv(self.norm(x) * (scale1 + 1) + shift1).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q = F.normalize(q, dim=-1) * self.temperature.clamp_max(math.log(100)).exp()[:, None]
        k = F.normalize(k, dim=-1)
        if where.cache is not None:
            k, v = where.cache[layer].append(k, v)
        x = x + gate1 * self.to_out(attend(q, k, v, mask=where.mask, scale=1.0).flatten(2))
        inner = F.gelu(self.up(self.norm(x) * (scale2 + 1) + shift2), approximate="tanh")
        return x + gate2 * self.down(inner)

    def _told(self, where: Where) -> Tensor:
        """[B, 1, 6, D]."""
        assert where.told is not None, "a model of adaptive layers tells them the prompt"
        if self.modulation is not None:
            return self.modulation(where.told)
        assert self.offsets is not None, "a layer has a projection or offsets"
        return where.told + self.offsets


class Modulation(nn.Module):
    """A prompt [B, D] as [B, 1, parts, D]."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(dim, parts * dim)

    def forward(self, prompt: Tensor) -> Tensor:
        return self.linear(F.silu(prompt)).unflatten(-1, (self.parts, -1))[:, None]


class AdaptiveNorm(nn.Module):
    """The last norm, told by the prompt."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = Modulation(dim, 2)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        scale, shift = self.modulation(prompt).unbind(2)
        return self.norm(x) * (scale + 1) + shift
