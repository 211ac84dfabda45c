"""A byte-level prompt encoder, small enough to train together with a world.

Bytes need no vocabulary and no download; convolutions over them learn parts of words, so that a phrasing that was never
seen still lands near the ones that were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from .packed import PackedModelMixin

PADDING = 256


class ByteTextEncoder(PackedModelMixin, ModelMixin, ConfigMixin):
    """Prompts to a fixed number of tokens [B, tokens, dim].

    Args:
        dim: width of the tokens.
        tokens: how many a prompt becomes, whatever its length: learned queries read the text.
        layers, heads: of the transformer over bytes.
        max_bytes: longer prompts are cut here.
    """

    @register_to_config
    def __init__(self, dim: int = 128, tokens: int = 8, layers: int = 2, heads: int = 4, max_bytes: int = 192) -> None:
        super().__init__()
        self.embedding = nn.Embedding(PADDING + 1, dim, padding_idx=PADDING)
        self.convolution = nn.Conv1d(dim, dim, 5, padding=2)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, heads, 2 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.queries = nn.Parameter(torch.randn(tokens, dim) * 0.02)
        self.reader = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """UTF-8 bytes, lower case, one space before and after: int64 [B, max_bytes], padded with 256."""
        rows = torch.full((len(prompts), self.config["max_bytes"]), PADDING)
        for row, prompt in zip(rows, prompts):
            text = f" {' '.join(prompt.lower().split())} ".encode()[: self.config["max_bytes"]]
            row[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return rows

    def forward(self, input_ids: Tensor) -> Tensor:
        """`tokenize`d prompts [B, N] to [B, tokens, dim]."""
        padding = input_ids == PADDING
        x = self.embedding(input_ids)
        x = x + _sinusoids(input_ids.shape[1], self.config["dim"], input_ids.device).to(x.dtype)
        x = x.masked_fill(padding[..., None], 0.0)
        x = x + F.gelu(self.convolution(x.transpose(1, 2))).transpose(1, 2)
        for block in self.blocks:
            x = block(x, src_key_padding_mask=padding)
        queries = self.queries.expand(x.shape[0], -1, -1)
        read, _ = self.reader(queries, x, x, key_padding_mask=padding, need_weights=False)
        return self.norm(queries + read)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to tokens [B, tokens, dim] on the model's device."""
        return self(self.tokenize(prompts).to(self.queries.device))

    @staticmethod
    def summary(tokens: Tensor) -> Tensor:
        """One unit vector [B, dim] per prompt, for telling which prompts mean alike."""
        return F.normalize(tokens.float().mean(dim=1), dim=-1)


def _sinusoids(length: int, dim: int, device: torch.device) -> Tensor:
    frequencies = torch.exp(torch.arange(0, dim, 2, device=device) * (-math.log(1000.0) / dim))
    angles = torch.arange(length, device=device)[:, None] * frequencies
    return 0.1 * torch.cat([angles.sin(), angles.cos()], dim=-1)
