"""A diffusers scheduler read as levels of flow matching, so that one set of rules serves every kind of model.

Any noisy sample is x = a x0 + b eps. Divided by a + b it is z = (1 - s) x0 + s eps with s = b / (a + b): the convention
of `samplers.flow`, in which Euler's step is DDIM's (and k-diffusion's Euler, and flow matching's), and `Renoise` is
LCM's and sCM's. The velocity eps - x0 is linear in z and the network's output, whatever the network predicts, so a
level is six numbers:

    prediction   x0 from (x, out)            velocity = keep z + take out, with x = (a + b) z
    epsilon      (x - b out) / a             keep = -(a + b) / a           take = (a + b) / a
    v            a x - b out                 keep = (b - a) (a + b)        take = a + b
    sample       out                         keep = (a + b) / b            take = -(a + b) / b
    flow, sCM    z - s out                   keep = 0                      take = 1

SANA-Sprint's network is called at tan-warped time with an output bent to TrigFlow's; both cancel, and what is left is
flow matching at s = sin t / (sin t + cos t).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ..samplers.rules import Euler, Renoise

RENOISED = ("LCMScheduler", "SCMScheduler", "EulerAncestralDiscreteScheduler")  # of models distilled to few steps
BY_SIGMA = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
BY_ALPHA = ("DDIMScheduler", "LCMScheduler")


@dataclass(frozen=True, slots=True)
class Level:
    """One step of a frame: from `sigma` to `sigma_next`, and how the network is asked and heard there.

    Attributes:
        scale: the network reads scale z.
        timestep: in the units of the pipeline's scheduler.
        keep, take: velocity = keep z + take output.
    """

    sigma: float
    sigma_next: float
    scale: float
    timestep: float
    keep: float
    take: float


@dataclass(frozen=True, slots=True)
class Levels:
    """All steps of a frame.

    Attributes:
        steps: the noisiest first.
        pure: z = pure eps where there is no picture to begin with, as the plain pipeline draws from text.
        final: the latents are final z at the end.
        rule: how a step moves z.
    """

    steps: tuple[Level, ...]
    pure: float
    final: float
    rule: Euler | Renoise


def read_levels(scheduler: Any, steps: int, strength: float, *, tokens: int, rounds_up: bool) -> Levels:
    """The levels that the plain image-to-image call visits.

    Args:
        scheduler: of the pipeline; it is copied, not touched. Kinds with no rule of their own here are read as DDIM.
        steps: at least 1.
        strength: above 0, up to 1: the share of `steps` that is taken. LCM takes them all, from a lower start.
        tokens: of a picture, which moves the levels of some flow models.
        rounds_up: whether a fraction of a step is a step (transformers) or none (UNets), as diffusers counts.

    Raises:
        ValueError: no step is left, more steps than the schedule has, or a schedule that cannot be read.
    """
    kind = type(scheduler).__name__
    renoises = kind in RENOISED
    if kind not in (*BY_SIGMA, *BY_ALPHA, "FlowMatchEulerDiscreteScheduler", "SCMScheduler"):
        kind, scheduler = "DDIMScheduler", _as_ddim(scheduler)
    copy = type(scheduler).from_config(scheduler.config)
    _set_timesteps(copy, kind, steps, strength, tokens)
    taken = steps * strength
    first = 0 if kind == "LCMScheduler" else int(steps - taken) if rounds_up else steps - int(taken)
    if first >= steps or not strength > 0:
        least = math.ceil(100 / steps) / 100
        raise ValueError(f"strength {strength:g} of {steps} steps leaves none; take {least:g} or more, or more steps")
    if kind == "FlowMatchEulerDiscreteScheduler":
        return _flow(copy, first)
    if kind == "SCMScheduler":
        return _circle(copy, first)
    return _curved(copy, kind, first, Renoise() if renoises else Euler())


def _set_timesteps(copy: Any, kind: str, steps: int, strength: float, tokens: int) -> None:
    if kind == "LCMScheduler":
        copy.set_timesteps(steps, strength=strength)
    elif kind == "SCMScheduler":
        copy.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    elif kind == "FlowMatchEulerDiscreteScheduler" and copy.config.get("use_dynamic_shifting"):
        low, high = copy.config.base_image_seq_len, copy.config.max_image_seq_len
        slope = (copy.config.max_shift - copy.config.base_shift) / (high - low)
        mu = copy.config.base_shift + slope * (tokens - low)
        copy.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    else:
        copy.set_timesteps(steps)


def _as_ddim(scheduler: Any) -> Any:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"a {type(scheduler).__name__} has no levels that can be read; set pipe.scheduler to an EulerDiscrete, "
            "DDIM, LCM, FlowMatchEulerDiscrete or SCM scheduler"
        )
    return DDIMScheduler.from_config(scheduler.config)


def _flow(scheduler: Any, first: int) -> Levels:
    sigmas, timesteps = scheduler.sigmas.tolist()[first:], scheduler.timesteps.tolist()[first:]
    steps = [Level(s, after, 1.0, t, 0.0, 1.0) for (s, after), t in zip(pairwise(sigmas), timesteps, strict=True)]
    return Levels(tuple(steps), pure=1.0, final=1.0, rule=Euler())


def _circle(scheduler: Any, first: int) -> Levels:
    angles = scheduler.timesteps.tolist()[first:]
    # Published lists round pi / 2 up, which would be a level of a little more than pure noise.
    sigmas = [min(1.0, math.sin(t) / (math.sin(t) + math.cos(t))) for t in angles]
    steps = tuple(Level(s, after, 1.0, s, 0.0, 1.0) for s, after in pairwise(sigmas))
    return Levels(steps, pure=sigmas[0] / math.sin(angles[0]), final=1.0, rule=Renoise())


def _curved(scheduler: Any, kind: str, first: int, rule: Euler | Renoise) -> Levels:
    """Of schedulers that keep a^2 + b^2 = 1, or scale x so before the network reads it."""
    points = _points(scheduler, kind)[first:]
    predicts = scheduler.config.prediction_type
    steps = []
    for (a, b), (a_next, b_next), timestep in zip(points, points[1:], scheduler.timesteps.tolist()[first:]):
        keep, take = _heard(predicts, a, b)
        if kind == "LCMScheduler":
            keep, take = _at_boundary(keep, take, a, b, timestep * scheduler.config.timestep_scaling)
        steps.append(Level(b / (a + b), b_next / (a_next + b_next), a + b, float(timestep), keep, take))
    (a, b), (a_end, b_end) = points[0], points[-1]
    # A level of k-diffusion holds x / a, so its pure noise does too.
    beginning = float(scheduler.init_noise_sigma) * (a if kind in BY_SIGMA else 1.0)
    return Levels(tuple(steps), pure=beginning / (a + b), final=a_end + b_end, rule=rule)


def _points(scheduler: Any, kind: str) -> list[tuple[float, float]]:
    """(a, b) before every step and after the last."""
    if kind in BY_SIGMA:
        return [(1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)) for sigma in scheduler.sigmas.tolist()]
    timesteps, alphas = scheduler.timesteps.tolist(), scheduler.alphas_cumprod.tolist()
    kept = [alphas[t] for t in timesteps]
    if kind == "LCMScheduler":
        kept.append(1.0)  # its last step keeps the clean data it found
    else:
        end = timesteps[-1] - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        kept.append(alphas[end] if end >= 0 else float(scheduler.final_alpha_cumprod))
    return [(math.sqrt(alpha), math.sqrt(1 - alpha)) for alpha in kept]


def _heard(predicts: str, a: float, b: float) -> tuple[float, float]:
    if predicts == "epsilon":
        if a == 0:
            raise ValueError(
                "a model that predicts epsilon says nothing at pure noise; its schedule must not begin there"
            )
        return -(a + b) / a, (a + b) / a
    if predicts == "v_prediction":
        return (b - a) * (a + b), a + b
    if predicts == "sample":
        return (a + b) / b, -(a + b) / b
    raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, got {predicts!r}")


def _at_boundary(keep: float, take: float, a: float, b: float, time: float) -> tuple[float, float]:
    """The consistency model's x0 = c_out x0 + c_skip x, which leaves a clean input alone (LCM, arXiv 2310.04378)."""
    skip, out = 0.25 / (time**2 + 0.25), time / math.sqrt(time**2 + 0.25)
    # x0 = z - s (keep z + take out): bend it, then read the velocity back as (z - x0) / s.
    s = b / (a + b)
    return (1 - out * (1 - s * keep) - skip * (a + b)) / s, out * take
