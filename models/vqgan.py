"""The picture codecs of published token models: LlamaGen's, which ARPG and MaskGIL draw with, and VAR's.

Both are VQGAN's convolutions (Esser et al. 2021, arXiv:2012.09841), which diffusers has, around a codebook: one map of
unit vectors (LlamaGen, arXiv:2406.06525), or a pyramid of residual maps (VAR, arXiv:2404.02905).
`checkpoints.load_token_codec` reads their weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 32  # of every norm, as published


class VQGAN(ModelMixin, ConfigMixin):
    """Pictures [B, 3, H, W] in [0, 1] to tokens int64 [B, N] and back.

    Args:
        widths: channels at 1, 1/2, 1/4, ... of the picture's size.
        blocks: residual blocks at each size of the encoder; the decoder has one more.
        latent_channels: between the convolutions and the projections to codes.
        codebook_size, code_channels: how many codes, and how long.
        unit_codes: codes and latents are compared, and decoded, with length 1.
        kernel: of the projections.
        scale_sides: sides of the residual maps, growing, the last the latents' own; None for one map.
        shared_mends: how many convolutions the maps share that mend what upsampling blurs.
    """

    @register_to_config
    def __init__(
        self,
        widths: Sequence[int] = (128, 128, 256, 256, 512),
        blocks: int = 2,
        latent_channels: int = 256,
        codebook_size: int = 16384,
        code_channels: int = 8,
        unit_codes: bool = True,
        kernel: int = 1,
        scale_sides: Sequence[int] | None = None,
        shared_mends: int = 0,
    ) -> None:
        super().__init__()
        plain, shape = len(widths) - 1, {"block_out_channels": tuple(widths), "layers_per_block": blocks}
        down, up = ("DownEncoderBlock2D",) * plain, ("UpDecoderBlock2D",) * plain
        shape |= {"norm_num_groups": GROUPS, "act_fn": "silu"}
        self.encoder = Encoder(
            3, latent_channels, down_block_types=(*down, "AttnDownEncoderBlock2D"), double_z=False, **shape
        )
        self.decoder = Decoder(latent_channels, 3, up_block_types=("AttnUpDecoderBlock2D", *up), **shape)
        self.to_codes = nn.Conv2d(latent_channels, code_channels, kernel, padding=kernel // 2)
        self.from_codes = nn.Conv2d(code_channels, latent_channels, kernel, padding=kernel // 2)
        self.codes = nn.Parameter(torch.randn(codebook_size, code_channels))
        self.mends = nn.ModuleList(nn.Conv2d(code_channels, code_channels, 3, padding=1) for _ in range(shared_mends))

    def codebook(self) -> Tensor:
        """[codebook_size, code_channels], as the decoder sees them."""
        return F.normalize(self.codes, dim=-1) if self.config["unit_codes"] else self.codes

    def embed(self, tokens: Tensor) -> Tensor:
        """Codes [..., C] of tokens [...]."""
        return F.embedding(tokens, self.codebook())

    def mend(self, level: int, latents: Tensor) -> Tensor:
        """VAR's phi of a scale, [B, C, h, w] to the same shape: half of it goes around a convolution."""
        if not self.mends:
            return latents
        shared = self.mends[mend_of(level, len(self.config["scale_sides"]), len(self.mends))]
        return 0.5 * latents + 0.5 * shared(latents)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] to tokens [B, N], scale after scale. H and W are multiples of the factor."""
        factor = 2 ** (len(self.config["widths"]) - 1)
        if pictures.ndim != 4 or pictures.shape[1] != 3 or any(side % factor for side in pictures.shape[2:]):
            raise ValueError(
                f"pictures must be [B, 3, H, W], H and W multiples of {factor}, got {list(pictures.shape)}"
            )
        latents = self.to_codes(self.encoder(2 * pictures - 1)).float()
        sides = self.config["scale_sides"]
        if sides is None:
            return self._nearest(latents)
        if latents.shape[2:] != (sides[-1], sides[-1]):
            wanted = sides[-1] * factor
            raise ValueError(f"this codec's pyramid is of pictures {wanted} x {wanted}, got {list(pictures.shape[2:])}")
        tokens = []
        for level, side in enumerate(sides):
            tokens.append(self._nearest(F.interpolate(latents, size=(side, side), mode="area")))
            latents = latents - self._spread(level, tokens[-1]).float()
        return torch.cat(tokens, dim=1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N] of a square picture to pictures [B, 3, S, S] in [0, 1]."""
        picture = self.decoder(self.from_codes(self.latents_of(tokens)))
        return (picture.float() / 2 + 0.5).clamp(0, 1)

    def latents_of(self, tokens: Tensor) -> Tensor:
        """What tokens mean to the decoder: [B, C, h, w]."""
        sides = self.config["scale_sides"]
        if sides is None:
            return _map(self.embed(tokens))
        parts = tokens.split([side * side for side in sides], dim=1)
        return torch.stack([self._spread(level, part) for level, part in enumerate(parts)]).sum(0)

    def _spread(self, level: int, tokens: Tensor) -> Tensor:
        """What one map adds to the latents, which are as large as the last map."""
        small, side = _map(self.embed(tokens)), self.config["scale_sides"][-1]
        if small.shape[-1] != side:
            small = F.interpolate(small, size=(side, side), mode="bicubic")
        return self.mend(level, small)

    def _nearest(self, latents: Tensor) -> Tensor:
        points, codes = latents.flatten(2).transpose(1, 2), self.codebook().float()
        if self.config["unit_codes"]:
            points = F.normalize(points, dim=-1)
        return (codes.square().sum(dim=1) - 2 * points @ codes.T).argmin(dim=-1)


def mend_of(level: int, levels: int, mends: int) -> int:
    """Which of `mends` shared convolutions serves a level: the nearest on a line, on which VAR sets four of them a
    little further apart. A level half-way between two goes where NumPy's rounding puts it, as published."""
    margin = 1 / (3 if mends == 4 else 2) / mends
    places = np.linspace(margin, 1 - margin, mends)
    return int(np.argmin(np.abs(places - level / max(1, levels - 1))))


def _map(codes: Tensor) -> Tensor:
    """[B, N, C] as [B, C, s, s]."""
    side = math.isqrt(codes.shape[1])
    if side * side != codes.shape[1]:
        raise ValueError(f"the tokens of a square picture are a square number, got {codes.shape[1]}")
    return codes.transpose(1, 2).unflatten(2, (side, side))
