"""The sampler a pipeline stores as its `scheduler`: one schedule and one rule, chosen by a small configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from .flow import Sigma, add_noise
from .rules import Euler, FlowMap, Heun, Renoise, Rule
from .schedules import FlowSchedule, WarpedSchedule, check_count
from .unipc import UniPC

RuleName = Literal["euler", "heun", "unipc", "renoise", "flow_map"]
RULES: dict[str, type[Rule]] = {
    "euler": Euler,
    "heun": Heun,
    "unipc": UniPC,
    "renoise": Renoise,
    "flow_map": FlowMap,
}


class FlowSampler(SchedulerMixin, ConfigMixin):
    """Draws from a flow model (v = eps - x0, see `flow`). Has no state: one sampler serves any number of streams.

        x, memory = noise, None
        for sigma, sigma_next in pairwise(sampler.sigmas()):
            v = model(x, sampler.timestep(sigma))
            x, memory = sampler.step(x, v, sigma, sigma_next, noise=fresh, memory=memory)

    (Heun asks twice per step; `integrate` is the whole loop for every rule.)

    Args:
        num_inference_steps: default number of steps; None means all of `timesteps`, or 4 if there are none.
        shift: warps the levels towards the noisy end (`FlowSchedule`).
        rule: how a step moves the sample.
        timesteps: the published list of a distilled model (`WarpedSchedule`); fixes the number of steps.
        context_sigma: level, below 1, at which a finished chunk is shown to those that follow. A little noise keeps a
            model from trusting its own small errors in long streams.
        num_train_timesteps: the timestep of pure noise, by which levels are multiplied for the network.

    Raises:
        ValueError: any of them out of range, or a number of steps that contradicts `timesteps`.
    """

    @register_to_config
    def __init__(
        self,
        num_inference_steps: int | None = None,
        shift: float = 1.0,
        rule: RuleName = "euler",
        timesteps: Sequence[float] | None = None,
        context_sigma: float = 0.02,
        num_train_timesteps: int = 1000,
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(get_args(RuleName))}, got {rule!r}")
        if not 0 <= context_sigma < 1:
            raise ValueError(f"context_sigma must be at least 0 (clean) and below 1 (noise), got {context_sigma}")
        check_count(num_train_timesteps, "num_train_timesteps")
        self.rule = RULES[rule]()
        self.schedule: FlowSchedule | WarpedSchedule
        if timesteps is None:
            self.schedule = FlowSchedule(shift)
        else:
            self.schedule = WarpedSchedule(timesteps, shift, num_train_timesteps)
        if num_inference_steps is None:
            num_inference_steps = 4 if timesteps is None else len(timesteps)
            self.register_to_config(num_inference_steps=num_inference_steps)
        self.schedule.sigmas(num_inference_steps)

    def sigmas(self, num_inference_steps: int | None = None) -> list[float]:
        """The levels to visit, one more than there are steps, from the noisiest to 0.

        Args:
            num_inference_steps: at least 1; None takes the configured number. With listed `timesteps` no other is
                accepted, since the model was trained for those.
        """
        default = self.config["num_inference_steps"]
        return self.schedule.sigmas(default if num_inference_steps is None else num_inference_steps)

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
        """Move x from sigma to sigma_next; returns it and the memory for the next call. See `Rule.step`."""
        return self.rule.step(x, prediction, sigma, sigma_next, noise=noise, memory=memory)

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Sigma) -> Tensor:
        """(1 - sigma) x0 + sigma noise: where a clean sample stands at level sigma. See `flow.add_noise`."""
        return add_noise(x0, noise, sigma)

    def timestep(self, sigma: Sigma) -> Sigma:
        """The level in the units the network is conditioned on: num_train_timesteps sigma."""
        return self.config["num_train_timesteps"] * sigma

    @property
    def needs_noise(self) -> bool:
        """Whether `step` consumes fresh noise."""
        return self.rule.needs_noise

    @property
    def evaluations_per_step(self) -> int:
        """How often the network is asked per step."""
        return self.rule.evaluations_per_step


def integrate(
    denoise: Callable[..., Tensor],
    x: Tensor,
    sigmas: Sequence[float],
    rule: Rule,
    *,
    noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Carry x through all levels of a schedule.

    Args:
        denoise: the network, (x, sigma) -> prediction; (x, sigma, sigma_next) for rules that predict jumps.
        x: the sample at sigmas[0], any shape.
        sigmas: what a schedule's `sigmas` returns.
        rule: how each step moves x.
        noise: step number -> fresh unit Gaussian noise of x's shape; for rules that need it.

    Returns:
        The sample at sigmas[-1].

    Raises:
        ValueError: the rule needs noise and there is none.
    """
    if rule.needs_noise and noise is None and len(sigmas) > 2:
        raise ValueError(f"{type(rule).__name__} adds fresh noise between steps: pass noise=, a function of the step")
    memory = None
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        fresh = noise(step) if rule.needs_noise and noise is not None and sigma_next > 0 else None
        # At level 0 there is nothing left to refine: a second evaluation would be thrown away.
        for at in (sigma, sigma_next)[: rule.evaluations_per_step if sigma_next > 0 else 1]:
            prediction = denoise(x, at, sigma_next) if rule.predicts_jumps else denoise(x, at)
            x, memory = rule.step(x, prediction, sigma, sigma_next, noise=fresh, memory=memory)
    return x
