"""Frames of residual codes as vectors: the codes of all levels of a frame are embedded and summed.

Shapes: B batch, Q levels, T frames, V codes per level, D width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class LevelTokens(nn.Module):
    """Embeddings of the codes of every level, and of a code that is not known."""

    def __init__(self, levels: int, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Embedding(vocab_size, dim) for _ in range(levels))
        self.masks = nn.Parameter(torch.randn(levels, dim) * 0.02)
        for level in self.levels:
            nn.init.normal_(cast("nn.Embedding", level).weight, std=0.02)

    def embed(self, level: int, tokens: Tensor) -> Tensor:
        """Codes of one level [B, T] to [B, T, D]."""
        return self.levels[level](tokens)

    def total(self, codes: Tensor, first: int = 0) -> Tensor:
        """Codes [B, q, T] of the levels from `first` on, summed to [B, T, D]; zeros if there are none."""
        vectors = self.masks.new_zeros(codes.shape[0], codes.shape[2], self.masks.shape[1])
        for number, tokens in enumerate(codes.unbind(1)):
            vectors = vectors + self.embed(first + number, tokens)
        return vectors

    def shown(self, level: int, tokens: Tensor, known: Tensor) -> Tensor:
        """Codes [B, T] of a level where `known` [B, T], its mask elsewhere: [B, T, D]."""
        return torch.where(known[..., None], self.embed(level, tokens), self.masks[level])


def embed_together(embedding: nn.Embedding, tokens: Tensor) -> Tensor:
    """Tokens [B, K], or [B, K, m] with m of them at once, to [B, K, D]."""
    vectors = embedding(tokens)
    return vectors if tokens.ndim == 2 else vectors.sum(dim=2)
