"""Token transformers as the networks that `samplers.decoding` asks, each with its own way of not computing twice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import philox_normal, philox_uniform
from ..models.token_transformer import TokenTransformer
from ..samplers import Ask
from ..samplers.tokens import places, take


@dataclass(frozen=True, slots=True, eq=False)
class PhiloxDraws:
    """Random numbers that depend on a picture's own seed alone: `seeds` int64 [B], each in [0, 2^63)."""

    seeds: Tensor

    def uniform(self, step: int, kind: int, shape: tuple[int, ...]) -> Tensor:
        return philox_uniform(self.seeds, torch.zeros_like(self.seeds), 4 * step + kind, shape)

    def normal(self, step: int, kind: int, shape: tuple[int, ...]) -> Tensor:
        return philox_normal(self.seeds, torch.zeros_like(self.seeds), 4 * step + kind, shape)


class CachedNetwork:
    """Kinds two_pass and causal: decided tokens are fed once, and open places are asked for. Exact.

    Args:
        model: of kind two_pass, or causal for raster orders.
        text: prompt tokens [B, S, D], or [2 B, S, D] with guidance, the wanted half first.
    """

    def __init__(self, model: TokenTransformer, text: Tensor) -> None:
        self.model, self.cache = model, model.begin(text)
        self.rows = text.shape[0]

    def __call__(self, ask: Ask) -> Tensor:
        times = self.rows // ask.tokens.shape[0]
        new = repeated(ask.new, times)
        self.model.feed(take(repeated(ask.tokens, times), new), new, self.cache)
        return self.model.predict(repeated(ask.targets, times), self.cache)


class MaskedNetwork:
    """Kind masked: everything is computed anew at every step, or what has settled is taken from a cache.

    A token's keys and values hardly change once it has been seen decided, so they are kept from the step after its
    decision (dKV-Cache, Ma et al. 2025, arXiv:2505.15781: one step of delay). `refresh=1` is exact. Between refreshes
    the keys of settled tokens are older than the newest tokens: exact in the first layer, an approximation in deeper
    ones; `docs/images.md` states how large.

    With a `budget` only so many open places are computed anew, those with the most decided neighbours that were also
    predicted with most certainty (d2Cache, Jiang et al. 2025, arXiv:2509.23094; its second stage, attention rollout, is
    left out: a *surrogate*). The others keep their last prediction.

    Args:
        model: of kind masked.
        text: as in `CachedNetwork`.
        refresh: compute everything anew every so many steps; 1 never caches.
        budget: open places to compute at a step; None for all.
        reach: how far a decided place counts as a neighbour, the deviation of a Gaussian in grid cells.
    """

    def __init__(
        self, model: TokenTransformer, text: Tensor, *, refresh: int = 1, budget: int | None = None, reach: float = 1.5
    ) -> None:
        if refresh < 1 or (budget is not None and budget < 1):
            raise ValueError(f"refresh and budget must be at least 1, got {refresh} and {budget}")
        if model.config["attention"] == "lina" and (refresh > 1 or budget is not None):
            raise ValueError(
                f"linear attention keeps no keys that could be cached; take refresh=1 and no budget, got {refresh} "
                f"and {budget}"
            )
        self.model, self.cache, self.refresh, self.budget = model, model.begin(text), refresh, budget
        self.rows, self.asked = text.shape[0], 0
        self.left = model.tokens  # open places: a number the host knows, since `new` tells what was decided
        self.outputs: Tensor | None = None
        if budget is not None:
            cells = model.places.double()
            self.nearness = torch.exp(-torch.cdist(cells, cells).square() / (2 * reach**2)).to(text)

    def __call__(self, ask: Ask) -> Tensor:
        times = self.rows // ask.tokens.shape[0]
        tokens, known, targets = (repeated(part, times) for part in (ask.tokens, ask.known, ask.targets))
        self.left -= ask.new.shape[1]
        active = self._active(ask, times)
        self.asked += 1
        output = self.model.predict_masked(tokens, known, self.cache, active)
        wide = active[..., None].expand_as(output)
        if self.outputs is None:
            self.outputs = output.new_zeros(*known.shape, output.shape[-1])
        self.outputs.scatter_(1, wide, output)
        return take(self.outputs, targets)

    def _active(self, ask: Ask, times: int) -> Tensor:
        """The places to compute [rows, n], the same in both halves of a guided pair."""
        batch, count = ask.known.shape
        if self.asked % self.refresh == 0 or self.outputs is None:
            return torch.arange(count, device=ask.known.device).expand(batch * times, -1)
        opened = places(~ask.known, self.left)
        if self.budget is not None and self.budget < opened.shape[1]:
            certainty = self.outputs[:batch].float().softmax(dim=-1).amax(dim=-1)
            density = ask.known.to(self.nearness) @ self.nearness
            best = (certainty * density).gather(1, opened).topk(self.budget, dim=1).indices
            opened = opened.gather(1, best)
        return repeated(torch.cat([opened, ask.new], dim=1), times)


def network_of(model: TokenTransformer, text: Tensor, refresh: int = 1) -> CachedNetwork | MaskedNetwork:
    """The network of a model of any kind but "scales".

    Raises:
        ValueError: a `refresh` other than 1 of a model that caches exactly.
    """
    kind = model.config["kind"]
    if kind == "masked":
        return MaskedNetwork(model, text, refresh=refresh)
    if refresh != 1:
        raise ValueError(
            f'refresh is for transformers of kind "masked"; this "{kind}" one computes no token twice and is exact as '
            f"it is, so leave refresh at 1, got {refresh}"
        )
    return CachedNetwork(model, text)


def repeated(part: Tensor, times: int) -> Tensor:
    """`part` [B, ...] so many times one after the other: the halves of a guided pair are told the same."""
    return part.repeat(times, *[1] * (part.ndim - 1))
