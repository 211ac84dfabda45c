"""Rules and diffusers' schedulers give the same numbers on a velocity that neither integrates exactly."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from millstream.samplers import Euler, FlowSchedule, Heun, TrigConsistency, TrigSchedule, UniPC, integrate


def bent(x, sigma):
    return torch.sin(3 * x) + sigma * x


def start(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def diffusers_flow(scheduler, x, sigmas):
    scheduler.set_timesteps(sigmas=np.array(sigmas))
    # UniPC rounds its timesteps to whole numbers, so the levels are taken from where they are exact.
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        x = scheduler.step(bent(x, sigma), timestep, x).prev_sample
    return x


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_euler_equals_diffusers(n):
    sigmas, x = FlowSchedule(3).sigmas(n), start(2, 4)
    theirs = diffusers_flow(diffusers.FlowMatchEulerDiscreteScheduler(), x, sigmas[:-1])
    torch.testing.assert_close(integrate(bent, x, sigmas, Euler()), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("first", [1.0, 0.9])
def test_unipc_equals_diffusers(n, first):
    sigmas, x = FlowSchedule(3).sigmas(n, strength=first), start(2, 4)
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    theirs = diffusers_flow(scheduler, x, sigmas[:-1])
    torch.testing.assert_close(integrate(bent, x, sigmas, UniPC()), theirs, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_heun_equals_diffusers(n):
    x = start(2, 4)
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(n)
    theirs = x
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(bent(theirs, timestep.item() / 1000), timestep, theirs).prev_sample
    sigmas = [s.item() for s in scheduler.sigmas.unique().flip(0)]
    assert len(sigmas) == n + 1
    torch.testing.assert_close(integrate(bent, x, sigmas, Heun()), theirs, rtol=1e-4, atol=1e-4)


def test_trig_consistency_equals_diffusers():
    x = start(2, 4) / 2
    scheduler = diffusers.SCMScheduler(sigma_data=0.5)
    scheduler.set_timesteps(2, max_timesteps=1.57080, intermediate_timesteps=1.3)
    theirs, generator = x, torch.Generator().manual_seed(3)
    for timestep in scheduler.timesteps[:-1]:
        theirs = scheduler.step(bent(theirs, timestep.item()), timestep, theirs, generator=generator).prev_sample
    fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    sigmas = TrigSchedule(angles=(1.5708, 1.3)).sigmas()
    ours = integrate(bent, x, sigmas, TrigConsistency(0.5), noise=lambda step: fresh)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
