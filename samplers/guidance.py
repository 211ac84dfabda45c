"""Guidance as data: how strong (a weight per step) and by what means (a mechanism), freely combined.

Source: classifier-free guidance, Ho and Salimans 2022 (arXiv 2207.12598).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .flow import Sigma, check_like, check_sigma, upcast
from .schedules import check_count

Denoise = Callable[[Tensor, Sigma, Tensor], Tensor]
"""(x, sigma, condition) -> prediction of x's shape; x and condition share their first axis, the rows."""


def combine(positive: Tensor, negative: Tensor, weight: float | Tensor) -> Tensor:
    """negative + weight (positive - negative): weight 0 is the negative, 1 the positive, more goes beyond it.

    Args:
        positive: prediction under the wanted condition, any shape.
        negative: prediction under the unwanted or empty one, same shape.
        weight: a number, or a tensor with one axis per axis of `positive`.

    Raises:
        ValueError: the shapes differ.
    """
    negative_up = check_like("negative", negative, positive)
    return (negative_up + weight * (upcast(positive) - negative_up)).to(positive.dtype)


class Weight(Protocol):
    """How strong the guidance is at a step."""

    def __call__(self, step: int, n_steps: int) -> float:
        """The weight at `step` of `n_steps`, counted from 0."""
        ...


@dataclass(frozen=True, slots=True)
class ConstantWeight:
    """The same at every step. 1 is no guidance."""

    value: float = 1.0

    def __call__(self, step: int, n_steps: int) -> float:
        check_step_of(step, n_steps)
        return self.value


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """From `first` at the first step to `last` at the last; `first` if there is only one."""

    first: float
    last: float

    def __call__(self, step: int, n_steps: int) -> float:
        check_step_of(step, n_steps)
        share = step / (n_steps - 1) if n_steps > 1 else 0.0
        return (1 - share) * self.first + share * self.last


class Mechanism(Protocol):
    """How the two predictions are obtained.

    Attributes:
        calls: how often the network runs.
        rows: how many rows each sample takes in one call.
    """

    @property
    def calls(self) -> int: ...

    @property
    def rows(self) -> int: ...

    def pair(
        self, denoise: Denoise, x: Tensor, sigma: Sigma, positive: Tensor, negative: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(positive, negative) predictions at x [B, ...] and level sigma, each of x's shape."""
        ...


@dataclass(frozen=True, slots=True)
class BatchedPair:
    """One call with twice the rows: the positive half first."""

    calls: int = field(default=1, init=False)
    rows: int = field(default=2, init=False)

    def pair(
        self, denoise: Denoise, x: Tensor, sigma: Sigma, positive: Tensor, negative: Tensor
    ) -> tuple[Tensor, Tensor]:
        if positive.shape != negative.shape:
            raise ValueError(
                f"a batched pair needs conditions of one shape, got {list(positive.shape)} and {list(negative.shape)}: "
                "pad the shorter one, or use TwoCalls"
            )
        if isinstance(sigma, Tensor) and sigma.ndim and sigma.shape[0] > 1:
            sigma = torch.cat([sigma, sigma])
        both = denoise(torch.cat([x, x]), sigma, torch.cat([positive, negative]))
        first, second = both.chunk(2)
        return first, second


@dataclass(frozen=True, slots=True)
class TwoCalls:
    """One call after the other: half the memory, and conditions may differ in shape."""

    calls: int = field(default=2, init=False)
    rows: int = field(default=1, init=False)

    def pair(
        self, denoise: Denoise, x: Tensor, sigma: Sigma, positive: Tensor, negative: Tensor
    ) -> tuple[Tensor, Tensor]:
        return denoise(x, sigma, positive), denoise(x, sigma, negative)


@dataclass(frozen=True, slots=True)
class Residual:
    """No second pass: the negative is the velocity from the input image to x, as if the input explained x entirely.

    With eps_u = (x - (1 - sigma) x0) / sigma the virtual noise, eps_u - x0 = (x - x0) / sigma. Here `negative` is that
    input x0, clean and of x's shape, and sigma must be above 0.

    Source: residual classifier-free guidance, StreamDiffusion (arXiv 2312.12491), section 3.2, carried over from noise
    to velocity prediction; the two agree at delta = 1.

    Args:
        delta: strength of the virtual negative.
    """

    delta: float = 1.0
    calls: int = field(default=1, init=False)
    rows: int = field(default=1, init=False)

    def pair(
        self, denoise: Denoise, x: Tensor, sigma: Sigma, positive: Tensor, negative: Tensor
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(sigma, Tensor) and sigma == 0:
            raise ValueError("residual guidance has no direction at sigma = 0: guide at noisy levels only")
        velocity = (upcast(x) - check_like("negative", negative, x)) / check_sigma(sigma, x)
        return denoise(x, sigma, positive), (self.delta * velocity).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Guidance:
    """A weight schedule and a mechanism. The default is no guidance."""

    weight: Weight = ConstantWeight()
    mechanism: Mechanism = BatchedPair()

    def predict(
        self,
        denoise: Denoise,
        x: Tensor,
        sigma: Sigma,
        positive: Tensor,
        negative: Tensor | None = None,
        *,
        step: int = 0,
        n_steps: int = 1,
    ) -> Tensor:
        """The guided prediction, of x's shape. Where the weight is 1 the negative cancels out and isn't computed.

        Args:
            denoise: the network, (x, sigma, condition) -> prediction.
            x: the sample [B, ...] at level sigma.
            sigma: a number, or a tensor that broadcasts against x.
            positive: the wanted condition [B, ...].
            negative: the unwanted one (for `Residual` the clean input); may be None where the weight is 1.
            step: which step this is, from 0.
            n_steps: how many there are.

        Raises:
            ValueError: shapes that don't fit, step out of range, or a missing negative.
        """
        weight = self.weight(step, n_steps)
        if weight == 1:
            return denoise(x, sigma, positive)
        if negative is None:
            raise ValueError(f"guidance of weight {weight:g} needs a negative condition; weight 1 needs none")
        return combine(*self.mechanism.pair(denoise, x, sigma, positive, negative), weight)


def check_step_of(step: int, n_steps: int) -> None:
    check_count(n_steps, "n_steps")
    if not 0 <= step < n_steps:
        raise ValueError(f"step must be from 0 to {n_steps - 1}, got {step}")
