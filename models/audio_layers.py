"""Causal layers over time that run on a whole clip or on any pieces of it, with what they keep in one state.

A layer sees its own and earlier steps only. Run on a piece, it puts the last steps of its input that the piece before
left in `AudioState` in front; a whole clip has silence there. So pieces equal the whole by construction.
Shapes: B rows, C channels, S steps.
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
        tensors: name of a layer -> what it keeps [rows, ...], all 0 at the start. Their addresses never change.
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


def with_past(x: Tensor, kept: int, name: str, state: AudioState | None) -> Tensor:
    """`x` [..., S] behind the last `kept` steps before it, which the state then has of this piece."""
    if state is None:
        return F.pad(x, (kept, 0))
    past = state.tensors[name]
    x = torch.cat([past.to(x.dtype), x], dim=-1)
    past.copy_(x[..., x.shape[-1] - kept :])
    return x


class CausalConv1d(nn.Conv1d):
    """A convolution that looks back: padded on the left by what came before.

    Args:
        name: under which its past is kept in an `AudioState`.
    """

    def __init__(
        self, channels: int, out_channels: int, kernel: int, *, name: str, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(channels, out_channels, kernel, stride=stride, groups=groups)
        self.name, self.kept = name, kernel - stride

    def forward(self, x: Tensor, state: AudioState | None = None) -> Tensor:
        if self.kept:
            x = with_past(x, self.kept, self.name, state)
        return self._conv_forward(x, self.weight, self.bias)

    def past(self, rows: int) -> Tensor:
        return self.weight.new_zeros(rows, self.in_channels, self.kept)


class CausalUpsample(nn.Module):
    """`rate` steps for each one: a pointwise convolution whose channels unfold."""

    def __init__(self, channels: int, out_channels: int, rate: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, out_channels * rate, 1)
        self.rate = rate

    def forward(self, x: Tensor, state: AudioState | None = None) -> Tensor:
        return self.conv(x).unflatten(1, (-1, self.rate)).transpose(2, 3).flatten(2)


class CausalNeXt(nn.Module):
    """ConvNeXt's residual block (arXiv:2201.03545), looking back only: each channel over time, then all channels."""

    def __init__(self, channels: int, wide: int, *, name: str, kernel: int = 7) -> None:
        super().__init__()
        self.time = CausalConv1d(channels, channels, kernel, name=name, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.wide, self.narrow = nn.Linear(channels, wide), nn.Linear(wide, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.3))

    def forward(self, x: Tensor, state: AudioState | None = None) -> Tensor:
        y = self.norm(self.time(x, state).transpose(1, 2))
        return x + (self.scale * self.narrow(F.gelu(self.wide(y)))).transpose(1, 2)


class AudioStack(nn.Module):
    """Layers in a row, each called with the state."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, state: AudioState | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, state)
        return x

    def pasts(self, rows: int) -> dict[str, Tensor]:
        """Empty pasts of all layers, silence."""
        layers = [layer for layer in self.modules() if isinstance(layer, CausalConv1d) and layer.kept]
        return {layer.name: layer.past(rows) for layer in layers}
