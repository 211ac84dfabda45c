"""Causal convolutions over time that run on a whole clip or on any pieces of it, with what they keep in one state.

A layer sees its own and earlier samples only. Run on a piece, it puts the last samples of its input that the piece
before left in `AudioState` in front; a whole clip has silence there. So pieces equal the whole by construction.
Shapes: B rows, C channels, S samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(eq=False)
class AudioState:
    """Everything running encoders and decoders remember, one row per stream.

    Attributes:
        tensors: name of a layer -> the last samples of its input [rows, C, kept]. Their addresses never change.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory it holds, however long the stream is."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def reset(self, row: int) -> None:
        """Forget what `row` heard: its next sample is a first one."""
        for tensor in self.tensors.values():
            tensor[row].zero_()

    def snapshot(self, row: int) -> dict[str, Tensor]:
        """A copy of one row that later steps leave alone."""
        return {name: tensor[row].clone() for name, tensor in self.tensors.items()}

    def restore(self, row: int, saved: Mapping[str, Tensor]) -> None:
        """Put a snapshot back, into this state or another of the same shape. ValueError if it is another's."""
        for name, tensor in self.tensors.items():
            if name not in saved or saved[name].shape != tensor[row].shape:
                seen = tuple(saved[name].shape) if name in saved else "nothing"
                raise ValueError(f"the saved state has {name} = {seen}, this codec needs {tuple(tensor[row].shape)}")
        for name, tensor in self.tensors.items():
            tensor[row].copy_(saved[name])

    def take(self, rows: list[int]) -> AudioState:
        """The state of some rows, to be run together: a view where one row or all are asked for, else a copy."""
        if len(rows) == 1:
            return AudioState({name: tensor[rows[0] : rows[0] + 1] for name, tensor in self.tensors.items()})
        return AudioState({name: tensor[rows] for name, tensor in self.tensors.items()})

    def put(self, rows: list[int], part: AudioState) -> None:
        """Write back what `take` took and a step changed."""
        for name, tensor in self.tensors.items():
            if len(rows) > 1:
                tensor[rows] = part.tensors[name]


class CausalConv1d(nn.Conv1d):
    """A convolution that looks back: padded on the left by what came before.

    Args:
        name: under which its past is kept in an `AudioState`.
    """

    def __init__(
        self, channels: int, out_channels: int, kernel: int, *, name: str, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__(channels, out_channels, kernel, stride=stride, dilation=dilation)
        self.name, self.kept = name, (kernel - 1) * dilation + 1 - stride

    def forward(self, x: Tensor, state: AudioState | None = None) -> Tensor:
        if self.kept == 0:
            return self._conv_forward(x, self.weight, self.bias)
        if state is None:
            return self._conv_forward(F.pad(x, (self.kept, 0)), self.weight, self.bias)
        past = state.tensors[self.name]
        x = torch.cat([past.to(x.dtype), x], dim=-1)
        past.copy_(x[..., -self.kept :])
        return self._conv_forward(x, self.weight, self.bias)

    def past(self, rows: int) -> Tensor:
        return self.weight.new_zeros(rows, self.in_channels, self.kept)


class CausalUpsample(nn.Module):
    """A transposed convolution of stride r and kernel 2 r, as one convolution of kernel 2 whose channels unfold."""

    def __init__(self, channels: int, out_channels: int, rate: int, *, name: str) -> None:
        super().__init__()
        self.conv = CausalConv1d(channels, out_channels * rate, 2, name=name)
        self.rate = rate

    def forward(self, x: Tensor, state: AudioState | None = None) -> Tensor:
        return self.conv(x, state).unflatten(1, (-1, self.rate)).transpose(2, 3).flatten(2)


class Snake(nn.Module):
    """x + sin(a x)^2 / a: an activation that knows periods (Ziyin et al. 2020, arXiv:2006.08195)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.alpha * x).square() / (self.alpha + 1e-6)


class AudioResidual(nn.Module):
    """SEANet's residual block: a dilated convolution and a pointwise one, half as wide in between."""

    def __init__(self, channels: int, dilation: int, *, name: str) -> None:
        super().__init__()
        self.snake1, self.snake2 = Snake(channels), Snake(channels // 2)
        self.conv1 = CausalConv1d(channels, channels // 2, 3, name=name, dilation=dilation)
        self.conv2 = nn.Conv1d(channels // 2, channels, 1)

    def forward(self, x: Tensor, state: AudioState | None = None) -> Tensor:
        return x + self.conv2(self.snake2(self.conv1(self.snake1(x), state)))


class AudioStack(nn.Module):
    """Layers in a row; those with a past get the state."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, state: AudioState | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x) if isinstance(layer, Snake) else layer(x, state)
        return x

    def pasts(self, rows: int) -> dict[str, Tensor]:
        """Empty pasts of all layers, silence."""
        layers = [layer for layer in self.modules() if isinstance(layer, CausalConv1d) and layer.kept]
        return {layer.name: layer.past(rows) for layer in layers}
