"""A codec whose convolutions look both ways, streamed: DAC as transformers has it, in windows of its reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .audio_layers import AudioState
from .codec_base import PublishedCodec


class WindowedCodec(PublishedCodec):
    """DAC (arXiv:2306.06546): its convolutions look both ways, so a piece is computed inside a window of its reach.

    A frame is given when `held` frames after it are there; a piece of n frames costs n + 2 * held of them.
    """

    def __init__(self, model: Any) -> None:
        config = model.config
        super().__init__(model, math.prod(config.downsampling_ratios), config.hidden_size)
        self.held = (
            reach(list(model.encoder.modules()), 1, self.hop),
            reach(list(model.decoder.modules()), self.hop, self.hop),
        )

    def quantize(self, latents: Tensor) -> Tensor:
        return self.model.quantizer(latents)[1]

    def dequantize(self, codes: Tensor) -> Tensor:
        return self.model.quantizer.from_codes(codes)[0]

    def _encode(self, waveform: Tensor) -> Tensor:
        return self.model.encoder(waveform)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.model.decoder(latents)

    def _pasts(self, rows: int, like: Tensor) -> dict[str, Tensor]:
        encoder, decoder = self.held
        return {
            "encoder.window": like.new_zeros(rows, 1, 2 * encoder * self.hop),
            "decoder.window": like.new_zeros(rows, self.latent_channels, 2 * decoder),
        }

    def _settled(self, part: str) -> int:
        return 2 * self._held(part)

    def _held(self, part: str) -> int:
        return self.held[0 if part == "encoder" else 1]

    def _run(self, part: str, x: Tensor, state: AudioState, far: int) -> Tensor:
        unit, held, window = self._unit(part), self._held(part), state.tensors[f"{part}.window"]
        known = min(far, 2 * held)  # frames before the piece that the window has
        full = torch.cat([window.to(x.dtype), x], dim=-1)
        window.copy_(full[..., full.shape[-1] - window.shape[-1] :])
        seen = full[..., full.shape[-1] - x.shape[-1] - known * unit :]
        first = max(far - held, 0) - (far - known)
        last = known + x.shape[-1] // unit - held
        return self._between(part, seen, first, last)

    def _rest(self, part: str, state: AudioState) -> Tensor:
        window, held = state.tensors[f"{part}.window"], self._held(part)
        far = int(state.tensors[f"{part}.frames"][0])
        known = min(far, 2 * held)
        seen = window[..., window.shape[-1] - known * self._unit(part) :]
        return self._between(part, seen, max(far - held, 0) - (far - known), known)

    def _between(self, part: str, seen: Tensor, first: int, last: int) -> Tensor:
        """Frames from `first` to `last` of what the model makes of a window; nothing if there are none."""
        if last <= first:
            return self._nothing(part, seen.shape[0], seen)
        out = self._encode(seen) if part == "encoder" else self._decode(seen)
        size = 1 if part == "encoder" else self.hop
        return out[..., first * size : last * size]


def reach(convolutions: Sequence[nn.Module], rate: float, hop: int) -> int:
    """Frames on either side that a frame of a stack of centred convolutions depends on, at most.

    Args:
        convolutions: in the order of the signal's way.
        rate: samples of the waveform per element of the first one's input.
        hop: samples per frame.
    """
    samples = 0.0
    for layer in convolutions:
        if isinstance(layer, nn.ConvTranspose1d):
            rate = rate / layer.stride[0]
            samples += (layer.kernel_size[0] - layer.stride[0]) * rate
        elif isinstance(layer, nn.Conv1d):
            before, stride = int(layer.padding[0]), layer.stride[0]
            after = (layer.kernel_size[0] - 1) * layer.dilation[0] + 1 - stride - before
            samples += max(before, after) * rate
            rate = rate * stride
    return math.ceil(samples / hop)
