"""A small autoencoder for live worlds: every frame on its own, 8 times smaller each way.

Looking at one frame at a time makes streaming trivial (any chunking equals the whole, and there is nothing to flush)
and keeps the decoder within a few milliseconds on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from .packed import PackedModelMixin


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(8, channels) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        y = self.conv1(F.silu(self.norm1(x), inplace=True))
        return self.conv2(F.silu(self.norm2(y), inplace=True)).add_(x)


def encoder_stack(latent_channels: int, widths: Sequence[int], blocks: Sequence[int]) -> nn.Sequential:
    """Pictures [N, 3, H, W] to latents at 1 / 2 ** len(widths) of their size, with so many residual blocks per size."""
    down: list[nn.Module] = []
    channels = 3
    for width, count in zip(widths, blocks, strict=True):
        kernel = 3 if channels == 3 else 1
        down += [nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, width, kernel, padding=kernel // 2)]
        down += [ResidualBlock(width) for _ in range(count)]
        channels = width
    return nn.Sequential(
        *down, nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, latent_channels, 3, padding=1)
    )


def decoder_stack(latent_channels: int, widths: Sequence[int], blocks: Sequence[int]) -> nn.Sequential:
    """The way back; `widths` and `blocks` in the order of `encoder_stack`."""
    up: list[nn.Module] = [nn.Conv2d(latent_channels, widths[-1], 3, padding=1)]
    for width, smaller, count in zip(widths[::-1], (*widths[-2::-1], None), blocks[::-1], strict=True):
        up += [ResidualBlock(width) for _ in range(count)]
        if smaller is not None:
            up += [nn.Conv2d(width, 4 * smaller, 1), nn.PixelShuffle(2)]
    return nn.Sequential(
        *up, nn.GroupNorm(8, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], 12, 3, padding=1), nn.PixelShuffle(2)
    )


class FrameAutoencoder(PackedModelMixin, ModelMixin, ConfigMixin):
    """Frames [B, T, 3, H, W] in [0, 1] to normalised latents [B, C, T, H / 8, W / 8] and back.

    Args:
        latent_channels: C.
        widths: channels at 1/2, 1/4 and 1/8 of the picture's size.
        encoder_blocks, decoder_blocks: residual blocks at each of the three sizes.

    `latent_mean` and `latent_std` [C] are measured on the training set, so that latents have mean 0 and deviation 1.
    """

    spatial_compression_ratio = 8

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 24,
        widths: tuple[int, int, int] = (48, 96, 160),
        encoder_blocks: tuple[int, int, int] = (1, 2, 1),
        decoder_blocks: tuple[int, int, int] = (2, 3, 2),
    ) -> None:
        super().__init__()
        self.encoder = encoder_stack(latent_channels, widths, encoder_blocks)
        self.decoder = decoder_stack(latent_channels, widths, decoder_blocks)
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B, T, 3, H, W] in [0, 1], H and W multiples of 8, to latents [B, C, T, H / 8, W / 8]."""
        if frames.ndim != 5 or frames.shape[2] != 3 or frames.shape[3] % 8 or frames.shape[4] % 8:
            raise ValueError(
                f"frames must be [B, T, 3, H, W] with H and W multiples of 8, got {tuple(frames.shape)}; "
                "resize them first"
            )
        raw = self.encode_raw(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).movedim(2, 1)
        return (raw - self._channels(self.latent_mean)) / self._channels(self.latent_std)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, T, h, w] to frames [B, T, 3, 8 h, 8 w] in [0, 1]."""
        raw = latents * self._channels(self.latent_std) + self._channels(self.latent_mean)
        frames = self.decode_raw(raw.movedim(1, 2).flatten(0, 1))
        return frames.unflatten(0, (latents.shape[0], latents.shape[2])).clamp(0, 1)

    def encode_raw(self, pictures: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] to latents as the network makes them."""
        return self.encoder((pictures * 2 - 1).contiguous(memory_format=_layout(pictures)))

    def decode_raw(self, latents: Tensor) -> Tensor:
        """The inverse of `encode_raw`; not clamped."""
        return self.decoder(latents.contiguous(memory_format=_layout(latents))) / 2 + 0.5

    def lay_out_weights(self) -> None:
        """Store the weights in the layout that pictures have on the device where they are. Names and values stay."""
        with torch.no_grad():
            for weight in self.parameters():
                if weight.ndim == 4:
                    weight.data = weight.data.contiguous(memory_format=_layout(weight))

    @staticmethod
    def _channels(values: Tensor) -> Tensor:
        return values[:, None, None, None]


def _layout(x: Tensor) -> torch.memory_format:
    """Channels last, which convolutions like; but CUDA's group norm does not, and float32 is in no need of it there."""
    drawn_in_float32 = x.is_cuda and x.dtype == torch.float32 and not torch.is_grad_enabled()
    return torch.contiguous_format if drawn_in_float32 else torch.channels_last
