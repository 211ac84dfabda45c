"""The one loop behind masked, random-order, raster and block decoding of tokens.

Counts say how many tokens are decided at each step (`counts`), an order says which (`orders`), a head says what they
are (`heads`), and the network is a callable:

    MaskGIT, MaskGIL     share_counts, Confidence       every open token is predicted, the surest are kept
    ARPG                 curve_counts, RandomOrder      only the tokens of the step are predicted
    MAR, LINA            cosine_counts, RandomOrder     continuous tokens by a `FlowTokens` head
    raster AR            even_counts, RasterOrder       as many steps as tokens
    Next Block Prediction  block_counts, BlockOrder     all tokens of a frame at once
    UNCAGE               share_counts, ContrastiveOrder

Draws belong to (step, place), not to a batch: with counter-based noise a picture does not depend on its neighbours.
No value is read back from the device, so a whole decoding can be recorded as one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

ORDER, VALUE, CONFIDENCE = range(3)  # what a draw is for


class Draws(Protocol):
    """Random numbers that are a function of (the row's seed, step, kind, element); kinds are at most 3."""

    def uniform(self, step: int, kind: int, shape: tuple[int, ...]) -> Tensor:
        """[B, *shape] in [0, 1)."""
        ...

    def normal(self, step: int, kind: int, shape: tuple[int, ...]) -> Tensor:
        """[B, *shape], standard normal."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """What the network is asked at one step.

    Attributes:
        tokens: [B, N] or [B, N, C]; what stands at open places is of no meaning.
        known: bool [B, N].
        targets: int64 [B, n], the places to predict; all open.
        new: int64 [B, m], the places decided since the last question, at first those that were given. A network with a
            cache feeds only these.
        step, n_steps: which question of how many, from 0.
    """

    tokens: Tensor
    known: Tensor
    targets: Tensor
    new: Tensor
    step: int
    n_steps: int


Network = Callable[[Ask], Tensor]
"""To what the head understands at `targets`: logits [B, n, V], or conditions [B, n, D] of a flow head. With guidance
[2 B, n, ...], the wanted half first."""


class Head(Protocol):
    """Turns the network's output into tokens."""

    def draw(self, output: Tensor, ask: Ask, draws: Draws, weight: float | None) -> tuple[Tensor, Tensor | None]:
        """Tokens at `ask.targets` [B, n] (or [B, n, C]), and the logarithm of their probability [B, n], if known.

        `weight` is the guidance of this step; None if the output has no second half.
        """
        ...


class Order(Protocol):
    """Which open tokens come first. `looks`: does it need to see predictions of all open tokens?"""

    @property
    def looks(self) -> bool: ...

    def score(self, ask: Ask, log_prob: Tensor | None, draws: Draws) -> Tensor:
        """[B, n] for `ask.targets`, which are all open places; the highest are decided at this step."""
        ...


class Revealed(NamedTuple):
    """Where a decoding stands after a step: `tokens`, `known` as in `Ask`, and the places `targets` just decided."""

    tokens: Tensor
    known: Tensor
    targets: Tensor
    step: int
    n_steps: int


def decoding(
    network: Network,
    tokens: Tensor,
    known: Tensor,
    *,
    counts: Sequence[int],
    order: Order,
    head: Head,
    draws: Draws,
    guidance: Sequence[float] | None = None,
) -> Iterator[Revealed]:
    """Decide the open tokens, step by step.

    Args:
        network: see `Network`.
        tokens: int64 [B, N], or [B, N, C] for continuous ones; given tokens where `known`.
        known: bool [B, N]; the same number in every row.
        counts: tokens to decide at each step; they add up to the open ones.
        order, head: see there.
        draws: where random numbers come from.
        guidance: classifier-free weight of each step (1 is none), or None for a network without a second half.

    Yields:
        After every step. The tensors are new ones each time.

    Raises:
        ValueError: shapes, counts or weights that don't fit together. The number of known tokens is read on the CPU
            only: from a GPU it would cost a wait.
    """
    _check(tokens, known, counts, guidance)
    open_count = sum(counts)
    new = places(known, known.shape[1] - open_count)
    for step, count in enumerate(counts):
        candidates = places(~known, open_count)
        ask = Ask(tokens, known, candidates, new, step, len(counts))
        weight = None if guidance is None else float(guidance[step])
        if order.looks:
            drawn, log_prob = head.draw(network(ask), ask, draws, weight)
            best = order.score(ask, log_prob, draws).topk(count, dim=1).indices
            targets, values = candidates.gather(1, best), take(drawn, best)
        else:
            best = order.score(ask, None, draws).topk(count, dim=1).indices
            targets = candidates.gather(1, best)
            ask = Ask(tokens, known, targets, new, step, len(counts))
            values, _ = head.draw(network(ask), ask, draws, weight)
        tokens, known = put(tokens, targets, values), known.scatter(1, targets, True)
        open_count, new = open_count - count, targets
        yield Revealed(tokens, known, targets, step, len(counts))


def decode(
    network: Network,
    tokens: Tensor,
    known: Tensor,
    *,
    counts: Sequence[int],
    order: Order,
    head: Head,
    draws: Draws,
    guidance: Sequence[float] | None = None,
) -> Tensor:
    """`decoding` to its end: the tokens, all decided; as they were if none is open (no counts)."""
    for revealed in decoding(
        network, tokens, known, counts=counts, order=order, head=head, draws=draws, guidance=guidance
    ):
        tokens = revealed.tokens
    return tokens


def revealed_weights(counts: Sequence[int], scale: float) -> list[float]:
    """ARPG's guidance: from 1 to nearly `scale`, with the share of tokens that are decided before each step."""
    total = sum(counts)
    return [1 + (scale - 1) * sum(counts[:k]) / total for k in range(len(counts))]


def places(marked: Tensor, count: int) -> Tensor:
    """Indices [B, count] of the marked places of bool [B, N], in ascending order; `count` of them in every row."""
    return marked.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]


def take(values: Tensor, index: Tensor) -> Tensor:
    """`values` [B, N] or [B, N, C] at `index` [B, n]."""
    return values.gather(1, index if values.ndim == 2 else index[..., None].expand(-1, -1, values.shape[2]))


def put(values: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """A copy of `values` [B, N] or [B, N, C] with `new` at `index` [B, n]."""
    index = index if values.ndim == 2 else index[..., None].expand(-1, -1, values.shape[2])
    return values.scatter(1, index, new.to(values.dtype))


def _check(tokens: Tensor, known: Tensor, counts: Sequence[int], guidance: Sequence[float] | None) -> None:
    if known.dtype != torch.bool or known.ndim != 2 or tokens.ndim not in (2, 3) or tokens.shape[:2] != known.shape:
        raise ValueError(
            "decoding wants tokens [B, N] or [B, N, C] and known bool [B, N], "
            f"got {list(tokens.shape)} and {known.dtype} {list(known.shape)}"
        )
    if any(count < 1 for count in counts) or sum(counts) > known.shape[1]:
        raise ValueError(
            f"counts must be at least 1 each and at most {known.shape[1]} together, got {list(counts)}; "
            "make them with a count schedule of samplers.counts"
        )
    if guidance is not None and len(guidance) != len(counts):
        raise ValueError(f"guidance must hold one weight per step ({len(counts)}), got {len(guidance)}")
    if known.device.type == "cpu":
        given = known.sum(dim=1)
        wanted = known.shape[1] - sum(counts)
        if bool((given != wanted).any()):
            raise ValueError(
                f"counts decide {sum(counts)} tokens of {known.shape[1]}, so {wanted} must be known in every row, "
                f"got {given.tolist()}"
            )
