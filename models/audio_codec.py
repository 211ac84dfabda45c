"""A causal audio codec for voices: sound to few latents a second, or to residual codes, and back, as it comes.

The encoder sees log mel spectra. The decoder shapes a voice's source, pulses and breath, spectrum by spectrum: how loud
each bin of either is and how much it turns. Overlap-add makes that sound, `delay` samples late. The pitch is the
first latent.

Source: shaping the spectrum of a harmonic source as DDSP (arXiv:2001.04643) and HiFTNet (arXiv:2309.09493) do, with the
backbone of Vocos (arXiv:2306.00814).
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from .audio_layers import AudioStack, AudioState, CausalConv1d, CausalNeXt, CausalUpsample
from .audio_source import Spectra, VoiceSource, mel_filters
from .packed import PackedModelMixin
from .residual_quantizer import ResidualQuantizer

COARSE = 4  # bins per point of what changes slowly over frequency: breath and turns
QUIET = -3.0  # log of what an untrained decoder lets through


class AudioCodec(PackedModelMixin, ModelMixin, ConfigMixin):
    """Waveforms [B, 1, S] in [-1, 1] to normalised latents [B, C, T] and back, S = T * hop, `delay` samples later.

    Args:
        sample_rate: of the waveform, in Hz.
        latent_channels: C.
        step: samples from one spectrum to the next.
        window: samples that a spectrum spans.
        ratio: spectra per frame of latents.
        bands: of the mel spectra.
        encoder_dim, encoder_layers: of the encoder; as many layers again at the rate of latents.
        decoder_dim, decoder_layers: of the decoder; one layer more at the rate of latents.
        levels, codebook_size: of the residual codes.

    `latent_mean` and `latent_std` [C] are measured on the training set, so that latents have mean 0 and deviation 1.

    Raises:
        ValueError: a window that is not at least 4 steps, and whole ones, or no multiple of 8.
    """

    @register_to_config
    def __init__(
        self,
        sample_rate: int = 16000,
        latent_channels: int = 48,
        step: int = 160,
        window: int = 640,
        ratio: int = 4,
        bands: int = 80,
        encoder_dim: int = 88,
        encoder_layers: int = 2,
        decoder_dim: int = 144,
        decoder_layers: int = 4,
        levels: int = 8,
        codebook_size: int = 512,
    ) -> None:
        super().__init__()
        if window % step or window < 4 * step or window % (2 * COARSE):
            raise ValueError(
                f"window must be 4 steps or more, whole ones, and a multiple of {2 * COARSE}, got {window} and {step}"
            )
        self.encoder = AudioEncoder(
            latent_channels, sample_rate, Spectra(window, step), ratio, bands, encoder_dim, encoder_layers
        )
        source = VoiceSource(sample_rate, step, ratio)
        self.decoder = AudioDecoder(latent_channels, source, Spectra(window, step), ratio, decoder_dim, decoder_layers)
        self.quantizer = ResidualQuantizer(latent_channels, levels, codebook_size)
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    @property
    def hop(self) -> int:
        """Samples per frame of latents."""
        return self.config["step"] * self.config["ratio"]

    @property
    def delay(self) -> int:
        """Samples by which decoded sound is late."""
        return self.config["window"] - self.config["step"]

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
        return self._normal(self.encoder(F.pad(waveform, (0, missing))))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, T] to a waveform [B, 1, T * hop] in [-1, 1]."""
        _check(latents, self.latent_channels, "latents")
        return self.decoder(self._raw(latents)).clamp(-1, 1)

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

    def _normal(self, raw: Tensor) -> Tensor:
        return (raw - self.latent_mean[:, None]) / self.latent_std[:, None]

    def _raw(self, latents: Tensor) -> Tensor:
        return latents * self.latent_std[:, None] + self.latent_mean[:, None]


class AudioEncoder(nn.Module):
    """Log mel spectra to latents as the network makes them; the first is the pitch (`audio_source.pitch_level`)."""

    filters: Tensor

    def __init__(
        self, channels: int, sample_rate: int, spectra: Spectra, ratio: int, bands: int, dim: int, layers: int
    ) -> None:
        super().__init__()
        self.spectra = spectra
        self.register_buffer("filters", mel_filters(spectra.window, bands, sample_rate), persistent=False)
        self.blocks = AudioStack(
            CausalConv1d(bands, dim, 3, name="encoder.first"),
            *(CausalNeXt(dim, 3 * dim, name=f"encoder.fine.{number}") for number in range(layers)),
            CausalConv1d(dim, dim, ratio, name="encoder.down", stride=ratio),
            *(CausalNeXt(dim, 3 * dim, name=f"encoder.coarse.{number}") for number in range(layers)),
            CausalConv1d(dim, channels, 1, name="encoder.last"),
        )

    def forward(self, waveform: Tensor, state: AudioState | None = None) -> Tensor:
        with torch.autocast(waveform.device.type, enabled=False):
            spectrum = self.spectra.take(waveform.float(), "encoder.samples", state)[:, 0]
            mel = (spectrum.abs() @ self.filters).clamp_min(1e-3).log10()
        return self.blocks(mel.transpose(1, 2).to(waveform.dtype), state)

    def pasts(self, rows: int) -> dict[str, Tensor]:
        return {"encoder.samples": self.filters.new_zeros(rows, 1, self.spectra.kept)} | self.blocks.pasts(rows)


class AudioDecoder(nn.Module):
    """Raw latents to a waveform that is not clamped."""

    def __init__(self, channels: int, source: VoiceSource, spectra: Spectra, ratio: int, dim: int, layers: int) -> None:
        super().__init__()
        self.source, self.spectra = source, spectra
        self.bins = spectra.window // 2 + 1
        self.points = spectra.window // 2 // COARSE + 1
        self.blocks = AudioStack(
            CausalConv1d(channels, dim, 3, name="decoder.first"),
            CausalNeXt(dim, 5 * dim // 2, name="decoder.coarse"),
            CausalUpsample(dim, dim, ratio),
            *(CausalNeXt(dim, 5 * dim // 2, name=f"decoder.fine.{number}") for number in range(layers)),
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, self.bins + 2 * self.points)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, raw: Tensor, state: AudioState | None = None) -> Tensor:
        shape = self.head(self.norm(self.blocks(raw, state).transpose(1, 2)))
        with torch.autocast(raw.device.type, enabled=False):
            pulses, breath, turn = shape.float().split([self.bins, self.points, self.points], dim=-1)
            source = self.source(raw[:, 0].detach().float(), state)
            spectrum = self.spectra.take(source, "decoder.source", state)
            voiced = torch.polar((pulses + QUIET).clamp_max(5.0).exp(), self._fine(turn))
            made = spectrum[:, 0] * voiced + spectrum[:, 1] * (self._fine(breath) + QUIET).clamp_max(5.0).exp()
            return self.spectra.give(made, state)[:, None].to(raw.dtype)

    def _fine(self, points: Tensor) -> Tensor:
        return F.interpolate(points, size=self.bins, mode="linear", align_corners=True)

    def pasts(self, rows: int) -> dict[str, Tensor]:
        left = self.head.weight.new_zeros(rows, 3, self.spectra.kept)
        kept = {"decoder.source": left[:, :2].clone(), "spectra.left": left[:, 2].clone()}
        return kept | self.source.pasts(rows) | self.blocks.pasts(rows)


def _check(x: Tensor, channels: int, what: str) -> None:
    if x.ndim != 3 or x.shape[1] != channels:
        raise ValueError(f"{what} must be [B, {channels}, length], got {list(x.shape)}")
