"""How a `KVCache` keeps keys and values: as the model computes them, in 8 bits with scales, or in float8 without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..kernels import BlockPlan, attend
from ..kernels.attention.float8 import attend_float8
from ..kernels.attention.turned import GRAIN, turn_values, turned_back, turned_place
from ..kernels.float8 import FLOAT8, to_float8
from ..kernels.fused import quantize_rows
from .kv_chunk import Places, Rows, Slices

SCALE_BYTES = 4  # one float32


class Storage(Protocol):
    """How keys are kept, and, as its `values` say, values. A store is one tensor [layers, rows, ...], so that it can be
    copied by rows.

    Attributes:
        reads_views: whether `read` gives a live view of neighbouring rows, so that it need not be asked again.
        attends_in: the dtype that queries and keys are wanted in; None takes them as the model computes them.
        grain: a span of tokens is read from a multiple of it on.
        attend: `kernels.attend` over keys and values as they are read.
    """

    reads_views: ClassVar[bool]
    attends_in: ClassVar[torch.dtype | None]
    grain: ClassVar[int]
    attend: ClassVar[Callable[..., Any]]

    @property
    def values(self) -> Storage:
        """How values are kept."""
        ...

    def allocate(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """An empty store for values of `shape` [layers, rows, tokens, H, D]."""
        ...

    def write(self, store: Tensor, layer: int, places: Places, value: Tensor) -> None:
        """`value` [B, n, H, D] into the chunk's places."""
        ...

    def read(self, store: Tensor, layer: int, rows: Rows, end: int, start: int = 0) -> Tensor:
        """Tokens [B, end - start, H, D] of some rows, or what `attend` wants instead."""
        ...

    def widened(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and keys and values as they were read, as `kernels.attend` takes them: [B, L, H, D] of one dtype."""
        ...


class FullPrecision:
    """Keys and values as the model computes them."""

    reads_views: ClassVar[bool] = True
    attends_in: ClassVar[torch.dtype | None] = None
    grain: ClassVar[int] = 1
    attend: ClassVar[Callable[..., Any]] = staticmethod(attend)

    @property
    def values(self) -> Storage:
        return self

    def allocate(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    def write(self, store: Tensor, layer: int, places: Places, value: Tensor) -> None:
        places.put(store[layer], value.to(store.dtype))

    def read(self, store: Tensor, layer: int, rows: Rows, end: int, start: int = 0) -> Tensor:
        return rows.take(store[layer])[:, start:end]

    def widened(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v


class EightBits(FullPrecision):
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
        values, scale, _ = quantize_rows(value, self.kind)
        places.put(store[layer], torch.cat([values.view(torch.int8), scale.view(torch.int8)], dim=-1))

    def read(self, store: Tensor, layer: int, rows: Rows, end: int, start: int = 0) -> Tensor:
        kept = rows.take(store[layer])[:, start:end]
        values, scale = kept[..., :-SCALE_BYTES].view(self.kind), kept[..., -SCALE_BYTES:].view(torch.float32)
        if self.kind == torch.int8:
            return torch.mul(values, scale, out=values.new_empty(values.shape, dtype=self.dtype))
        return values.to(self.dtype).mul_(scale)


def _attend_kept(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | None = None,
    *,
    mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    if plan is not None:
        raise ValueError("float8 is attended to without a plan; give the plan what `widened` makes of it")
    out, lse = attend_float8(to_float8(q), k, v, mask=mask)
    return (out, lse) if return_lse else out


class Float8(FullPrecision):
    """Keys and values as float8_e4m3fn without scales, half of bfloat16's memory, multiplied as they are
    (`kernels.attention.float8`)."""

    attends_in: ClassVar[torch.dtype | None] = FLOAT8
    grain: ClassVar[int] = GRAIN
    attend: ClassVar[Callable[..., Any]] = staticmethod(_attend_kept)

    @property
    def values(self) -> Storage:
        return TurnedFloat8()

    def allocate(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        return super().allocate(shape, device, FLOAT8)

    def write(self, store: Tensor, layer: int, places: Places, value: Tensor) -> None:
        # As bytes, which every kernel of PyTorch can move.
        places.put(store[layer].view(torch.uint8), to_float8(value).view(torch.uint8))

    def read(self, store: Tensor, layer: int, rows: Rows, end: int, start: int = 0) -> Tensor:
        return rows.take(store[layer].view(torch.uint8))[:, start:end].view(FLOAT8)

    def widened(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q.bfloat16(), k.bfloat16(), turned_back(v, k.shape[1]).bfloat16()


class TurnedFloat8(Float8):
    """Values whose keys lie next to one another: [layers, rows, H, D, tokens], as FP8 tensor cores take them."""

    def allocate(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        layers, rows, tokens, heads, dim = shape
        return super().allocate((layers, rows, heads, dim, -(-tokens // GRAIN) * GRAIN), device, dtype)

    def write(self, store: Tensor, layer: int, places: Places, value: Tensor) -> None:
        if isinstance(places, Slices):
            for rows, items, slots in places.parts:
                turn_values(value[items], store[layer, rows], slots.start)
            return
        turned = store[layer].view(torch.uint8).permute(0, 3, 1, 2)
        turned[places.rows, turned_place(places.slots)] = to_float8(value).view(torch.uint8)

    def read(self, store: Tensor, layer: int, rows: Rows, end: int, start: int = 0) -> Tensor:
        end = -(-end // GRAIN) * GRAIN
        return rows.take(store[layer].view(torch.uint8))[..., start:end].view(FLOAT8)
