"""The pitch of a voice, for training: where a window is most like itself a little later.

Source: autocorrelation over the window's own (Boersma 1993), with a small price on long periods.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.audio_source import pitch_level

WINDOW = 1024
LOW, HIGH = 60, 400  # Hz that are looked for
CLEAR = 0.6  # likeness from which on a window is voiced
FAINT = 1e-3  # root mean square below which nothing is


def track(waveform: Tensor, step: int, late: int, sample_rate: int) -> tuple[Tensor, Tensor]:
    """Pitch levels and whether there is a voice, [B, S / step] each, of waveforms [B, 1, S].

    Args:
        late: samples by which the middle of a window is behind the end of its step.
    """
    left = WINDOW // 2 + late - step
    padded = F.pad(waveform[:, 0].float(), (left, WINDOW - step - left))
    window = torch.hann_window(WINDOW, device=waveform.device)
    frames = padded.unfold(-1, WINDOW, step)
    frames = (frames - frames.mean(-1, keepdim=True)) * window
    first, last = sample_rate // HIGH, sample_rate // LOW
    like = _likeness(frames, last + 2) / _likeness(window, last + 2).clamp_min(1e-4)
    periods = torch.arange(first, last + 1, device=waveform.device)
    price = 0.02 * torch.log2(periods / first)
    best = (like[..., first : last + 1] - price).argmax(-1, keepdim=True) + first
    before, here, after = (like.gather(-1, best + offset)[..., 0] for offset in (-1, 0, 1))
    bend = (before - 2 * here + after).clamp_max(-1e-6)
    period = best[..., 0] + (0.5 * (before - after) / bend).clamp(-0.5, 0.5)
    loud = frames.square().mean(-1).sqrt() > FAINT
    return pitch_level(sample_rate / period), (here > CLEAR) & loud


def _likeness(frames: Tensor, count: int) -> Tensor:
    """Autocorrelation at 0 to `count` - 1 samples, 1 at 0."""
    power = torch.fft.rfft(frames, n=2 * WINDOW).abs().square()
    found = torch.fft.irfft(power)[..., :count]
    return found / found[..., :1].clamp_min(1e-9)
