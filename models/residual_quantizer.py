"""Residual vector quantisation: every level says what the levels before left over.

Codebooks are fixed random ones behind a learnt linear map, as in `vq_codec` (SimVQ, arXiv:2411.02038), and live in few
channels (Improved RVQGAN, arXiv:2306.06546): that keeps every code in use and the whole small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class QuantizerLevel(nn.Module):
    codes: Tensor

    def __init__(self, channels: int, codebook_size: int, codebook_channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, codebook_channels), nn.Linear(codebook_channels, channels)
        self.register_buffer("codes", torch.randn(codebook_size, codebook_channels))
        self.code_projection = nn.Linear(codebook_channels, codebook_channels)
        nn.init.eye_(self.code_projection.weight)

    def embed(self, codes: Tensor) -> Tensor:
        """[...] to [..., C]."""
        return self.up(self.code_projection(F.embedding(codes, self.codes)))

    def nearest(self, x: Tensor) -> Tensor:
        """Codes [..] nearest to x [.., C]."""
        book = self.code_projection(self.codes)
        # |p - c|^2 without |p|^2, which is the same for all codes.
        return (book.square().sum(dim=1) - 2 * self.down(x) @ book.T).argmin(dim=-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the level makes of x [.., C], with gradients straight through, and its loss [..]."""
        small, codes = self.down(x), self.nearest(x.detach())
        drawn = self.code_projection(F.embedding(codes, self.codes))
        loss = (drawn - small.detach()).square().mean(-1) + 0.25 * (small - drawn.detach()).square().mean(-1)
        return self.up(small + (drawn - small).detach()), loss


class ResidualQuantizer(nn.Module):
    """Latents [B, C, T] to codes int64 [B, Q, T], coarse to fine, and back."""

    def __init__(self, channels: int, levels: int, codebook_size: int, codebook_channels: int = 16) -> None:
        super().__init__()
        self.levels = nn.ModuleList(QuantizerLevel(channels, codebook_size, codebook_channels) for _ in range(levels))

    def _levels(self) -> Sequence[QuantizerLevel]:
        return cast("Sequence[QuantizerLevel]", self.levels)

    def encode(self, latents: Tensor) -> Tensor:
        left, found = latents.transpose(1, 2), []
        for level in self._levels():
            found.append(level.nearest(left))
            left = left - level.embed(found[-1])
        return torch.stack(found, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, q, T] of the first q levels."""
        parts = [level.embed(code) for level, code in zip(self._levels(), codes.unbind(1))]
        return torch.stack(parts).sum(0).transpose(1, 2)

    def forward(self, latents: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
        """For training: latents through the first `used` [B] levels, gradients straight through, and the loss."""
        x = latents.transpose(1, 2).float()
        drawn, loss = torch.zeros_like(x), x.new_zeros(())
        for number, level in enumerate(self._levels()):
            made, wrong = level(x - drawn.detach())
            on = (number < used)[:, None, None]
            drawn = drawn + made * on
            loss = loss + (wrong * on[..., 0]).mean()
        return drawn.transpose(1, 2), loss + F.mse_loss(drawn, x.detach())
