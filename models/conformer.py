"""Conformer blocks: attention that sees the whole clip, and a short convolution that sees the neighbours.

Source: Gulati et al. 2020 (arXiv:2005.08100), figure 1: half a feed-forward, attention, convolution, half a
feed-forward. As everywhere in this house places are rotary, heads are normalised, and norms are RMS; the convolution is
normalised per frame where the paper has BatchNorm, whose statistics would tie the clips of a batch together.
Shapes: B batch, L frames, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import attend
from .token_layers import Rotary, SelfBlock, Stack, Where


class FeedForward(nn.Module):
    """Norm, up, swish, down."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.up, self.down = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(self.norm(x))))


class FrameConvolution(nn.Module):
    """Neighbouring frames mixed channel by channel, between two gates."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.norm, self.norm_mixed = (nn.RMSNorm(dim, eps=1e-6) for _ in range(2))
        self.up, self.down = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.taps = nn.Parameter(torch.randn(kernel, dim) * kernel**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.up(self.norm(x)), dim=-1)
        # As sums of shifted frames the channels stay last, where the products before and after have them.
        kernel, frames = self.taps.shape[0], x.shape[1]
        padded = F.pad(x, (0, 0, kernel // 2, kernel // 2))
        mixed = padded[:, :frames] * self.taps[0]
        for tap in range(1, kernel):
            mixed = mixed + padded[:, tap : tap + frames] * self.taps[tap]
        return self.down(F.silu(self.norm_mixed(mixed)))


class ConformerBlock(SelfBlock):
    """One block; bidirectional, so it takes no cache."""

    def __init__(self, dim: int, heads: int, hidden: int, kernel: int) -> None:
        super().__init__(dim, heads, hidden)
        self.feed_forward = FeedForward(dim, hidden)  # the second one; the block's norm2 ends it
        self.first = FeedForward(dim, hidden)
        self.convolution = FrameConvolution(dim, kernel)

    def forward(self, x: Tensor, where: Where, layer: int) -> Tensor:
        x, q, k, v = self.before(x, where.rotary)
        return self.after(x, attend(q, k, v, mask=where.mask))

    def before(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Up to the attention: x, and queries, keys and values [B, L, H, d]."""
        x = x + 0.5 * self.first(x)
        return x, *self.project(x, rotary)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """From the attention [B, L, H, d] on."""
        x = x + self.to_out(attended.flatten(2))
        x = x + self.convolution(x)
        return self.norm2(x + 0.5 * self.feed_forward(x))


class Conformer(Stack):
    """Conformer blocks in a row.

    Raises:
        ValueError: a kernel that has no middle.
    """

    def __init__(self, layers: int, dim: int, heads: int, hidden: int, kernel: int) -> None:
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that a frame is in the middle of it, got {kernel}")
        nn.Module.__init__(self)
        self.blocks = nn.ModuleList(ConformerBlock(dim, heads, hidden, kernel) for _ in range(layers))
