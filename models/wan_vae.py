"""Wan's video autoencoders as streams: diffusers' `AutoencoderKLWan` in chunks that equal the whole.

A causal 3-D convolution needs the last two frames of its input, and nothing else of a video survives from one step to
the next. Those frames lie in a `CodecState`: buffers of fixed size, written in place, owned by whoever runs the stream.
Each step lays them and the new frames side by side in one scratch buffer that all layers share, so nothing is
concatenated and nothing is allocated for padding. Tensors inside are channels-last, which is what convolutions want.

Time: the first latent frame stands for 1 picture, every later one for 4. Wan 2.1 (8 x 8 pixels per latent) and Wan 2.2
(16 x 16, with residual shortcuts) differ in config only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanAttentionBlock,
    WanResample,
    WanResidualBlock,
    WanResidualDownBlock,
    WanResidualUpBlock,
    WanUpBlock,
    patchify,
    unpatchify,
)
from torch import Tensor, nn
from torch.nn import functional as F

from .doubling import Weights, interleaved, phases
from .stream_codec import (
    PICTURES_PER_LATENT,
    CodecState,
    Place,
    StreamCodec,
    as_images,
    as_video,
    keeps_frames,
    pieces,
    pointwise,
    summed,
)

__all__ = ["CodecState", "WanDecoder", "WanEncoder"]


class WanDecoder(StreamCodec):
    """Latents to pictures, as they come."""

    def __init__(self, vae: AutoencoderKLWan, step: int = 3) -> None:
        self.half = vae.decoder
        super().__init__(vae, step)

    def places(self, height: int, width: int) -> dict[str, Place]:
        h, w, frames = height // self.pixels, width // self.pixels, 1
        places = {}
        for name, module in self.half.named_modules():
            if isinstance(module, WanResample) and module.mode.startswith("upsample"):
                if module.mode == "upsample3d":
                    places[name + ".time_conv"] = Place(module.dim, 2, h, w, frames)
                    frames *= 2
                h, w = 2 * h, 2 * w
            elif keeps_frames(name, module):
                places[name] = Place(module.in_channels, 2, h, w, frames)  # pyright: ignore[reportArgumentType]
        return places

    @torch.no_grad()
    def decode(self, latents: Tensor, state: CodecState) -> Tensor:
        """The pictures of the next latents.

        Args:
            latents: [B, z, F, h, w], normalised; F of any size.
            state: from `begin`; moves on.

        Returns:
            [B, T, 3, H, W] in [0, 1]; T is 4 F, or 4 F - 3 if the first frame of the stream is among them.
        """
        batch, z, _, height, width = state.buffers["conv_in"].shape
        if latents.ndim != 5 or (*latents.shape[:2], *latents.shape[3:]) != (batch, z, height, width):
            raise ValueError(f"latents must be [{batch}, {z}, F, {height}, {width}], got {list(latents.shape)}")
        starts = state.frames == 0 and latents.shape[2] > 0
        count = PICTURES_PER_LATENT * latents.shape[2] - (PICTURES_PER_LATENT - 1 if starts else 0)
        pictures = self.mean.new_empty((batch, count, 3, height * self.pixels, width * self.pixels))
        done = 0
        for first, piece in pieces(latents.to(pictures.dtype), starts, self.step):
            part = self._pass(piece * self.std + self.mean, state, first)
            pictures[:, done : done + part.shape[1]] = part
            done += part.shape[1]
        state.frames += latents.shape[2]
        return pictures

    def _pass(self, z: Tensor, state: CodecState, first: bool) -> Tensor:
        decoder = self.vae.decoder
        x = pointwise(self.vae.post_quant_conv, z.contiguous(memory_format=torch.channels_last_3d))
        x = self.convolve(decoder.conv_in, x, state)
        x, more = self.middle(decoder.mid_block, x, state)
        for block in decoder.up_blocks:
            x, more = self._up(block, x, more, state, first)  # pyright: ignore[reportArgumentType]
        x = self.convolve(decoder.conv_out, x, state, decoder.norm_out, more)
        if self.vae.config["patch_size"] is not None:
            x = unpatchify(x, self.vae.config["patch_size"])
        return x.clamp(-1, 1).mul_(0.5).add_(0.5).movedim(1, 2)

    def _up(
        self, block: WanUpBlock | WanResidualUpBlock, x: Tensor, more: Tensor | None, state: CodecState, first: bool
    ) -> tuple[Tensor, Tensor | None]:
        """A block on x + `more`, and its result in the same way."""
        plain = isinstance(block, WanUpBlock)
        if not plain and block.avg_shortcut is not None and more is not None:
            x, more = summed(x, more), None
        before = x
        for resnet in block.resnets:
            x, more = self.residual(resnet, x, state, more)  # pyright: ignore[reportArgumentType]
        upsampler = block.upsamplers[0] if plain and block.upsamplers is not None else None
        if not plain:
            upsampler = block.upsampler
        if upsampler is not None:
            assert more is not None, "there are blocks"
            x, more = self._upsample(upsampler, summed(x, more), state, first), None  # pyright: ignore[reportArgumentType]
        if plain or block.avg_shortcut is None:
            return x, more
        return x, block.avg_shortcut(before, first_chunk=first)

    def _upsample(self, layer: WanResample, x: Tensor, state: CodecState, first: bool) -> Tensor:
        if layer.mode == "upsample3d" and not first:
            twice = self.convolve(layer.time_conv, x, state).unflatten(1, (2, -1))  # [B, 2, C, T, h, w]
            images = twice.permute(0, 3, 1, 4, 5, 2).flatten(0, 2).permute(0, 3, 1, 2)
        else:
            images = as_images(x)
        weight, bias = self.made[layer.resample[1]]  # pyright: ignore[reportIndexIssue]
        return as_video(interleaved(F.conv2d(images, weight, bias, padding=1)), x.shape[0])

    def other_weights(self) -> Iterator[tuple[nn.Module, Weights]]:
        yield from super().other_weights()
        for layer in self.half.modules():
            if isinstance(layer, WanResample) and layer.mode.startswith("upsample"):
                conv = layer.resample[1]  # pyright: ignore[reportIndexIssue]
                yield conv, (phases(conv.weight), conv.bias.repeat(4))  # pyright: ignore[reportArgumentType, reportCallIssue]


class WanEncoder(StreamCodec):
    """Pictures to latents, as they come. Pictures that do not fill a latent yet wait in the state."""

    def __init__(self, vae: AutoencoderKLWan, step: int = 1) -> None:
        self.half = vae.encoder
        super().__init__(vae, step)

    def places(self, height: int, width: int) -> dict[str, Place]:
        patch = self.vae.config["patch_size"] or 1
        h, w, frames = height // patch, width // patch, PICTURES_PER_LATENT
        places = {"waiting": Place(3, PICTURES_PER_LATENT - 1, height, width, 0)}
        for name, module in self.half.named_modules():
            if isinstance(module, WanResample) and module.mode.startswith("downsample"):
                h, w = h // 2, w // 2
                if module.mode == "downsample3d":
                    places[name + ".time_conv"] = Place(module.dim, 1, h, w, frames)
                    frames //= 2
            elif keeps_frames(name, module):
                places[name] = Place(module.in_channels, 2, h, w, frames)  # pyright: ignore[reportArgumentType]
        return places

    @torch.no_grad()
    def encode(self, pictures: Tensor, state: CodecState) -> Tensor:
        """The latents that the next pictures complete: the mode of the posterior, normalised.

        Args:
            pictures: [B, T, 3, H, W] in [0, 1]; T of any size.
            state: from `begin`; moves on.

        Returns:
            [B, z, F, h, w]; F is 0 while pictures are still waiting for their latent's fourth.
        """
        waiting, starts = state.buffers["waiting"], state.frames == 0
        batch, _, _, height, width = waiting.shape
        if pictures.ndim != 5 or (*pictures.shape[:1], *pictures.shape[2:]) != (batch, 3, height, width):
            raise ValueError(f"pictures must be [{batch}, T, 3, {height}, {width}], got {list(pictures.shape)}")
        held = 0 if starts else (state.frames - 1) % PICTURES_PER_LATENT
        count = held + pictures.shape[1]
        rest = (count - 1 if starts else count) % PICTURES_PER_LATENT if count else 0
        video = waiting.new_empty((batch, 3, count, height, width))
        video[:, :, :held].copy_(waiting[:, :, :held])
        video[:, :, held:].copy_(pictures.movedim(1, 2)).mul_(2).sub_(1)
        waiting[:, :, :rest].copy_(video[:, :, count - rest :])
        state.frames += pictures.shape[1]
        size = (batch, self.vae.config["z_dim"], 0, height // self.pixels, width // self.pixels)
        whole = pieces(video[:, :, : count - rest], starts, PICTURES_PER_LATENT * self.step)
        return torch.cat([waiting.new_empty(size), *(self._pass(part, state, first) for first, part in whole)], dim=2)

    def _pass(self, x: Tensor, state: CodecState, first: bool) -> Tensor:
        encoder = self.vae.encoder
        if self.vae.config["patch_size"] is not None:
            x = patchify(x.contiguous(), self.vae.config["patch_size"])
        x = self.convolve(encoder.conv_in, x, state)
        for block in encoder.down_blocks:
            x = self._down(block, x, state, first)
        x, more = self.middle(encoder.mid_block, x, state)
        x = self.convolve(encoder.conv_out, x, state, encoder.norm_out, more)
        return (pointwise(self.vae.quant_conv, x).chunk(2, dim=1)[0] - self.mean) / self.std

    def _down(self, block: nn.Module, x: Tensor, state: CodecState, first: bool) -> Tensor:
        if isinstance(block, WanResidualBlock):
            return summed(*self.residual(block, x, state))
        if isinstance(block, WanAttentionBlock):
            return block(x)
        if isinstance(block, WanResample):
            return self._downsample(block, x, state, first)
        assert isinstance(block, WanResidualDownBlock)
        y = summed(*self.residuals(block.resnets, x, state))
        if block.downsampler is not None:
            y = self._downsample(block.downsampler, y, state, first)
        return y + block.avg_shortcut(x)

    def _downsample(self, layer: WanResample, x: Tensor, state: CodecState, first: bool) -> Tensor:
        x = as_video(layer.resample(as_images(x)), x.shape[0])
        if layer.mode != "downsample3d":
            return x
        if first:
            state.buffers[self.names[layer.time_conv]].copy_(x)
            return x
        return self.convolve(layer.time_conv, x, state)
