"""Pictures to discrete tokens and back: one map of tokens, or VAR's pyramid of residual maps.

The codebook is a fixed random one behind a learnt linear map (SimVQ, Zhu et al. 2024, arXiv:2411.02038): moving the map
moves every code, so none is left behind and dies, and training needs no restarts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from .frame_codec import decoder_stack, encoder_stack
from .packed import PackedModelMixin


class Quantized(NamedTuple):
    """`latents` [B, C, h, w] that the decoder sees (gradients pass straight through), `tokens` [B, N], and the `loss`
    that draws codes to latents and latents to codes."""

    latents: Tensor
    tokens: Tensor
    loss: Tensor


class VQAutoencoder(PackedModelMixin, ModelMixin, ConfigMixin):
    """Pictures [B, 3, S, S] in [0, 1] to tokens int64 [B, N] and back.

    Args:
        sample_size: S, a multiple of 2 ** len(widths).
        codebook_size: how many codes there are.
        latent_channels: length of a code.
        widths: channels at 1/2, 1/4, ... of the picture's size, multiples of 8.
        encoder_blocks, decoder_blocks: residual blocks at each size.
        scale_sides: sides of the maps of the multi-scale residual mode, growing, the last the latents' own side; None
            for one map. Tokens are then those of all scales, coarse to fine, one after the other.

    Raises:
        ValueError: sizes that don't fit together.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        codebook_size: int = 1024,
        latent_channels: int = 16,
        widths: Sequence[int] = (48, 96),
        encoder_blocks: Sequence[int] = (1, 1),
        decoder_blocks: Sequence[int] = (2, 3),
        scale_sides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        _check(sample_size, widths, scale_sides)
        self.encoder = encoder_stack(latent_channels, widths, encoder_blocks)
        self.decoder = decoder_stack(latent_channels, widths, decoder_blocks)
        self.register_buffer("codes", torch.randn(codebook_size, latent_channels))
        self.code_projection = nn.Linear(latent_channels, latent_channels)
        nn.init.eye_(self.code_projection.weight)
        self.mends = nn.ModuleList(
            nn.Conv2d(latent_channels, latent_channels, 3, padding=1) for _ in scale_sides or ()
        )  # VAR's phi, which mends what upsampling blurs; half of the map goes around it

    @property
    def sides(self) -> Sequence[int]:
        """Sides of the token maps, the last the latents' own."""
        return self.config["scale_sides"] or [self.config["sample_size"] // 2 ** len(self.config["widths"])]

    def codebook(self) -> Tensor:
        """[codebook_size, C]."""
        return self.code_projection(self.codes)

    def embed(self, tokens: Tensor) -> Tensor:
        """Codes [..., C] of tokens [...]."""
        return F.embedding(tokens, self.codebook())

    def mend(self, level: int, latents: Tensor) -> Tensor:
        """VAR's phi of a scale: latents [B, C, h, w] to the same shape."""
        return 0.5 * latents + 0.5 * self.mends[level](latents)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] in [0, 1] to tokens [B, N]."""
        side = self.config["sample_size"]
        if pictures.shape[1:] != (3, side, side):
            raise ValueError(f"pictures must be [B, 3, {side}, {side}], got {list(pictures.shape)}; resize them first")
        return self.quantize(self.encode_raw(pictures)).tokens

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N], or those of the first maps alone, to pictures [B, 3, S, S] in [0, 1]."""
        return self.decode_raw(self.latents_of(tokens)).clamp(0, 1)

    def encode_raw(self, pictures: Tensor) -> Tensor:
        """Latents [B, C, h, w], each of unit variance over its channels."""
        raw = self.encoder((pictures * 2 - 1).contiguous(memory_format=torch.channels_last))
        return F.layer_norm(raw.movedim(1, -1), raw.shape[1:2]).movedim(-1, 1)

    def decode_raw(self, latents: Tensor) -> Tensor:
        """The inverse of `encode_raw`; not clamped."""
        return self.decoder(latents.contiguous(memory_format=torch.channels_last)) / 2 + 0.5

    def latents_of(self, tokens: Tensor) -> Tensor:
        """What tokens [B, N], or those of the first maps alone, mean to the decoder: [B, C, h, w]."""
        sizes = [side * side for side in self.sides]
        shown = [size for size, end in zip(sizes, accumulate(sizes)) if end <= tokens.shape[1]]
        parts = tokens.split(shown, dim=1)
        if not self.mends:
            return self._map(parts[0])
        return sum(
            (self._spread(level, self._map(part)) for level, part in enumerate(parts)), torch.zeros(()).to(self.codes)
        )

    def quantize(self, latents: Tensor) -> Quantized:
        """The nearest codes of latents [B, C, h, w]; in the multi-scale mode, scale after scale of what is left over.

        Source: VAR (arXiv:2404.02905), algorithm 1.
        """
        with torch.autocast(latents.device.type, enabled=False):  # in half precision the nearest code is often another
            latents = latents.float()
            drawn, tokens = self._nearest_maps(latents)
        loss = F.mse_loss(drawn, latents.detach()) + 0.25 * F.mse_loss(latents, drawn.detach())
        return Quantized(latents + (drawn - latents).detach(), tokens, loss)

    def _nearest_maps(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """What the nearest codes draw [B, C, h, w], and which they are [B, N]."""
        if not self.mends:
            tokens = self.nearest(latents)
            return self._map(tokens), tokens
        drawn, found = torch.zeros_like(latents), []
        for level, side in enumerate(self.sides):
            left = (latents - drawn).detach()
            found.append(self.nearest(F.interpolate(left, size=(side, side), mode="area")))
            drawn = drawn + self._spread(level, self._map(found[-1]))
        return drawn, torch.cat(found, dim=1)

    def nearest(self, latents: Tensor) -> Tensor:
        """Codes [B, h * w] nearest to latents [B, C, h, w]."""
        points, codes = latents.detach().flatten(2).transpose(1, 2).float(), self.codebook().detach().float()
        # |p - c|^2 without |p|^2, which is the same for all codes.
        return (codes.square().sum(dim=1) - 2 * points @ codes.T).argmin(dim=-1)

    def _map(self, tokens: Tensor) -> Tensor:
        side = math.isqrt(tokens.shape[1])
        return self.embed(tokens).transpose(1, 2).unflatten(2, (side, side))

    def _spread(self, level: int, small: Tensor) -> Tensor:
        side = self.sides[-1]
        if small.shape[-1] != side:
            small = F.interpolate(small, size=(side, side), mode="bicubic")
        return self.mend(level, small)


def _check(sample_size: int, widths: Sequence[int], scale_sides: Sequence[int] | None) -> None:
    factor = 2 ** len(widths)
    if sample_size % factor:
        raise ValueError(f"sample_size must be a multiple of {factor} (2 for each width), got {sample_size}")
    if scale_sides is not None:
        growing = all(a < b for a, b in pairwise(scale_sides))
        if not growing or scale_sides[-1] != sample_size // factor:
            raise ValueError(
                f"scale_sides must grow and end at the latents' side {sample_size // factor}, got {list(scale_sides)}"
            )
