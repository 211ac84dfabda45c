"""Tokens in levels, coarse to fine: the scales of VAR and the codebooks of residual quantisers are the same thing.

A level's tokens are folded into a canvas, and the canvas makes the next level's input. Inside a level any counts and
order serve: VAR decides a whole scale in one step, SoundStorm takes 16 masked steps for the first codebook and one
greedy step for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .orders import RasterOrder
from .tokens import Ask, Draws, Head, Order, decode

VAR_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


class Levels(Protocol):
    """How levels build on each other. `sizes[i]` is the number of tokens of level i."""

    @property
    def sizes(self) -> Sequence[int]: ...

    def blank(self, batch: int) -> Tensor:
        """The canvas before the first level."""
        ...

    def fold(self, level: int, values: Tensor, canvas: Tensor) -> Tensor:
        """The canvas after tokens [B, sizes[level]] of this level."""
        ...

    def next_input(self, canvas: Tensor, level: int) -> Tensor:
        """What `level` (from 1) sees of the canvas: [B, sizes[level], C]."""
        ...


class Level(NamedTuple):
    """How one level is decided: tokens per step (`None`: all at once), in which order, by which head."""

    head: Head
    counts: Sequence[int] | None = None
    order: Order = RasterOrder()


LevelNetwork = Callable[[int, Tensor | None, Ask], Tensor]
"""(level, that level's input [B, n, C] or None at the first, question) -> output at `ask.targets`, as `Network`."""


class LevelDone(NamedTuple):
    """After a level: its tokens [B, n], and the canvas with them."""

    level: int
    tokens: Tensor
    canvas: Tensor


class LevelDraws:
    """The draws of one level of a decoding: its steps are counted from where the level before stopped."""

    def __init__(self, draws: Draws, first: int) -> None:
        self.draws, self.first = draws, first

    def uniform(self, step: int, kind: int, shape: tuple[int, ...]) -> Tensor:
        return self.draws.uniform(self.first + step, kind, shape)

    def normal(self, step: int, kind: int, shape: tuple[int, ...]) -> Tensor:
        return self.draws.normal(self.first + step, kind, shape)


def decoding_levels(
    network: LevelNetwork,
    levels: Levels,
    plan: Sequence[Level],
    *,
    batch: int,
    draws: Draws,
    guidance: Sequence[float] | None = None,
    prompt: Sequence[Tensor] | None = None,
) -> Iterator[LevelDone]:
    """Decide level after level.

    Args:
        network: see `LevelNetwork`.
        levels: how they build on each other.
        plan: how each is decided; as many as there are sizes.
        batch: B.
        draws: where random numbers come from.
        guidance: a weight for each level, or None. VAR's is `level_weights`.
        prompt: for each level the tokens [B, p] of its first places, which are kept; the counts of its plan decide the
            others.

    Raises:
        ValueError: a plan, weights or a prompt of another length than `levels.sizes`.
    """
    for seen in (len(part) for part in (plan, guidance, prompt) if part is not None):
        if seen != len(levels.sizes):
            raise ValueError(
                f"there are {len(levels.sizes)} levels, so the plan and the guidance need as many; got {seen}"
            )
    canvas, first = levels.blank(batch), 0
    for number, (size, level) in enumerate(zip(levels.sizes, plan)):
        given = levels.next_input(canvas, number) if number else None
        kept = 0 if prompt is None else prompt[number].shape[1]
        counts = list(level.counts or [size - kept])
        open_tokens = torch.zeros(batch, size - kept, dtype=torch.int64, device=canvas.device)
        known = torch.arange(size, device=canvas.device).expand(batch, -1) < kept
        tokens = decode(
            lambda ask, number=number, given=given: network(number, given, ask),
            open_tokens if prompt is None else torch.cat([prompt[number], open_tokens], dim=1),
            known,
            counts=counts,
            order=level.order,
            head=level.head,
            draws=LevelDraws(draws, first),
            guidance=None if guidance is None else [guidance[number]] * len(counts),
        )
        canvas, first = levels.fold(number, tokens, canvas), first + len(counts)
        yield LevelDone(number, tokens, canvas)


def level_weights(scale: float, levels: int) -> list[float]:
    """VAR's guidance: (1 + t) positive - t negative with t = scale k / (levels - 1), as weights 1 + t."""
    return [1 + scale * (k / (levels - 1) if levels > 1 else 0.0) for k in range(levels)]


@dataclass(frozen=True, slots=True, eq=False)
class Scales:
    """VAR's pyramid of square token maps, the canvas [B, C, S, S] as large as the last.

    fold: canvas += phi_k(upsample(embed(tokens_k))); next input: the canvas averaged down to the next scale.

    Source: VAR, Tian et al. 2024 (arXiv:2404.02905), algorithm 2.

    Args:
        sides: of the maps, growing.
        embed: tokens [B, n] -> [B, n, C].
        phi: (level, canvas-sized map [B, C, S, S]) -> the same shape, a convolution that mends the upsampling.
        like: a tensor of the canvas's dtype and device.
        channels: C.
    """

    sides: Sequence[int]
    embed: Callable[[Tensor], Tensor]
    phi: Callable[[int, Tensor], Tensor]
    like: Tensor
    channels: int

    @property
    def sizes(self) -> Sequence[int]:
        return [side * side for side in self.sides]

    def blank(self, batch: int) -> Tensor:
        return self.like.new_zeros(batch, self.channels, self.sides[-1], self.sides[-1])

    def fold(self, level: int, values: Tensor, canvas: Tensor) -> Tensor:
        side = self.sides[level]
        small = self.embed(values).transpose(1, 2).unflatten(2, (side, side))
        return canvas + self.phi(level, upsampled(small, self.sides[-1]))

    def next_input(self, canvas: Tensor, level: int) -> Tensor:
        return F.interpolate(canvas, size=(self.sides[level],) * 2, mode="area").flatten(2).transpose(1, 2)


def upsampled(small: Tensor, side: int) -> Tensor:
    """[B, C, s, s] to [B, C, side, side], bicubic as in VAR; as it is at full size."""
    return small if small.shape[-1] == side else F.interpolate(small, size=(side, side), mode="bicubic")


@dataclass(frozen=True, slots=True, eq=False)
class Codebooks:
    """Residual vector quantisation: every level has a token at each of `length` places; the canvas sums what they mean.

    Source: SoundStorm, Borsos et al. 2023 (arXiv:2305.09636).

    Args:
        embed: (level, tokens [B, length]) -> [B, length, C].
        levels, length: how many codebooks, how many places.
        like: a tensor of the canvas's dtype and device.
        channels: C.
    """

    embed: Callable[[int, Tensor], Tensor]
    levels: int
    length: int
    like: Tensor
    channels: int

    @property
    def sizes(self) -> Sequence[int]:
        return [self.length] * self.levels

    def blank(self, batch: int) -> Tensor:
        return self.like.new_zeros(batch, self.length, self.channels)

    def fold(self, level: int, values: Tensor, canvas: Tensor) -> Tensor:
        return canvas + self.embed(level, values)

    def next_input(self, canvas: Tensor, level: int) -> Tensor:
        return canvas
