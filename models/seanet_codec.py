"""Codecs of SEANet layers, streamed: Mimi and EnCodec as transformers has them, every layer with its own past."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import seanet_stream as seanet
from .audio_layers import AudioState
from .codec_base import PublishedCodec


class SeanetCodec(PublishedCodec):
    """Mimi (arXiv:2410.00037) and EnCodec at 24 kHz (arXiv:2210.13438): causal, every layer with its own past.

    Raises:
        ValueError: a model whose layers see the whole clip, such as EnCodec at 48 kHz.
    """

    def __init__(self, model: Any) -> None:
        config = model.config
        if not config.use_causal_conv or getattr(config, "norm_type", "weight_norm") != "weight_norm":
            raise ValueError(
                f"streaming needs causal convolutions and no norm over time, got use_causal_conv="
                f"{config.use_causal_conv} and norm_type={getattr(config, 'norm_type', None)!r} (EnCodec at 48 kHz is "
                "coded in clips of one second); use the 24 kHz model, or transformers' own encode and decode"
            )
        parts = {type(part).__name__.removeprefix("Mimi").removeprefix("Encodec"): part for part in model.modules()}
        stacks = {"encoder": parts["Encoder"].layers, "decoder": parts["Decoder"].layers}
        transformers = [part for part in model.modules() if type(part).__name__ == "MimiTransformerModel"]
        named = {name.rsplit(".", 1)[-1]: part for name, part in model.named_modules()}
        hop = math.prod(config.upsampling_ratios)
        self_down, self_up = named.get("downsample"), named.get("upsample")
        fine = hop if self_down is None else hop * self_down.conv.stride[0]
        super().__init__(model, fine, config.hidden_size)
        # Not registered a second time: they are parts of `model`.
        self._parts: Mapping[str, Any] = {
            **{f"{name}.stack": stack for name, stack in stacks.items()},
            **{f"{name}.transformer": part for name, part in zip(("encoder", "decoder"), transformers)},
            "encoder.down": self_down,
            "decoder.up": self_up,
        }
        starts = [
            seanet.frames_to_start(stacks["encoder"], "", fine),
            seanet.frames_to_start(stacks["decoder"], "", fine / hop),
        ]
        self._starts: dict[str, int] = {"encoder": starts[0], "decoder": starts[1]}
        self.held = (starts[0] - 1, starts[1] - 1)  # at the start only

    def quantize(self, latents: Tensor) -> Tensor:
        return self.model.quantizer.encode(latents).transpose(0, 1)

    def dequantize(self, codes: Tensor) -> Tensor:
        mimi = self.model.config.model_type == "mimi"
        return self.model.quantizer.decode(codes if mimi else codes.transpose(0, 1))

    def _encode(self, waveform: Tensor) -> Tensor:
        x = waveform
        for layer in self._parts["encoder.stack"]:
            x = layer(x)
        x = self._whole_transformer("encoder", x)
        down = self._parts["encoder.down"]
        return x if down is None else down(x)

    def _decode(self, latents: Tensor) -> Tensor:
        up = self._parts["decoder.up"]
        x = self._whole_transformer("decoder", latents if up is None else up(latents))
        for layer in self._parts["decoder.stack"]:
            x = layer(x)
        return x

    def _whole_transformer(self, part: str, x: Tensor) -> Tensor:
        transformer = self._parts.get(f"{part}.transformer")
        return x if transformer is None else transformer(x.transpose(1, 2)).last_hidden_state.transpose(1, 2)

    def _pasts(self, rows: int, like: Tensor) -> dict[str, Tensor]:
        made = {}
        for part in ("encoder", "decoder"):
            made |= seanet.pasts(self._parts[f"{part}.stack"], f"{part}.stack", rows, like)
            transformer = self._parts.get(f"{part}.transformer")
            if transformer is not None:
                made |= seanet.transformer_pasts(transformer, f"{part}.transformer", rows, like)
            if self._starts[part] > 1:
                channels = 1 if part == "encoder" else self.latent_channels
                made[f"{part}.held"] = like.new_zeros(rows, channels, (self._starts[part] - 1) * self._unit(part))
        for name in ("encoder.down", "decoder.up"):
            layer = self._parts[name]
            if layer is not None:
                made[name] = like.new_zeros(rows, layer.conv.in_channels, seanet.kept(layer))
        return made

    def _settled(self, part: str) -> int:
        return self._starts[part]

    def _run(self, part: str, x: Tensor, state: AudioState, far: int) -> Tensor:
        unit, start = self._unit(part), self._starts[part]
        if far >= start or start == 1:
            return self._pass(part, x, state, first=far == 0)
        held = state.tensors[f"{part}.held"]
        x = torch.cat([held[..., : far * unit].to(x.dtype), x], dim=-1)
        if x.shape[-1] < start * unit:
            held[..., : x.shape[-1]] = x
            return self._nothing(part, x.shape[0], x)
        return self._pass(part, x, state, first=True)

    def _rest(self, part: str, state: AudioState) -> Tensor:
        far, like = int(state.tensors[f"{part}.frames"][0]), next(self.parameters())
        if far == 0 or far >= self._starts[part]:
            return self._nothing(part, len(state.tensors[f"{part}.frames"]), like)
        return self._pass(part, state.tensors[f"{part}.held"][..., : far * self._unit(part)], state, first=True)

    def _pass(self, part: str, x: Tensor, state: AudioState, *, first: bool) -> Tensor:
        stack, transformer = self._parts[f"{part}.stack"], self._parts.get(f"{part}.transformer")
        if part == "encoder":
            x = seanet.run(stack, "encoder.stack", x, state, first)
        elif self._parts["decoder.up"] is not None:
            x = seanet.spread(self._parts["decoder.up"], "decoder.up", x, state)
        if transformer is not None:
            x = seanet.run_transformer(transformer, f"{part}.transformer", x.transpose(1, 2), state).transpose(1, 2)
        if part == "decoder":
            return seanet.run(stack, "decoder.stack", x, state, first)
        down = self._parts["encoder.down"]
        return x if down is None else seanet.convolve(down, "encoder.down", x, state, first)
