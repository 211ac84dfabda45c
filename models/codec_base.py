"""What published codecs have in common: the interface of `audio_codec.AudioCodec`, and frames that are held back.

Shapes: R rows, S samples, C latent channels, T frames, Q levels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .audio_layers import AudioState


class PublishedCodec(nn.Module):
    """What the codecs have in common. `model` is transformers' (evaluation mode is set).

    Attributes:
        held: frames by which an encoder's and a decoder's stream stay behind: EnCodec's at their start, DAC's always.
    """

    held: tuple[int, int] = (0, 0)

    def __init__(self, model: Any, hop: int, latent_channels: int) -> None:
        super().__init__()
        self.model, self.hop, self.latent_channels = model.eval(), hop, latent_channels

    @property
    def sample_rate(self) -> int:
        return self.model.config.sampling_rate

    @property
    def frame_rate(self) -> float:
        """Frames of latents per second."""
        return self.sample_rate / self.hop

    def encode(self, waveform: Tensor) -> Tensor:
        """[R, 1, S] to latents [R, C, T]; S is filled with silence to a multiple of the hop."""
        self._check(waveform, 1, "a waveform")
        return self._encode(F.pad(waveform, (0, -waveform.shape[-1] % self.hop)))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [R, C, T] to a waveform [R, 1, T * hop]."""
        self._check(latents, self.latent_channels, "latents")
        return self._decode(latents)

    def quantize(self, latents: Tensor) -> Tensor:
        """Latents [R, C, T] to codes int64 [R, Q, T], coarse to fine."""
        raise NotImplementedError

    def dequantize(self, codes: Tensor) -> Tensor:
        """Codes [R, q, T] of the first q levels to the latents [R, C, T] that they mean."""
        raise NotImplementedError

    def begin(self, rows: int = 1) -> AudioState:
        """An empty state for `rows` streams, on the device of the weights.

        Rows that are stepped together must be equally far into their start: where a codec holds frames back, rows that
        began at different times are stepped apart (`AudioState.take`).
        """
        like = next(self.parameters())
        # On the host, which decides by them what to run; all else is on the device.
        counts = {f"{part}.frames": torch.zeros(rows, dtype=torch.int64) for part in ("encoder", "decoder")}
        return AudioState(counts | self._pasts(rows, like))

    @torch.no_grad()
    def encode_step(self, waveform: Tensor, state: AudioState) -> Tensor:
        """The next piece [R, 1, n * hop] of each stream to the latents that it completes. Changes `state`.

        Raises:
            ValueError: the piece is not a multiple of the hop, or rows are not equally far into their start.
        """
        self._check(waveform, 1, "a waveform")
        if waveform.shape[-1] % self.hop or waveform.shape[-1] == 0:
            raise ValueError(
                f"a piece must be a multiple of {self.hop} samples, got {waveform.shape[-1]}; keep the rest for later"
            )
        return self._step("encoder", waveform, state)

    @torch.no_grad()
    def decode_step(self, latents: Tensor, state: AudioState) -> Tensor:
        """The next latents [R, C, n] of each stream to the samples that they complete. Changes `state`."""
        self._check(latents, self.latent_channels, "latents")
        return self._step("decoder", latents, state)

    @torch.no_grad()
    def encode_rest(self, state: AudioState) -> Tensor:
        """The clip is over: latents that were still held back. The state is as at the beginning again."""
        return self._end("encoder", state)

    @torch.no_grad()
    def decode_rest(self, state: AudioState) -> Tensor:
        """The clip is over: samples that were still held back. The state is as at the beginning again."""
        return self._end("decoder", state)

    def _end(self, part: str, state: AudioState) -> Tensor:
        rest = self._rest(part, state)
        for name, tensor in state.tensors.items():
            if name.startswith(part):
                tensor.zero_()
        return rest

    def _step(self, part: str, x: Tensor, state: AudioState) -> Tensor:
        counts = state.tensors[f"{part}.frames"]
        frames = x.shape[-1] // self._unit(part)
        far = int(counts[0])
        if bool((counts.clamp_max(self._settled(part)) != min(far, self._settled(part))).any()):
            raise ValueError(
                f"rows must be equally far into their start, got {counts.tolist()} frames; "
                "step rows that began at different times apart, with state.take(rows)"
            )
        out = self._run(part, x, state, far)
        counts.add_(frames)
        return out

    def _unit(self, part: str) -> int:
        """Input elements per frame."""
        return self.hop if part == "encoder" else 1

    def _nothing(self, part: str, rows: int, like: Tensor) -> Tensor:
        return like.new_zeros(rows, self.latent_channels if part == "encoder" else 1, 0)

    @staticmethod
    def _check(x: Tensor, channels: int, what: str) -> None:
        if x.ndim != 3 or x.shape[1] != channels:
            raise ValueError(f"{what} must be [B, {channels}, length], got {list(x.shape)}")

    def _encode(self, waveform: Tensor) -> Tensor:
        raise NotImplementedError

    def _decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def _pasts(self, rows: int, like: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def _settled(self, part: str) -> int:
        """Frames after which all rows are alike to the host."""
        raise NotImplementedError

    def _run(self, part: str, x: Tensor, state: AudioState, far: int) -> Tensor:
        """`far`: frames that came before."""
        raise NotImplementedError

    def _rest(self, part: str, state: AudioState) -> Tensor:
        raise NotImplementedError
