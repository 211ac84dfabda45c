"""How masked blocks are cut: boxes in coordinate space (causal frames, 3-D windows, dilation) and bits per query row.

Masks speak of *slots*: the places of a plan, block by block, which are tokens in order unless the plan permutes them.
All tensors are int32, live on the device, and may be broadcast over B rows and H heads (a dimension of 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# What stands for "no bound"; one less than the largest int32, so that a bound may still be counted up by one.
UNBOUNDED = 2**31 - 2


@dataclass(frozen=True, eq=False)
class BoxMask:
    """A query sees the keys inside its box: low <= at <= high on every axis.

    Keys with `at < sinks` on axis 0 are seen wherever the box begins, as long as they are not past `high` there: sink
    frames, and text tokens that stand at -1.

    Attributes:
        low, high: [B or 1, H or 1, axes, query slots]; `high < low` on any axis: the query sees nothing but sinks.
        at: [B or 1, H or 1, axes, key slots], the coordinates of the keys.
        fields: where several axes lie in one word, their (shift, bits); `axes` is 1 then, and there are no sinks. Each
            field has a spare bit above it, so that one subtraction compares all axes: a few instructions per score
            instead of dozens.
    """

    low: Tensor
    high: Tensor
    at: Tensor
    sinks: int = -UNBOUNDED
    fields: tuple[tuple[int, int], ...] = ()

    @classmethod
    def packed(cls, low: Tensor, high: Tensor, at: Tensor, sizes: Sequence[int]) -> BoxMask:
        """The mask with its axes in one word, if they fit: `at` lies in [0, size) on each axis, and no box is empty."""
        bits = [max(1, (size - 1).bit_length()) for size in sizes]
        if sum(bits) + len(bits) > 31:
            return cls(low, high, at)
        shifts = [sum(bits[:axis]) + axis for axis in range(len(bits))]
        last = torch.tensor(sizes, device=at.device)[:, None] - 1
        spread = torch.tensor(shifts, device=at.device)[:, None]
        low, high, at = (
            (x.clamp_min(0).minimum(last) << spread).sum(2, keepdim=True).to(torch.int32) for x in (low, high, at)
        )
        return cls(low, high, at, fields=tuple(zip(shifts, bits)))

    @property
    def guard(self) -> int:
        """The spare bits of all fields; 0 where the axes lie apart."""
        return sum(1 << (shift + bits) for shift, bits in self.fields)

    def _axes(self) -> tuple[Tensor, Tensor, Tensor]:
        """low, high and at with their axes apart."""
        if not self.fields:
            return self.low, self.high, self.at
        low, high, at = (
            torch.cat([(x >> shift) & ((1 << bits) - 1) for shift, bits in self.fields], 2)
            for x in (self.low, self.high, self.at)
        )
        return low, high, at

    def padded(self, q_slots: int, k_slots: int) -> BoxMask:
        """The same mask up to whole blocks; the last token is repeated, for lengths say where tokens end."""
        low, high = _pad(self.low, q_slots), _pad(self.high, q_slots)
        return replace(self, low=low, high=high, at=_pad(self.at, k_slots))

    def gathered(self, q_source: Tensor | None, k_source: Tensor | None, block: tuple[int, int]) -> BoxMask:
        """The mask of tokens as the mask of slots, where slot i holds token source[i] (-1: padding)."""
        low, high, at = self.low, self.high, self.at
        if q_source is not None:
            low, high = _gather(low, q_source, block[0]), _gather(high, q_source, block[0])
        if k_source is not None:
            at = _gather(at, k_source, block[1])
        return replace(self, low=low, high=high, at=at)

    def blocks(self, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(may hold a visible pair, every pair is visible), bool [B or 1, H or 1, NQ, NK], from the blocks' bounds.

        Exact for blocks that are boxes of the grid themselves; otherwise a block may be kept that holds nothing, and a
        full one may count as masked, both of which cost time only.
        """
        low, high, at = (_split(x, size) for x, size in zip(self._axes(), (block[0], block[0], block[1])))
        low_min, low_max = (x.unsqueeze(-1) for x in low.aminmax(dim=-1))
        high_min, high_max = (x.unsqueeze(-1) for x in high.aminmax(dim=-1))
        at_min, at_max = (x.unsqueeze(-2) for x in at.aminmax(dim=-1))
        some = ((high_max >= at_min) & (low_min <= at_max)).all(2)
        every = ((low_max <= at_min) & (high_min >= at_max)).all(2)
        some = some | ((at_min < self.sinks) & (at_min <= high_max))[:, :, 0]
        every = every | ((at_max < self.sinks) & (at_max <= high_min))[:, :, 0]
        return some, every

    def visible(self, indices: Tensor, block: tuple[int, int]) -> Tensor:
        """Bool [B, H, NQ, block_q, block_k]: what each query block sees of the key block `indices` [B, H, NQ]."""
        lows, highs, ats = self._axes()
        at = _split(ats, block[1])  # [B, H, axes, NK, block_k]
        at = at.expand(*indices.shape[:2], *at.shape[2:])
        choice = indices.long()[:, :, None, :, None].expand(-1, -1, at.shape[2], -1, block[1])
        at = at.gather(3, choice).unsqueeze(-2)
        low, high = (_split(x, block[0]).unsqueeze(-1) for x in (lows, highs))
        inside = ((at >= low) & (at <= high)).all(2)
        return inside | ((at < self.sinks) & (at <= high))[:, :, 0]


@dataclass(frozen=True, eq=False)
class RowMask:
    """One bit per (query, key block): bit j % 32 of word j // 32 says whether the query attends to key block j.

    Attributes:
        bits: [B or 1, H or 1, query slots, ceil(NK / 32)].
        box: a further cut inside the blocks, such as the causal one.
    """

    bits: Tensor
    box: BoxMask | None = None

    @classmethod
    def of(cls, chosen: Tensor, box: BoxMask | None = None) -> RowMask:
        """From bool [B or 1, H or 1, query slots, NK]."""
        words = -(-chosen.shape[-1] // 32)
        chosen = torch.nn.functional.pad(chosen, (0, words * 32 - chosen.shape[-1])).unflatten(-1, (words, 32))
        weights = torch.ones((), dtype=torch.int64, device=chosen.device) << torch.arange(32, device=chosen.device)
        unsigned = (chosen * weights).sum(-1)
        return cls(torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32), box)

    def padded(self, q_slots: int, k_slots: int) -> RowMask:
        bits = torch.nn.functional.pad(self.bits, (0, 0, 0, q_slots - self.bits.shape[2]))
        return RowMask(bits, None if self.box is None else self.box.padded(q_slots, k_slots))

    def gathered(self, q_source: Tensor | None, k_source: Tensor | None, block: tuple[int, int]) -> RowMask:
        """Bits already belong to slots' key blocks; only the queries move."""
        bits = self.bits
        if q_source is not None:
            bits = _gather(bits.transpose(2, 3), q_source, block[0]).transpose(2, 3).contiguous()
        return RowMask(bits, None if self.box is None else self.box.gathered(q_source, k_source, block))

    def blocks(self, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
        chosen = _split(self.bits.transpose(2, 3), block[0])  # [B, H, words, NQ, block_q]
        bits = (chosen.unsqueeze(-1) >> torch.arange(32, device=chosen.device, dtype=torch.int32)) & 1 == 1
        some, every = (x.permute(0, 1, 3, 2, 4).flatten(3) for x in (bits.any(-2), bits.all(-2)))
        if self.box is not None:
            cut, whole = self.box.blocks(block)
            missing = (0, some.shape[-1] - cut.shape[-1])
            some = some & torch.nn.functional.pad(cut, missing)
            every = every & torch.nn.functional.pad(whole, missing)
        return some, every

    def visible(self, indices: Tensor, block: tuple[int, int]) -> Tensor:
        bits = self.bits.unflatten(2, (-1, block[0]))  # [B, H, NQ, block_q, words]
        bits = bits.expand(*indices.shape[:2], *bits.shape[2:])
        word = (indices.long() // 32)[..., None, None].expand(-1, -1, -1, block[0], 1)
        seen = (bits.gather(-1, word) >> (indices % 32)[..., None, None]) & 1
        seen = (seen == 1).expand(-1, -1, -1, -1, block[1])
        return seen if self.box is None else seen & self.box.visible(indices, block)


Mask = BoxMask | RowMask


def causal_frames(
    query_frames: Tensor, key_frames: Tensor, *, window: int | None = None, sinks: int | None = None
) -> BoxMask:
    """A query sees the keys of its own frame and earlier ones: at most `window` frames, and the first `sinks` always.

    Args:
        query_frames: int [..., query slots], the frame each query belongs to, [L], [B, L] or [B, H, L]. Frames of one
            token each make ordinary causal attention. The tensor may be changed in place between calls.
        key_frames: int [..., key slots] likewise.
        window: how many frames a query sees, its own included; None: all earlier ones.
        sinks: keys of frames below this stay visible.
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 frame (a query's own), got {window}; None sees every earlier one")
    queries, keys = (_lead(x)[:, :, None].to(torch.int32) for x in (query_frames, key_frames))
    low = torch.full_like(queries, -UNBOUNDED) if window is None else queries - (window - 1)
    return BoxMask(low, queries, keys, -UNBOUNDED if sinks is None else sinks)


def window_mask(
    coordinates: Tensor,
    grid: Sequence[int],
    kernel: Sequence[int],
    *,
    stride: Sequence[int] | int = 1,
    dilation: Sequence[int] | int = 1,
    causal: Sequence[bool] | bool = False,
) -> BoxMask:
    """Generalized neighborhood attention's mask (arXiv 2504.16922) over a 1-, 2- or 3-D grid.

    Per axis of length n with window K, stride st: the leader of query q is min((q // st) * st + st // 2, n - 1); the
    window is centred on it and shifted inwards at the borders: the centre is clamped to [K // 2, n - 1 - (K // 2 +
    K % 2 - 1)] and the window holds [centre - K // 2, centre + K // 2 + K % 2 - 1]. On a causal axis the leader is the
    last of its group, min((q // st) * st + st - 1, n - 1), and a query sees the keys k <= q with leader - k < K.
    Dilation d splits an axis into d residue groups, and the rule holds inside each.

    Args:
        coordinates: int [axes, L], where each token (slot) stands on the grid.
        grid, kernel: lengths per axis. stride, dilation, causal: per axis, or one value for all.
    """
    axes = len(grid)
    strides, dilations, causals = (_per_axis(x, axes) for x in (stride, dilation, causal))
    lows, highs, ats, sizes = [], [], [], []
    for a in range(axes):
        n, size, st, d = grid[a], kernel[a], strides[a], dilations[a]
        if size < 1 or size * d > n or not 1 <= st <= size or d < 1:
            raise ValueError(
                f"axis {a} of length {n} needs 1 <= stride <= kernel and kernel * dilation <= length, "
                f"got kernel {size}, stride {st}, dilation {d}"
            )
        at, group = coordinates[a] // d, coordinates[a] % d
        length = (n - group + d - 1) // d  # of this token's residue group
        first = at // st * st
        if causals[a]:
            leader = torch.minimum(first + st - 1, length - 1)
            lows.append(leader - size + 1)
            highs.append(at)
        else:
            leader = torch.minimum(first + st // 2, length - 1)
            centre = torch.minimum(leader.clamp_min(size // 2), length - 1 - (size // 2 + size % 2 - 1))
            lows.append(centre - size // 2)
            highs.append(centre + size // 2 + size % 2 - 1)
        ats.append(at)
        sizes.append(-(-n // d))
        if d > 1:
            for bounds in (lows, highs, ats):
                bounds.append(group)
            sizes.append(d)
    low, high, at = (torch.stack(x)[None, None].to(torch.int32) for x in (lows, highs, ats))
    return BoxMask.packed(low, high, at, sizes)


def _per_axis(value, axes: int) -> tuple:
    return tuple(value) if isinstance(value, Sequence) else (value,) * axes


def _lead(x: Tensor) -> Tensor:
    """[L], [B, L] or [B, H, L] as [B or 1, H or 1, L]."""
    return x[None, None] if x.ndim == 1 else x[:, None] if x.ndim == 2 else x


def _split(x: Tensor, size: int) -> Tensor:
    return x.unflatten(-1, (-1, size))


def _pad(x: Tensor, slots: int) -> Tensor:
    missing = slots - x.shape[-1]
    return x if missing == 0 else torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], -1)


def _gather(x: Tensor, source: Tensor, block: int) -> Tensor:
    """x [B, H, axes, tokens] at source [B, H, slots]; padding repeats the first token of its block."""
    first = _split(source, block)[..., :1].expand(*source.shape[:-1], -1, block).flatten(-2)
    source = torch.where(source < 0, first, source).clamp_min(0).long().unsqueeze(2)
    rows, heads = max(x.shape[0], source.shape[0]), max(x.shape[1], source.shape[1])
    x = x.expand(rows, heads, *x.shape[2:])
    return x.gather(-1, source.expand(rows, heads, x.shape[2], -1)).contiguous()
