"""A tiny video decoder in the layout of TAEHV: 2-D convolutions that also see the frame before.

Some hundred times cheaper than Wan's own decoder and a little softer; for previews and for small or busy machines.
Source of the layout: github.com/madebyollin/taehv, whose `taew2_1.pth` loads as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from .doubling import Weights, aligned, interleaved, phases, renew
from .stream_codec import PICTURES_PER_LATENT, CodecState, Place


class SoftClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """A residual block over a frame and the frame before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Frames `x` [B T, C, h, w] and the frame before them [B, C, h, w], which becomes the last of `x`."""
        past = torch.empty_like(x)
        frames, shifted = (each.unflatten(0, (before.shape[0], -1)) for each in (x, past))
        shifted[:, 0], shifted[:, 1:] = before, frames[:, :-1]
        before.copy_(frames[:, -1])
        return self.conv(torch.cat([x, past], dim=1)).add_(x).relu_()


class Grow(nn.Module):
    """One frame becomes `times` frames."""

    def __init__(self, channels: int, times: int) -> None:
        super().__init__()
        self.times = times
        self.conv = nn.Conv2d(channels, times * channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B T, C, h, w] to [B T times, C, h, w]."""
        grown = self.conv(x)
        if self.times == 1:
            return grown
        return grown.unflatten(1, (self.times, -1)).permute(0, 1, 3, 4, 2).flatten(0, 1).permute(0, 3, 1, 2)


class TinyVideoDecoder(ModelMixin, ConfigMixin):
    """Latents to pictures; takes the place of a `WanDecoder`.

    Args:
        latent_channels: z, 16 for Wan 2.1 and 48 for Wan 2.2.
        patch_size: pixels each way that one output element stands for: 1 for Wan 2.1, 2 for Wan 2.2.
        widths: channels at each of the four sizes.
    """

    @register_to_config
    def __init__(
        self, latent_channels: int = 16, patch_size: int = 1, widths: Sequence[int] = (256, 128, 64, 64)
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [SoftClamp(), nn.Conv2d(latent_channels, widths[0], 3, padding=1), nn.ReLU(True)]
        for width, narrower, times in zip(widths, widths[1:], (1, 2, 2)):
            layers += [MemoryBlock(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), Grow(width, times)]
            layers += [nn.Conv2d(width, narrower, 3, padding=1, bias=False)]
        layers += [nn.ReLU(True), nn.Conv2d(widths[-1], 3 * patch_size**2, 3, padding=1)]
        self.made: dict[nn.Module, Weights] = {}  # weights of layers that are run otherwise
        self.decoder = nn.Sequential(*layers).to(memory_format=torch.channels_last)  # what convolutions want  # pyright: ignore[reportCallIssue]  (wrapped overloads)

    @property
    def pixels(self) -> int:
        """Pixels, each way, per latent element."""
        return 8 * self.config["patch_size"]

    def begin(self, height: int, width: int, batch: int = 1) -> CodecState:
        """An empty state for streams of `height` x `width` pixels, on the device of the weights.

        Raises:
            ValueError: the size is no multiple of what a latent spans.
        """
        if height % self.pixels or width % self.pixels or min(height, width) < 1:
            raise ValueError(f"height and width must be multiples of {self.pixels} pixels, got {height} x {width}")
        with torch.no_grad():
            renew(self.made, self._other_weights())
        places = self.places(height, width)
        shapes = {name: (batch, place.channels, place.height, place.width) for name, place in places.items()}
        return CodecState(
            {name: torch.zeros(shape, device=self.device, dtype=self.dtype) for name, shape in shapes.items()}
        )

    def _other_weights(self) -> Iterator[tuple[nn.Module, Weights]]:
        """What comes after doubling, for pictures that are not doubled yet, and what gives the colours."""
        for before, layer in pairwise(self.decoder):
            if isinstance(before, Grow) and isinstance(layer, nn.Conv2d):
                yield layer, (phases(layer.weight), None)
        last = self.decoder[-1]
        if isinstance(last, nn.Conv2d) and last.bias is not None and last.weight.is_cuda:
            yield last, aligned(last.weight, last.bias)

    def places(self, height: int, width: int) -> dict[str, Place]:
        """What every layer keeps for a stream of `height` x `width` pixels."""
        h, w, frames, places = height // self.pixels, width // self.pixels, 1, {}
        for index, layer in enumerate(self.decoder):
            if isinstance(layer, MemoryBlock):
                places[f"decoder.{index}"] = Place(layer.channels, 1, h, w, frames)
            elif isinstance(layer, nn.Upsample):
                h, w = 2 * h, 2 * w
            elif isinstance(layer, Grow):
                frames *= layer.times
        return places

    def memory(self, height: int, width: int) -> tuple[int, int]:
        """Bytes of a stream's state, and of the widest layer's input for one latent frame."""
        places, size = self.places(height, width).values(), self.dtype.itemsize
        return size * sum(place.elements for place in places), size * max(place.widest(1) for place in places)

    @torch.no_grad()
    def decode(self, latents: Tensor, state: CodecState) -> Tensor:
        """The pictures of the next latents.

        Args:
            latents: [B, z, F, h, w], normalised; F of any size.
            state: from `begin`; moves on.

        Returns:
            [B, T, 3, H, W] in [0, 1]; T is 4 F, or 4 F - 3 if the first frame of the stream is among them.
        """
        batch, _, height, width = state.buffers["decoder.3"].shape
        z = self.config["latent_channels"]
        if latents.ndim != 5 or (*latents.shape[:2], *latents.shape[3:]) != (batch, z, height, width):
            raise ValueError(f"latents must be [{batch}, {z}, F, {height}, {width}], got {list(latents.shape)}")
        starts = state.frames == 0 and latents.shape[2] > 0
        state.frames += latents.shape[2]
        if latents.shape[2] == 0:
            return latents.new_empty((batch, 0, 3, height * self.pixels, width * self.pixels), dtype=self.dtype)
        x = latents.to(self.dtype).movedim(2, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        for index, layer in enumerate(self.decoder):
            if isinstance(layer, MemoryBlock):
                x = layer(x, state.buffers[f"decoder.{index}"])
            elif layer in self.made:
                weight, bias = self.made[layer]
                x = F.conv2d(x, weight, bias, padding=1)
                x = interleaved(x) if bias is None else x[:, : 3 * self.config["patch_size"] ** 2]
            elif not isinstance(layer, nn.Upsample):  # doubled are only the results of the convolution that follows
                x = layer(x)
        pictures = F.pixel_shuffle(x, self.config["patch_size"]).clamp_(0, 1).unflatten(0, (batch, -1))
        return pictures[:, PICTURES_PER_LATENT - 1 :] if starts else pictures
