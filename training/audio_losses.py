"""How far apart two sounds are to the ear, and a judge that learns to tell made ones from real ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.audio_source import mel_filters

# Two periods of a voice or more: shorter windows see where its pulses lie, which nobody hears.
SCALES = ((512, 40), (1024, 80), (2048, 160))
ENVELOPE = ((1024, 80),)  # what decides whether speech is understood


class MelDistance(nn.Module):
    """Mean absolute difference of log mel spectra at several resolutions (as in Improved RVQGAN, arXiv:2306.06546)."""

    def __init__(self, sample_rate: int, scales: Sequence[tuple[int, int]] = SCALES) -> None:
        super().__init__()
        self.scales = tuple(scales)
        for fft, bands in self.scales:
            self.register_buffer(f"filters_{fft}", mel_filters(fft, bands, sample_rate), persistent=False)
            self.register_buffer(f"window_{fft}", torch.hann_window(fft), persistent=False)

    def forward(self, made: Tensor, true: Tensor) -> Tensor:
        """Of waveforms [B, 1, S], float32."""
        both, total = torch.cat([made, true]).squeeze(1), made.new_zeros(())
        for fft, _ in self.scales:
            window, filters = getattr(self, f"window_{fft}"), getattr(self, f"filters_{fft}")
            spectrum = torch.stft(both, fft, fft // 4, window=window, return_complex=True)
            power = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
            mel = (power.transpose(1, 2) @ filters).clamp_min(1e-4).log10()
            ours, theirs = mel.chunk(2)
            total = total + (ours - theirs).abs().mean()
        return total / len(self.scales)


class JudgeConv(nn.Conv2d):
    """A convolution that can be asked without being taught: `frozen` keeps gradients from its weights."""

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        weight, bias = self.weight, self.bias
        assert bias is not None
        return self._conv_forward(x, weight.detach(), bias.detach()) if frozen else self._conv_forward(x, weight, bias)


class ScaleJudge(nn.Module):
    """A convolutional network on one complex spectrogram (MS-STFT discriminator of EnCodec, arXiv:2210.13438)."""

    window: Tensor

    def __init__(self, fft: int, width: int) -> None:
        super().__init__()
        self.fft = fft
        self.register_buffer("window", torch.hann_window(fft), persistent=False)
        wide, dilated = (3, 9), [(1, 1), (2, 1), (4, 1)]
        self.layers = nn.ModuleList(
            [
                JudgeConv(2, width, wide, padding=(1, 4)),
                *(
                    JudgeConv(width, width, wide, stride=(1, 2), dilation=dilation, padding=(dilation[0], 4))
                    for dilation in dilated
                ),
                JudgeConv(width, width, 3, padding=1),
            ]
        )
        self.last = JudgeConv(width, 1, 3, padding=1)

    def forward(self, waveform: Tensor, frozen: bool = False) -> list[Tensor]:
        """[B, 1, S] to the features of every layer, its verdict last."""
        with torch.autocast(waveform.device.type, enabled=False):
            spectrum = torch.stft(
                waveform.float().squeeze(1), self.fft, self.fft // 4, window=self.window, return_complex=True
            )
        # loud and soft alike: the root of the magnitude keeps the phase
        size = spectrum.abs().clamp_min(1e-5)
        x = torch.view_as_real(spectrum / size.sqrt()).permute(0, 3, 2, 1)  # [B, 2, time, frequency]
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x, frozen), 0.1)
            features.append(x)
        return [*features, self.last(x, frozen)]


class Judge(nn.Module):
    """Tells real sound from made sound, at several resolutions."""

    def __init__(self, ffts: Sequence[int] = (1024, 512, 256), width: int = 32) -> None:
        super().__init__()
        self.scales = nn.ModuleList(ScaleJudge(fft, width) for fft in ffts)

    def forward(self, made: Tensor, true: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the judge must learn, what the maker must (least squares GAN), and the distance of their features."""
        learn = fool = match = made.new_zeros(())
        for scale in self.scales:
            *taught, verdict = scale(torch.cat([made.detach(), true]))
            *asked, opinion = scale(made, frozen=True)
            wrong, right = verdict.float().chunk(2)
            learn = learn + (right - 1).square().mean() + wrong.square().mean()
            fool = fool + (opinion.float() - 1).square().mean()
            for ours, both in zip(asked, taught):
                theirs = both.chunk(2)[1].detach().float()
                match = match + (ours.float() - theirs).abs().mean() / theirs.abs().mean().clamp_min(1e-3)
        count = len(self.scales)
        return learn / count, fool / count, match / (count * 5)
