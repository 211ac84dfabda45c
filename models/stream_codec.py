"""What the streaming encoder and decoder share: the frames that layers keep, and how a layer runs on new ones.

See `wan_vae` for the idea.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanCausalConv3d,
    WanMidBlock,
    WanResidualBlock,
    WanRMS_norm,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.norm_silu import norm_silu
from .doubling import Weights, aligned, renew

PICTURES_PER_LATENT = 4

Branches = tuple[Tensor, Tensor]  # of a residual block, not added up yet


class Place(NamedTuple):
    """What one convolution over time keeps, and how much it sees per latent frame."""

    channels: int
    kept: int  # frames
    height: int
    width: int
    frames: int  # of its input, per latent frame

    @property
    def elements(self) -> int:
        return self.channels * self.kept * self.height * self.width

    def widest(self, step: int) -> int:
        """Elements of its input, with what is kept, for `step` latent frames."""
        return self.elements // self.kept * (self.kept + self.frames * step)


class CodecState:
    """Everything a running encoder or decoder remembers.

    Attributes:
        buffers: name of a layer -> the last frames of its input [B, C, kept, h, w].
        frames: frames taken so far (latents by a decoder, pictures by an encoder).
    """

    def __init__(self, buffers: dict[str, Tensor]) -> None:
        self.buffers = buffers
        self.frames = 0

    @property
    def bytes(self) -> int:
        """Memory it holds, whatever the stream does."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers.values())

    def reset(self) -> None:
        """Forget everything: the next frame is a first frame."""
        for buffer in self.buffers.values():
            buffer.zero_()
        self.frames = 0

    def snapshot(self) -> dict[str, Tensor | int]:
        """A copy that later steps leave alone."""
        return {name: buffer.clone() for name, buffer in self.buffers.items()} | {"frames": self.frames}

    def restore(self, saved: Mapping[str, Tensor | int | float | str]) -> None:
        """Put a snapshot back, into this state or another of the same shape. ValueError if it is another's."""
        for name, buffer in self.buffers.items():
            value = saved.get(name)
            if not isinstance(value, Tensor) or value.shape != buffer.shape:
                seen = tuple(value.shape) if isinstance(value, Tensor) else value
                raise ValueError(f"the saved codec state has {name} = {seen}, this one needs {tuple(buffer.shape)}")
        frames = saved.get("frames")
        if not isinstance(frames, int) or frames < 0:
            raise ValueError(f"the saved codec state has frames = {frames!r}, it must say how many it has taken")
        for name, buffer in self.buffers.items():
            buffer.copy_(saved[name])  # pyright: ignore[reportArgumentType]
        self.frames = frames


class StreamCodec:
    """What the encoder and the decoder share: where each layer keeps its frames, and how a layer is run on new ones.

    Args:
        vae: the weights; its convolutions are brought into channels-last order, which changes no number.
        step: latent frames that go through the network together; longer inputs take several passes.
    """

    half: nn.Module  # the half of the autoencoder that this codec runs

    def __init__(self, vae: AutoencoderKLWan, step: int) -> None:
        if step < 1:
            raise ValueError(f"step must be at least 1 latent frame, got {step}")
        self.vae, self.step = vae, step
        self.names = {module: name for name, module in self.half.named_modules()}
        self.mean, self.std = (torch.tensor(values)[:, None, None, None] for values in statistics(vae))
        self.made: dict[nn.Module, Weights] = {}  # weights and biases of layers that are run otherwise
        self._scratch = torch.empty(0)
        for module in vae.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                order = torch.channels_last if isinstance(module, nn.Conv2d) else torch.channels_last_3d
                module.weight.data = module.weight.data.contiguous(memory_format=order)

    @property
    def pixels(self) -> int:
        """Pixels, each way, per latent element."""
        return self.vae.config["scale_factor_spatial"]

    def places(self, height: int, width: int) -> dict[str, Place]:
        """What every layer keeps for a stream of `height` x `width` pixels."""
        raise NotImplementedError

    def memory(self, height: int, width: int) -> tuple[int, int]:
        """Bytes of a stream's state, and of the scratch that all streams share."""
        places, size = self.places(height, width).values(), self.vae.dtype.itemsize
        return size * sum(place.elements for place in places), size * max(place.widest(self.step) for place in places)

    def begin(self, height: int, width: int, batch: int = 1) -> CodecState:
        """An empty state for streams of `height` x `width` pixels, on the device of the weights.

        Raises:
            ValueError: the size is no multiple of what a latent spans.
        """
        if height % self.pixels or width % self.pixels or min(height, width) < 1:
            raise ValueError(f"height and width must be multiples of {self.pixels} pixels, got {height} x {width}")
        places = self.places(height, width)
        weight = self.vae.post_quant_conv.weight
        self.mean, self.std = self.mean.to(weight), self.std.to(weight)
        with torch.no_grad():
            renew(self.made, self.other_weights())
        widest = max(place.widest(self.step) for place in places.values())
        if self._scratch.numel() < batch * widest or (self._scratch.device, self._scratch.dtype) != (
            weight.device,
            weight.dtype,
        ):
            self._scratch = torch.empty(batch * widest, device=weight.device, dtype=weight.dtype)
        return CodecState(
            {
                name: torch.zeros(
                    (batch, place.channels, place.kept, place.height, place.width),
                    device=weight.device,
                    dtype=weight.dtype,
                ).contiguous(memory_format=torch.channels_last_3d)
                for name, place in places.items()
            }
        )

    def other_weights(self) -> Iterator[tuple[nn.Module, Weights]]:
        """Layers that are run with other weights than their own, the same in arithmetic, and those."""
        conv = self.half.conv_out
        assert isinstance(conv, WanCausalConv3d)
        assert conv.bias is not None
        if conv.weight.is_cuda:
            yield conv, aligned(conv.weight, conv.bias)

    def convolve(
        self,
        conv: WanCausalConv3d,
        x: Tensor,
        state: CodecState,
        norm: WanRMS_norm | None = None,
        more: Tensor | None = None,
    ) -> Tensor:
        """`conv` over the kept frames and `x` [B, C, T, h, w], after `norm` and SiLU if given.

        `more` is added to x before the norm, and holds the sum afterwards."""
        kept = state.buffers[self.names[conv]]
        batch, channels, frames, height, width = x.shape
        frames += kept.shape[2]
        both = self._scratch[: x.numel() // x.shape[2] * frames].view(batch, frames, height, width, channels)
        both = both.permute(0, 4, 1, 2, 3)
        if norm is None:
            both[:, :, : kept.shape[2]].copy_(kept)
            both[:, :, kept.shape[2] :].copy_(x)
            kept.copy_(both[:, :, -kept.shape[2] :])
        else:
            norm_silu(x, norm.gamma, out=both, kept=kept, more=more)
        pad_w, _, pad_h, _, _, _ = (int(pad) for pad in conv._padding)
        weight, bias = self.made.get(conv, (conv.weight, conv.bias))
        y = F.conv3d(both, weight, bias, conv.stride, (0, pad_h, pad_w))  # pyright: ignore[reportCallIssue, reportArgumentType]
        return y[:, : conv.out_channels]

    def residual(self, block: WanResidualBlock, x: Tensor, state: CodecState, more: Tensor | None = None) -> Branches:
        """The block on x + `more`. What it gives is not added up yet: the next norm does that as it reads both."""
        y = self.convolve(block.conv1, x, state, block.norm1, more)
        x = x if more is None else more
        y = self.convolve(block.conv2, y, state, block.norm2)
        return (pointwise(block.conv_shortcut, x) if isinstance(block.conv_shortcut, WanCausalConv3d) else x), y

    def residuals(self, blocks: Iterable[nn.Module], x: Tensor, state: CodecState) -> Branches:
        """One block after the other."""
        more = None
        for block in blocks:
            x, more = self.residual(block, x, state, more)  # pyright: ignore[reportArgumentType]
        assert more is not None, "there are blocks"
        return x, more

    def middle(self, block: WanMidBlock, x: Tensor, state: CodecState) -> Branches:
        branches = self.residual(block.resnets[0], x, state)  # pyright: ignore[reportArgumentType]
        for attention, resnet in zip(block.attentions, block.resnets[1:]):
            branches = self.residual(resnet, attention(summed(*branches)), state)  # pyright: ignore[reportArgumentType]
        return branches


def summed(x: Tensor, y: Tensor) -> Tensor:
    """Branches added up, in the memory of the second."""
    return y.add_(x)


def statistics(vae: AutoencoderKLWan) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each latent channel.

    Raises:
        ValueError: the config does not say, or not in finite numbers, one for each channel: pictures would turn to
            snow.
    """
    z, found = vae.config["z_dim"], []
    for name in ("latents_mean", "latents_std"):
        values: Any = vae.config.get(name)
        wrong = _wrong(values, z, positive=name == "latents_std")
        if wrong:
            raise ValueError(
                f"the autoencoder's config needs {name} with {z} values, one per latent channel, and has {wrong}; "
                "take them from the config.json that belongs to these weights"
            )
        found.append(tuple(map(float, values)))
    return found[0], found[1]


def _wrong(values: Any, number: int, *, positive: bool) -> str:
    """What is wrong with the statistics of `number` channels; "" if they are fine."""
    if values is None:
        return "nothing"
    if not isinstance(values, (list, tuple)):
        return f"a {type(values).__name__}"
    if len(values) != number:
        return f"{len(values)} values"
    for channel, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return f"{value!r}, which is no finite number, for channel {channel}"
        if positive and value <= 0:
            return f"{value!r}, which is not above 0, for channel {channel}"
    return ""


def keeps_frames(name: str, module: nn.Module) -> bool:
    """Is this a convolution over three frames, outside of a resampling layer (whose pace differs)?"""
    return isinstance(module, WanCausalConv3d) and module.kernel_size[0] == 3 and not name.endswith("time_conv")


def pointwise(conv: WanCausalConv3d, x: Tensor) -> Tensor:
    """A convolution that looks at one place only; the module's own forward would pad by nothing, with a copy."""
    return F.conv3d(x, conv.weight, conv.bias)


def as_images(x: Tensor) -> Tensor:
    """[B, C, T, h, w] as [B T, C, h, w]; a view where the order is channels-last."""
    return x.movedim(2, 1).flatten(0, 1)


def as_video(images: Tensor, batch: int) -> Tensor:
    return images.unflatten(0, (batch, -1)).movedim(1, 2)


def pieces(x: Tensor, starts: bool, size: int) -> Iterator[tuple[bool, Tensor]]:
    """`x` along time in pieces of `size`, and whether each is the first frame of its stream, which goes alone."""
    start = 0
    while start < x.shape[2]:
        first = starts and start == 0
        length = 1 if first else size
        yield first, x[:, :, start : start + length]
        start += length
