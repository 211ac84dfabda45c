"""UniPC: a multistep rule of second order that asks the network once per step.

For flow models its formulas become short. A first-order step moves x towards the clean prediction x0,

    x' = r x + (1 - r) x0,        r = sigma_next / sigma,

which is Euler's step. UniPC keeps this form and puts a better guess in the place of x0: one extrapolated from the two
latest predictions when it steps (the predictor), and one that has seen the new prediction when it goes back over the
step before (the corrector). Distances are measured in log-SNR, lambda = log((1 - sigma) / sigma).

Source: Zhao et al. 2023 (arXiv 2302.04867), algorithms 5 to 8 with B(h) = e^h - 1 and data prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .flow import Sigma, as_level, check_like, check_sigma, upcast

HIGHEST = 1 - 1e-6
"""Pure noise has no finite log-SNR; like diffusers we place it here."""


class Predicted(NamedTuple):
    """Clean data, and the level it was predicted at."""

    x0: Tensor
    sigma: Tensor


class UniPCMemory(NamedTuple):
    """What one step leaves for the next: x where the step started, and the two latest predictions."""

    x: Tensor
    latest: Predicted
    older: Predicted | None


@dataclass(frozen=True, slots=True)
class UniPC:
    """Second-order UniPC ("bh2"); the first step and those that end at 0 are of first order.

    Its memory belongs to frames that started together and all move at each step (sigma_next below sigma): where frames
    join one by one, as in the triangle plan, keep one memory per unit.
    """

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
        memory: UniPCMemory | None = None,
    ) -> tuple[Tensor, UniPCMemory]:
        """As `Rule.step`; levels of exactly 1 are read as 1 - 1e-6 where a log-SNR is needed."""
        now, after = as_level(check_sigma(sigma, x)), as_level(check_sigma(sigma_next, x))
        start = upcast(x)
        x0 = start - now * check_like("prediction", prediction, x)
        older = None
        if memory is not None:
            start = _correct(x0, now, memory)
            older = memory.latest
        memory = UniPCMemory(start, Predicted(x0, now), older)
        return _predict(memory, after).to(x.dtype), memory


def _predict(memory: UniPCMemory, after: Tensor) -> Tensor:
    """On to level `after`, towards x0 extrapolated to the middle of the step."""
    (x0, sigma), older = memory.latest, memory.older
    if older is not None:
        slope = (x0 - older.x0) / (_log_snr(sigma) - _log_snr(older.sigma))
        step = torch.where(after == 0, 0.0, _log_snr(after) - _log_snr(sigma))
        x0 = x0 + slope * step / 2
    return _towards(x0, memory, after)


def _correct(new: Tensor, now: Tensor, memory: UniPCMemory) -> Tensor:
    """The step before again, to level `now`, knowing the clean data `new` that was predicted at its end."""
    (x0, sigma), older = memory.latest, memory.older
    change = new - x0
    if older is None:
        return _towards(x0 + change / 2, memory, now)
    h = _log_snr(now) - _log_snr(sigma)
    ratio = (_log_snr(older.sigma) - _log_snr(sigma)) / h
    growth = torch.expm1(-h)
    first = (growth / -h - 1) / growth
    second = 2 * ((growth / -h - 1) / -h - 0.5) / growth
    # Weights of the backward and the forward difference: they solve a + b = first, ratio a + b = second.
    backward = (first - second) / (1 - ratio)
    return _towards(x0 + backward * (older.x0 - x0) / ratio + (first - backward) * change, memory, now)


def _towards(target: Tensor, memory: UniPCMemory, after: Tensor) -> Tensor:
    left = after / memory.latest.sigma
    return left * memory.x + (1 - left) * target


def _log_snr(sigma: Tensor) -> Tensor:
    return -torch.logit(sigma.clamp(max=HIGHEST))
