"""How one step changes x: from level sigma to level sigma_next, given the network's prediction.

Every rule is a pure elementwise function of tensors: no step counter, no buffers. What a rule must remember between
calls is returned as `memory` and handed to the next call. So two streams can share one rule, and a state that holds x
and memory can be saved, forked and resumed. Levels may differ per frame or row (see `flow`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from .flow import Sigma, as_level, check_like, check_sigma, upcast
from .schedules import QUARTER_TURN


class Rule(Protocol):
    """One update rule.

    Attributes:
        evaluations_per_step: how often the network is asked per step, each time followed by a call of `step` with the
            same two levels: first at sigma, then, if there is a second time, at sigma_next.
        needs_noise: whether `step` consumes fresh noise; a rule that doesn't ignores what it is given.
        predicts_jumps: whether the network also reads sigma_next, as flow maps do.
    """

    evaluations_per_step: ClassVar[int]
    needs_noise: ClassVar[bool]
    predicts_jumps: ClassVar[bool]

    def step(
        self,
        x: Tensor,
        prediction: Tensor,
        sigma: Sigma,
        sigma_next: Sigma,
        *,
        noise: Tensor | None = None,
        memory: Any = None,
    ) -> tuple[Tensor, Any]:
        """Move x from sigma to sigma_next.

        Args:
            x: the sample at level sigma, any shape, any floating dtype; computed in float32 or better.
            prediction: the network's output at x, same shape.
            sigma: present level; a number in [0, 1], or a tensor with one axis per axis of x (see `check_sigma`).
            sigma_next: level to reach, likewise.
            noise: fresh unit Gaussian noise of x's shape, if `needs_noise`.
            memory: what the previous call returned; None at the first.

        Returns:
            x at sigma_next in x's dtype, and the memory for the next call.

        Raises:
            ValueError: shapes that don't fit, a level out of range, or missing noise.
        """
        ...


@dataclass(frozen=True, slots=True)
class Euler:
    """x + (sigma_next - sigma) v. First order; exact where the path is straight."""

    evaluations_per_step: ClassVar[int] = 1
    needs_noise: ClassVar[bool] = False
    predicts_jumps: ClassVar[bool] = False

    def step(
        self,
        x: Tensor,
        prediction: Tensor,
        sigma: Sigma,
        sigma_next: Sigma,
        *,
        noise: Tensor | None = None,
        memory: None = None,
    ) -> tuple[Tensor, None]:
        distance = check_sigma(sigma_next, x) - check_sigma(sigma, x)
        return (upcast(x) + distance * check_like("prediction", prediction, x)).to(x.dtype), None


@dataclass(frozen=True, slots=True)
class FlowMap(Euler):
    """x + (t - s) u(x, s, t): Euler's arithmetic, exact at any distance, since u is the mean velocity between s and t.

    Source: flow maps, Boffi et al. 2024 (arXiv 2406.07507); MeanFlow, Geng et al. 2025 (arXiv 2505.13447), equation 12.
    """

    predicts_jumps: ClassVar[bool] = True


class HeunMemory(NamedTuple):
    """Where the step started, and the prediction there."""

    x: Tensor
    prediction: Tensor


@dataclass(frozen=True, slots=True)
class Heun:
    """Second order with two evaluations: an Euler step, then the same step with the mean of both predictions.

    The first call returns the Euler step and a memory, the second call (prediction made at that x and at sigma_next)
    the corrected one and no memory. The first result is a valid sample already, so a caller may stop there and drop
    the memory. Where sigma_next is 0 the second call changes nothing: networks are rarely trained at level 0.

    Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 1.
    """

    evaluations_per_step: ClassVar[int] = 2
    needs_noise: ClassVar[bool] = False
    predicts_jumps: ClassVar[bool] = False

    def step(
        self,
        x: Tensor,
        prediction: Tensor,
        sigma: Sigma,
        sigma_next: Sigma,
        *,
        noise: Tensor | None = None,
        memory: HeunMemory | None = None,
    ) -> tuple[Tensor, HeunMemory | None]:
        if memory is None:
            return Euler().step(x, prediction, sigma, sigma_next)[0], HeunMemory(x, prediction)
        mean = (upcast(memory.prediction) + check_like("prediction", prediction, x)) / 2
        corrected = Euler().step(upcast(memory.x), mean, sigma, sigma_next)[0].to(x.dtype)
        if isinstance(sigma_next, Tensor):
            return torch.where(sigma_next == 0, x, corrected), None
        return x if sigma_next == 0 else corrected, None


@dataclass(frozen=True, slots=True)
class Renoise:
    """Jump to the clean data the prediction points at, x0 = x - sigma v, then back up to sigma_next with fresh noise.

    The rule of few-step distilled models. No noise is needed for a step to the number 0.

    Source: Consistency Models, Song et al. 2023 (arXiv 2303.01469), algorithm 1; DMD2, Yin et al. 2024 (arXiv
    2405.14867); Self-Forcing, Huang et al. 2025 (arXiv 2506.08009), algorithm 1.
    """

    evaluations_per_step: ClassVar[int] = 1
    needs_noise: ClassVar[bool] = True
    predicts_jumps: ClassVar[bool] = False

    def step(
        self,
        x: Tensor,
        prediction: Tensor,
        sigma: Sigma,
        sigma_next: Sigma,
        *,
        noise: Tensor | None = None,
        memory: None = None,
    ) -> tuple[Tensor, None]:
        sigma, sigma_next = check_sigma(sigma, x), check_sigma(sigma_next, x)
        x0 = upcast(x) - sigma * check_like("prediction", prediction, x)
        fresh = fresh_noise(noise, x, sigma_next)
        return (x0 if fresh is None else (1 - sigma_next) * x0 + sigma_next * fresh).to(x.dtype), None


@dataclass(frozen=True, slots=True)
class TrigConsistency:
    """Re-noising on TrigFlow's circle: x0 = cos(s) x - sin(s) v, then cos(t) x0 + sin(t) sigma_data eps.

    Levels are angles from 0 to pi / 2 (`TrigSchedule`); the prediction is v = sigma_data F(x / sigma_data, s).

    Source: sCM, Lu and Song 2024 (arXiv 2410.11081), equation 7.

    Args:
        sigma_data: standard deviation of the data, above 0.
    """

    sigma_data: float = 0.5
    evaluations_per_step: ClassVar[int] = 1
    needs_noise: ClassVar[bool] = True
    predicts_jumps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data must be above 0, got {self.sigma_data}")

    def step(
        self,
        x: Tensor,
        prediction: Tensor,
        sigma: Sigma,
        sigma_next: Sigma,
        *,
        noise: Tensor | None = None,
        memory: None = None,
    ) -> tuple[Tensor, None]:
        angle, angle_next = (as_level(check_sigma(s, x, QUARTER_TURN)) for s in (sigma, sigma_next))
        x0 = angle.cos() * upcast(x) - angle.sin() * check_like("prediction", prediction, x)
        fresh = fresh_noise(noise, x, sigma_next)
        if fresh is not None:
            x0 = angle_next.cos() * x0 + angle_next.sin() * self.sigma_data * fresh
        return x0.to(x.dtype), None


def fresh_noise(noise: Tensor | None, x: Tensor, sigma_next: Sigma) -> Tensor | None:
    """The noise to add, or None when sigma_next is the number 0 and there is nothing to add."""
    if not isinstance(sigma_next, Tensor) and sigma_next == 0:
        return None
    if noise is None:
        raise ValueError(
            "this rule adds fresh noise at every step that doesn't end at sigma_next = 0: pass noise=, unit Gaussian, "
            f"of the shape of x, {list(x.shape)}"
        )
    return check_like("noise", noise, x)
