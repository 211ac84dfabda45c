"""The sampler as a pipeline's component: configuration, saving and loading, and its loop."""

from __future__ import annotations

import json
import pickle
from itertools import pairwise

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

import millstream.samplers as samplers
from millstream.samplers import FlowSampler, FlowSchedule, integrate

RULES = ["euler", "heun", "unipc", "renoise", "flow_map"]
SELF_FORCING = {"timesteps": [1000, 750, 500, 250], "shift": 5.0, "rule": "renoise", "context_sigma": 0.0}


class Pipeline(DiffusionPipeline):
    def __init__(self, scheduler: FlowSampler) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler)


def test_defaults_are_four_euler_steps_and_a_little_context_noise():
    sampler = FlowSampler()
    assert sampler.sigmas() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert sampler.sigmas(2) == [1.0, 0.5, 0.0]
    assert sampler.config.context_sigma == 0.02
    assert (sampler.needs_noise, sampler.evaluations_per_step) == (False, 1)


def test_a_distilled_recipe():
    sampler = FlowSampler(**SELF_FORCING)
    levels = sampler.sigmas()
    assert [sampler.timestep(sigma) for sigma in levels] == pytest.approx([1000, 937.5, 833.33, 625, 0], abs=0.01)
    assert sampler.config.num_inference_steps == 4
    assert sampler.needs_noise
    with pytest.raises(ValueError, match="n must be 4 or None, got 8"):
        sampler.sigmas(8)


@pytest.mark.parametrize("config", [{}, SELF_FORCING, {"num_inference_steps": 7, "shift": 3.0, "rule": "heun"}])
def test_a_saved_sampler_is_the_same_sampler(config, tmp_path):
    sampler = FlowSampler(**config)
    sampler.save_pretrained(tmp_path)
    again = FlowSampler.from_pretrained(tmp_path)
    assert again.sigmas() == sampler.sigmas()
    assert type(again.rule) is type(sampler.rule)
    public = {name: value for name, value in sampler.config.items() if not name.startswith("_")}
    assert {name: again.config[name] for name in public} == public


def test_a_pipeline_finds_its_sampler_again(tmp_path):
    Pipeline(FlowSampler(**SELF_FORCING)).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["millstream.samplers.flow_sampler", "FlowSampler"]
    again = Pipeline.from_pretrained(tmp_path)
    assert isinstance(again.scheduler, FlowSampler)
    assert again.scheduler.sigmas() == FlowSampler(**SELF_FORCING).sigmas()


def test_it_takes_over_the_shift_of_a_diffusers_scheduler():
    sampler = FlowSampler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    assert sampler.sigmas(4) == FlowSchedule(3.0).sigmas(4)


def drawn(sampler, network, noise):
    """The loop a pipeline writes."""
    x, memory = noise, None
    for step, (sigma, sigma_next) in enumerate(pairwise(sampler.sigmas())):
        fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(step))
        for at in (sigma, sigma_next)[: sampler.evaluations_per_step]:
            x, memory = sampler.step(x, network(x, at), sigma, sigma_next, noise=fresh, memory=memory)
    return x


@pytest.mark.parametrize("rule", RULES)
def test_a_hand_written_loop_equals_integrate(rule):
    sampler = FlowSampler(5, shift=3.0, rule=rule)
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(9))

    def fresh(step):
        return torch.randn(noise.shape, generator=torch.Generator().manual_seed(step))

    def network(x, sigma, *_):
        return torch.sin(x) + sigma

    assert torch.equal(
        drawn(sampler, network, noise), integrate(network, noise, sampler.sigmas(), sampler.rule, noise=fresh)
    )


@pytest.mark.parametrize("rule", RULES)
def test_one_sampler_serves_interleaved_streams_and_stays_as_it_was(rule):
    """Two streams advanced in turn equal each alone, and nothing in the sampler changes."""
    sampler = FlowSampler(4, rule=rule)
    before = pickle.dumps(vars(sampler))
    starts = [torch.randn(3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]

    def network(x, sigma):
        return torch.cos(2 * x) - sigma

    states = [(x, None) for x in starts]
    for step, (sigma, sigma_next) in enumerate(pairwise(sampler.sigmas())):
        fresh = torch.randn(3, generator=torch.Generator().manual_seed(step))
        for at in (sigma, sigma_next)[: sampler.evaluations_per_step]:
            states = [
                sampler.step(x, network(x, at), sigma, sigma_next, noise=fresh, memory=memory) for x, memory in states
            ]
    for (x, _), start in zip(states, starts, strict=True):
        assert torch.equal(x, drawn(sampler, network, start))
    assert pickle.dumps(vars(sampler)) == before


def test_context_noise_is_added_as_the_convention_says():
    x0, noise = torch.ones(2, 3), torch.full((2, 3), -1.0)
    torch.testing.assert_close(FlowSampler().add_noise(x0, noise, 0.02), torch.full((2, 3), 0.96))
    assert torch.equal(FlowSampler().add_noise(x0, noise, 0), x0)
    with pytest.raises(ValueError, match="noise must have the shape of x"):
        FlowSampler().add_noise(x0, noise[0], 0.5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rule": "ddim"}, "rule must be one of euler, heun, unipc, renoise, flow_map, got 'ddim'"),
        ({"shift": 0}, "shift must be positive"),
        ({"num_inference_steps": 0}, "n must be a whole number of at least 1, got 0"),
        ({"num_inference_steps": 3, "timesteps": [1000, 500]}, "n must be 2 or None, got 3"),
        ({"timesteps": [500, 1000]}, "strictly decreasing"),
        ({"context_sigma": 1.0}, "context_sigma must be at least 0"),
        ({"context_sigma": -0.1}, "context_sigma must be at least 0"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be a whole number"),
    ],
)
def test_bad_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        FlowSampler(**config)


def test_public_names():
    assert sorted(samplers.__all__) == samplers.__all__
    assert all(hasattr(samplers, name) for name in samplers.__all__)
