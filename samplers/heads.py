"""What the tokens are: heads that turn a network's output into discrete or continuous tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .guidance import combine
from .rules import Euler
from .schedules import FlowSchedule, check_count
from .tokens import VALUE, Ask, Draws, take


@dataclass(frozen=True, slots=True)
class Categorical:
    """Discrete tokens from logits [B, n, V] by inversion: one uniform number per place decides.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only so many of the likeliest tokens; None for all.
        top_p: only the likeliest tokens that together reach this probability; 1 for all.

    Raises:
        ValueError: an argument out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_k is not None:
            check_count(self.top_k, "top_k")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def draw(self, output: Tensor, ask: Ask, draws: Draws, weight: float | None) -> tuple[Tensor, Tensor]:
        logits = output.float()
        if weight is not None:
            positive, negative = logits.chunk(2)
            logits = combine(positive, negative, weight)
        # Confidence is read before temperature and truncation, as MaskGIT does: they would flatter every token.
        log_probs = logits.log_softmax(dim=-1)
        if self.temperature == 0:
            values = logits.argmax(dim=-1)
        else:
            uniform = draws.uniform(ask.step, VALUE, (ask.known.shape[1],)).gather(1, ask.targets)
            values = self.invert(logits, uniform)
        return values, log_probs.gather(-1, values[..., None])[..., 0]

    def invert(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """The token [...] at which the distribution of logits [..., V] reaches `uniform` [...] in [0, 1)."""
        logits = logits if self.temperature == 1 else logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probs = logits.softmax(dim=-1)
        if self.top_p < 1:
            ordered, index = probs.sort(dim=-1, descending=True)
            beyond = ordered.cumsum(dim=-1) - ordered >= self.top_p
            probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), 0.0)
        reached = probs.cumsum(dim=-1)
        # `right`: a token of probability 0 is never drawn, not even by 0. The sum falls short of 1 by rounding.
        wanted = uniform[..., None].float() * reached[..., -1:]
        values = torch.searchsorted(reached, wanted, right=True)[..., 0]
        last = probs.shape[-1] - 1 - (probs > 0).flip(-1).byte().argmax(dim=-1)
        return torch.minimum(values, last)


@dataclass(frozen=True, slots=True)
class FlowTokens:
    """Continuous tokens: a small network carries each place's noise along a flow, under the condition of that place.

    Source: diffusion loss, MAR, Li et al. 2024 (arXiv:2406.11838), section 3.2, as a flow (v = noise - token).

    Args:
        velocity: (x [M, C], sigma, condition [M, D]) -> v [M, C].
        channels: C.
        steps: of Euler's rule.
        temperature: deviation of the noise at the start.
    """

    velocity: Callable[[Tensor, float, Tensor], Tensor]
    channels: int
    steps: int = 25
    temperature: float = 1.0

    def draw(self, output: Tensor, ask: Ask, draws: Draws, weight: float | None) -> tuple[Tensor, None]:
        noise = take(draws.normal(ask.step, VALUE, (ask.known.shape[1], self.channels)), ask.targets)
        x = (self.temperature * noise).flatten(0, 1)
        condition = output.flatten(0, 1)
        rule = Euler()
        for sigma, sigma_next in pairwise(FlowSchedule().sigmas(self.steps)):
            if weight is None:
                velocity = self.velocity(x, sigma, condition)
            else:
                both = self.velocity(torch.cat([x, x]), sigma, condition)
                positive, negative = both.chunk(2)
                velocity = combine(positive, negative, weight)
            x, _ = rule.step(x, velocity, sigma, sigma_next)
        return x.unflatten(0, noise.shape[:2]), None
