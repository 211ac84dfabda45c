"""How a `KVCache` keeps keys and values: as the model computes them, or in 8 bits."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..kernels.fused import quantize_rows
from .kv_chunk import Places, Rows

SCALE_BYTES = 4  # one float32


class Storage(Protocol):
    """A storage policy. A store is one tensor [layers, rows, tokens, heads, ...], so that it can be copied by rows.

    Attributes:
        reads_views: whether `read` gives a live view of neighbouring rows, so that it need not be asked again.
    """

    reads_views: ClassVar[bool]

    def allocate(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """An empty store for values of `shape` [layers, rows, tokens, H, D]."""
        ...

    def write(self, store: Tensor, layer: int, places: Places, value: Tensor) -> None:
        """`value` [B, n, H, D] into the chunk's places."""
        ...

    def read(self, store: Tensor, layer: int, rows: Rows, end: int, start: int = 0) -> Tensor:
        """Tokens [B, end - start, H, D] of some rows."""
        ...


class FullPrecision:
    """Keys and values as the model computes them."""

    reads_views: ClassVar[bool] = True

    def allocate(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    def write(self, store: Tensor, layer: int, places: Places, value: Tensor) -> None:
        places.put(store[layer], value.to(store.dtype))

    def read(self, store: Tensor, layer: int, rows: Rows, end: int, start: int = 0) -> Tensor:
        return rows.take(store[layer])[:, start:end]


class EightBits:
    """A byte per number, and a scale per token and head behind them: 0.52 of bfloat16's memory at 128 channels a head.

    Args:
        kind: torch.int8 (finer where a head's channels are alike) or torch.float8_e4m3fn (where a few stand out).
    """

    reads_views: ClassVar[bool] = False

    def __init__(self, kind: torch.dtype) -> None:
        self.kind = kind
        self.dtype = torch.float32

    def allocate(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        if shape[-1] % SCALE_BYTES:
            raise ValueError(f"keys in 8 bits want heads of a multiple of {SCALE_BYTES} channels, got {shape[-1]}")
        self.dtype = dtype
        return torch.zeros((*shape[:-1], shape[-1] + SCALE_BYTES), device=device, dtype=torch.int8)

    def write(self, store: Tensor, layer: int, places: Places, value: Tensor) -> None:
        values, scale = quantize_rows(value, self.kind)
        places.put(store[layer], torch.cat([values.view(torch.int8), scale.view(torch.int8)], dim=-1))

    def read(self, store: Tensor, layer: int, rows: Rows, end: int, start: int = 0) -> Tensor:
        kept = rows.take(store[layer])[:, start:end]
        values, scale = kept[..., :-SCALE_BYTES].view(self.kind), kept[..., -SCALE_BYTES:].view(torch.float32)
        if self.kind == torch.int8:
            return torch.mul(values, scale, out=values.new_empty(values.shape, dtype=self.dtype))
        return values.to(self.dtype).mul_(scale)
