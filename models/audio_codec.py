"""A causal audio codec: sound to few latents a second, or to residual codes, and back, as it comes.

Source: SEANet as in SoundStream (arXiv:2107.03312) and Mimi (arXiv:2410.00037), with Snake activations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from .audio_layers import AudioResidual, AudioStack, AudioState, CausalConv1d, CausalUpsample, Snake
from .packed import PackedModelMixin
from .residual_quantizer import ResidualQuantizer


class AudioCodec(PackedModelMixin, ModelMixin, ConfigMixin):
    """Waveforms [B, 1, S] in [-1, 1] to normalised latents [B, C, T] and back, S = T * hop.

    Args:
        sample_rate: of the waveform, in Hz.
        latent_channels: C.
        strides: by how much each stage shortens, from the waveform down; their product is the hop, samples per frame.
        encoder_widths, decoder_widths: channels before the first stage and after each, from the waveform down.
        dilations: of the residual blocks of a stage.
        levels, codebook_size: of the residual codes.

    `latent_mean` and `latent_std` [C] are measured on the training set, so that latents have mean 0 and deviation 1.

    Raises:
        ValueError: not one width more than there are strides.
    """

    @register_to_config
    def __init__(
        self,
        sample_rate: int = 16000,
        latent_channels: int = 64,
        strides: Sequence[int] = (4, 5, 8, 8),
        encoder_widths: Sequence[int] = (16, 24, 48, 64, 80),
        decoder_widths: Sequence[int] = (32, 64, 96, 128, 128),
        dilations: Sequence[int] = (1, 3),
        levels: int = 8,
        codebook_size: int = 512,
    ) -> None:
        super().__init__()
        for name, widths in (("encoder_widths", encoder_widths), ("decoder_widths", decoder_widths)):
            if len(widths) != len(strides) + 1:
                raise ValueError(f"{name} needs one width more than the {len(strides)} strides, got {list(widths)}")
        self.encoder = encoder_stack(latent_channels, strides, encoder_widths, dilations)
        self.decoder = decoder_stack(latent_channels, strides, decoder_widths, dilations)
        self.quantizer = ResidualQuantizer(latent_channels, levels, codebook_size)
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    @property
    def hop(self) -> int:
        """Samples per frame of latents."""
        return math.prod(self.config["strides"])

    @property
    def sample_rate(self) -> int:
        return self.config["sample_rate"]

    @property
    def frame_rate(self) -> float:
        """Frames of latents per second."""
        return self.sample_rate / self.hop

    @property
    def latent_channels(self) -> int:
        return self.config["latent_channels"]

    def encode(self, waveform: Tensor) -> Tensor:
        """[B, 1, S] to latents [B, C, T]; S is filled with silence to a multiple of the hop."""
        _check(waveform, 1, "a waveform")
        missing = -waveform.shape[-1] % self.hop
        return self._normal(self.encoder(torch.nn.functional.pad(waveform, (0, missing))))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, T] to a waveform [B, 1, T * hop] in [-1, 1]."""
        _check(latents, self.latent_channels, "latents")
        return self.decode_raw(self._raw(latents)).clamp(-1, 1)

    def quantize(self, latents: Tensor) -> Tensor:
        """Latents [B, C, T] to codes int64 [B, Q, T], coarse to fine."""
        return self.quantizer.encode(self._raw(latents))

    def dequantize(self, codes: Tensor) -> Tensor:
        """Codes [B, q, T] of the first q levels to the latents [B, C, T] that they mean."""
        return self._normal(self.quantizer.decode(codes))

    def begin(self, rows: int = 1) -> AudioState:
        """An empty state for `rows` streams, on the device of the weights."""
        return AudioState(self.encoder.pasts(rows) | self.decoder.pasts(rows))

    def encode_step(self, waveform: Tensor, state: AudioState) -> Tensor:
        """The next piece [rows, 1, n * hop] of each stream to its latents [rows, C, n]. Changes `state`.

        Raises:
            ValueError: the piece is not a multiple of the hop.
        """
        _check(waveform, 1, "a waveform")
        if waveform.shape[-1] % self.hop or waveform.shape[-1] == 0:
            raise ValueError(
                f"a piece must be a multiple of {self.hop} samples, got {waveform.shape[-1]}; keep the rest for later"
            )
        return self._normal(self.encoder(waveform, state))

    def decode_step(self, latents: Tensor, state: AudioState) -> Tensor:
        """The next latents [rows, C, n] of each stream to its next samples [rows, 1, n * hop]. Changes `state`."""
        _check(latents, self.latent_channels, "latents")
        return self.decoder(self._raw(latents), state).clamp(-1, 1)

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Latents as the encoder's network makes them to a waveform that is not clamped."""
        return self.decoder(latents)

    def _normal(self, raw: Tensor) -> Tensor:
        return (raw - self.latent_mean[:, None]) / self.latent_std[:, None]

    def _raw(self, latents: Tensor) -> Tensor:
        return latents * self.latent_std[:, None] + self.latent_mean[:, None]


def encoder_stack(channels: int, strides: Sequence[int], widths: Sequence[int], dilations: Sequence[int]) -> AudioStack:
    """Residual blocks and a strided convolution per stage, from the waveform to latents."""
    layers: list = [CausalConv1d(1, widths[0], 7, name="encoder.first")]
    for stage, (stride, width, wider) in enumerate(zip(strides, widths, widths[1:])):
        layers += [
            AudioResidual(width, dilation, name=f"encoder.{stage}.{number}")
            for number, dilation in enumerate(dilations)
        ]
        layers += [Snake(width), CausalConv1d(width, wider, 2 * stride, name=f"encoder.{stage}", stride=stride)]
    return AudioStack(*layers, Snake(widths[-1]), CausalConv1d(widths[-1], channels, 1, name="encoder.last"))


def decoder_stack(channels: int, strides: Sequence[int], widths: Sequence[int], dilations: Sequence[int]) -> AudioStack:
    """The way back."""
    layers: list = [CausalConv1d(channels, widths[-1], 3, name="decoder.first")]
    for stage in range(len(strides) - 1, -1, -1):
        wide, width = widths[stage + 1], widths[stage]
        layers += [Snake(wide), CausalUpsample(wide, width, strides[stage], name=f"decoder.{stage}")]
        layers += [
            AudioResidual(width, dilation, name=f"decoder.{stage}.{number}")
            for number, dilation in enumerate(dilations)
        ]
    return AudioStack(*layers, Snake(widths[0]), CausalConv1d(widths[0], 1, 7, name="decoder.last"))


def _check(x: Tensor, channels: int, what: str) -> None:
    if x.ndim != 3 or x.shape[1] != channels:
        raise ValueError(f"{what} must be [B, {channels}, length], got {list(x.shape)}")
