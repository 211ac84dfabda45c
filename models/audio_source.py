"""What a voice is made of before the mouth shapes it: pulses at a pitch, and breath; and spectra to shape them by.

A pitch is counted in whole units of a turn, so a stream has the same pulses in any pieces. Shapes: B rows, J spectra,
H samples from one spectrum to the next, W samples that a spectrum spans.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .audio_layers import AudioState, with_past

LOWEST, HIGHEST, MIDDLE = 50.0, 500.0, 128.0  # Hz
STEPS = 1024  # pitches between them, 3.9 cents apart
TURN = 1 << 32  # units of a whole turn
BREATH = 1 << 15  # samples after which the noise comes again


def mel_filters(fft: int, bands: int, sample_rate: int) -> Tensor:
    """[fft // 2 + 1, bands]: triangles that are evenly spaced in mel (O'Shaughnessy 1987) and overlap by half."""
    top = 2595 * math.log10(1 + sample_rate / 1400)
    edges = 700 * (10 ** (torch.linspace(0, top, bands + 2, dtype=torch.float64) / 2595) - 1)
    bins = torch.linspace(0, sample_rate / 2, fft // 2 + 1, dtype=torch.float64)[:, None]
    left, middle, right = edges[:-2], edges[1:-1], edges[2:]
    rise, fall = (bins - left) / (middle - left), (right - bins) / (right - middle)
    return torch.minimum(rise, fall).clamp_min(0).float()


def pitch_level(hertz: Tensor) -> Tensor:
    """How a pitch is written in latents: half octaves above 128 Hz."""
    return 2 * torch.log2(hertz / MIDDLE)


class VoiceSource(nn.Module):
    """Pulses and breath, of unit power each, [B, 2, J * H].

    Args:
        sample_rate: in Hz.
        hop: H.
        rate: spectra per pitch that is given.
    """

    units: Tensor
    breath: Tensor

    def __init__(self, sample_rate: int, hop: int, rate: int) -> None:
        super().__init__()
        self.hop, self.rate = hop, rate
        low, high = (2 * math.log2(edge / MIDDLE) for edge in (LOWEST, HIGHEST))
        self.low, self.per_level = low, (STEPS - 1) / (high - low)
        levels = [low + number / self.per_level for number in range(STEPS)]
        units = [round(MIDDLE * 2 ** (level / 2) / sample_rate * TURN) for level in levels]
        self.register_buffer("units", torch.tensor(units), persistent=False)
        noise = torch.randn(BREATH, generator=torch.Generator().manual_seed(0))
        self.register_buffer("breath", noise, persistent=False)

    def forward(self, levels: Tensor, state: AudioState | None = None) -> Tensor:
        """`levels` [B, T] as `pitch_level` gives them; between two of them the pitch glides."""
        glide = self.glide(levels, state)
        index = ((glide - self.low) * self.per_level).round().clamp(0, STEPS - 1).long()
        units = self.units[index]  # [B, J], of a turn per sample
        starts = (units * self.hop).cumsum(1)
        begun = torch.zeros_like(starts[:, :1]) if state is None else state.tensors["source.turn"]
        starts = begun + torch.cat([torch.zeros_like(begun), starts], dim=1)
        if state is not None:
            begun.copy_(starts[:, -1:] % TURN)
        turn = starts[:, :-1, None] + units[..., None] * torch.arange(self.hop, device=units.device)
        pulses = harmonics(turn % TURN, units[..., None]).flatten(1)
        return torch.stack([pulses, self._breathe(pulses, state)], dim=1)

    def glide(self, levels: Tensor, state: AudioState | None = None) -> Tensor:
        """[B, T] to [B, J], J = T * rate: from each level to the next, reached with its last spectrum."""
        before = with_past(levels, 1, "source.level", state)[:, :-1]
        share = torch.arange(1, self.rate + 1, device=levels.device, dtype=levels.dtype) / self.rate
        return (before[..., None] + (levels - before)[..., None] * share).flatten(1)

    def _breathe(self, like: Tensor, state: AudioState | None) -> Tensor:
        if self.training:
            return torch.randn_like(like)
        place = torch.arange(like.shape[1], device=like.device).expand(like.shape)
        if state is not None:
            place = place + state.tensors["source.place"]
            state.tensors["source.place"].copy_((place[:, -1:] + 1) % BREATH)
        return self.breath[place % BREATH]

    def pasts(self, rows: int) -> dict[str, Tensor]:
        whole = self.units.new_zeros(rows, 1)
        return {"source.level": self.breath.new_zeros(rows, 1), "source.turn": whole, "source.place": whole.clone()}


def harmonics(turn: Tensor, units: Tensor) -> Tensor:
    """All cosines below half the sample rate added up (Dirichlet's kernel), of unit power.

    Args:
        turn: int64, where in the turn, 0 to `TURN`.
        units: int64, of a turn per sample.
    """
    count = TURN // 2 // units
    top = torch.sin(math.pi * ((2 * count + 1) * turn % (2 * TURN)).double() / TURN)
    bottom = torch.sin(math.pi * turn.double() / TURN)
    near = bottom.abs() < 1e-5
    value = torch.where(near, (2 * count + 1).double(), top / bottom.masked_fill(near, 1.0)) - 1
    return (value / (2 * count).double().sqrt()).float()


class Spectra(nn.Module):
    """Short-time spectra of a stream and the way back, which is W - H samples late.

    Args:
        window, hop: W and H; W a multiple of H, 4 times at least.
    """

    shape: Tensor

    def __init__(self, window: int, hop: int) -> None:
        super().__init__()
        self.window, self.hop, self.kept = window, hop, window - hop
        self.register_buffer("shape", torch.hann_window(window).sqrt(), persistent=False)

    def take(self, samples: Tensor, name: str, state: AudioState | None = None) -> Tensor:
        """[B, n, J * H] to complex [B, n, J, W / 2 + 1]; the newest sample is the last in its window."""
        frames = with_past(samples, self.kept, name, state).unfold(-1, self.window, self.hop)
        return torch.fft.rfft(frames * self.shape)

    def give(self, spectra: Tensor, state: AudioState | None = None) -> Tensor:
        """Complex [B, J, W / 2 + 1] to [B, J * H]."""
        frames = torch.fft.irfft(spectra, n=self.window) * (self.shape * (2 * self.hop / self.window))
        rows, count, _ = frames.shape
        parts = frames.unflatten(2, (-1, self.hop))  # [B, J, W / H, H]
        total = frames.new_zeros(rows, count + parts.shape[2] - 1, self.hop)
        for number in range(parts.shape[2]):
            total[:, number : number + count] += parts[:, :, number]
        total = total.flatten(1)
        if state is not None:
            left = state.tensors["spectra.left"]
            total[:, : self.kept] += left
            left.copy_(total[:, total.shape[1] - self.kept :])
        return total[:, : count * self.hop]
