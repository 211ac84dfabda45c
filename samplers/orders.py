"""Which tokens are decided first: the orders of `tokens.decoding`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .schedules import check_count
from .tokens import CONFIDENCE, ORDER, Ask, Draws, Order

TINY = 2.0**-25  # below the smallest uniform draw above 0, so that its logarithm is finite


@dataclass(frozen=True, slots=True)
class RandomOrder:
    """A random permutation for each row, the same however many steps it is cut into."""

    looks: bool = field(default=False, init=False)

    def score(self, ask: Ask, log_prob: Tensor | None, draws: Draws) -> Tensor:
        return draws.uniform(0, ORDER, (ask.known.shape[1],)).gather(1, ask.targets)


@dataclass(frozen=True, slots=True)
class RasterOrder:
    """From the first place to the last."""

    looks: bool = field(default=False, init=False)

    def score(self, ask: Ask, log_prob: Tensor | None, draws: Draws) -> Tensor:
        return -ask.targets.float()


@dataclass(frozen=True, slots=True)
class Confidence:
    """The tokens the network is surest of: log p + temperature * Gumbel noise * (1 - k / (n_steps - 1)).

    Without noise the same few bland tokens come first, and the picture follows them.

    Source: MaskGIT, Chang et al. 2022 (arXiv:2202.04200), with its public code's temperature.
    """

    temperature: float = 4.5
    looks: bool = field(default=True, init=False)

    def score(self, ask: Ask, log_prob: Tensor | None, draws: Draws) -> Tensor:
        if log_prob is None:
            raise ValueError(
                "an order by confidence needs a head that knows probabilities; use RandomOrder with this one"
            )
        share = ask.step / (ask.n_steps - 1) if ask.n_steps > 1 else 0.0
        strength = self.temperature * (1 - share)
        if strength == 0:
            return log_prob
        uniform = draws.uniform(ask.step, CONFIDENCE, (ask.known.shape[1],)).gather(1, ask.targets)
        waiting = -torch.log(uniform.clamp_min(TINY))
        return log_prob - strength * torch.log(waiting.clamp_min(TINY))


@dataclass(frozen=True, slots=True)
class BlockOrder:
    """Blocks of neighbouring places one after the other, and `inner` inside each: frames of a video, rows of a picture.

    Use it with `counts.block_counts`. With one step per block it is Next Block Prediction (arXiv:2502.07737).

    Args:
        block: places per block; the last may be shorter.
        inner: the order inside a block.
    """

    block: int
    inner: Order = RasterOrder()

    def __post_init__(self) -> None:
        check_count(self.block, "block")

    @property
    def looks(self) -> bool:
        return self.inner.looks

    def score(self, ask: Ask, log_prob: Tensor | None, draws: Draws) -> Tensor:
        # Ranks, since the inner scores may be of any size; whole numbers, which float32 would round.
        rank = self.inner.score(ask, log_prob, draws).argsort(dim=1).argsort(dim=1)
        return rank - ask.targets // self.block * ask.targets.shape[1]


@dataclass(frozen=True, slots=True)
class ContrastiveOrder:
    """UNCAGE: places that clearly belong to one of the prompt's objects come before those that two objects share.

    The contrast of a place is its attention to the object it attends to most, minus its attention to the next one. That
    is a *surrogate*: the published guidance is of this kind, its exact normalisation is not used here.

    Source: UNCAGE, Kang et al. 2025 (arXiv:2508.05399).

    Args:
        attention: called after the network with the same question; cross-attention [B, n, S] of the targets to the
            prompt's tokens, averaged over heads and layers.
        objects: two or more groups of prompt tokens, one per object.
        weight: of the contrast against the inner order's scores, linear from this to 0 over the steps.
        inner: the order that is guided.
    """

    attention: Callable[[Ask], Tensor]
    objects: Sequence[Sequence[int]]
    weight: float = 1.0
    inner: Order = Confidence()
    looks: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if len(self.objects) < 2 or not all(self.objects):
            raise ValueError(
                f"objects must be two or more groups of prompt tokens, such as [(1, 2), (5,)], got {self.objects!r}"
            )

    def score(self, ask: Ask, log_prob: Tensor | None, draws: Draws) -> Tensor:
        attention = self.attention(ask)
        groups = torch.stack([attention[..., list(group)].amax(dim=-1) for group in self.objects], dim=-1)
        best, second = groups.topk(2, dim=-1).values.unbind(-1)
        share = ask.step / ask.n_steps
        return self.inner.score(ask, log_prob, draws) + self.weight * (1 - share) * (best - second)
