"""Rules: exactness on a problem with a known answer, levels per frame, refusals."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.samplers import (
    Euler,
    FlowMap,
    FlowSchedule,
    Heun,
    Renoise,
    TrigConsistency,
    UniPC,
    add_noise,
    clean,
    integrate,
)

MEAN, SPREAD = 0.7, 0.3
RULES = [Euler(), Heun(), UniPC(), Renoise(), FlowMap()]


def name(rule):
    return type(rule).__name__


def gaussian(x, sigma, *_):
    """The exact velocity for data from N(MEAN, SPREAD^2)."""
    variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
    offset = x - (1 - sigma) * MEAN
    noise, data = sigma * offset / variance, MEAN + (1 - sigma) * SPREAD**2 * offset / variance
    return noise - data


def gaussian_path(noise, sigma):
    """The exact solution of the flow that starts at `noise`."""
    return (1 - sigma) * MEAN + spread(sigma) * noise


def gaussian_noise(x, sigma):
    """Where the path through x at sigma started."""
    return (x - (1 - sigma) * MEAN) / spread(sigma)


def spread(sigma):
    return math.hypot((1 - sigma) * SPREAD, sigma)


def bent(x, sigma, *_):
    """A smooth velocity that no rule integrates exactly."""
    return torch.sin(3 * x) + sigma * x


def noise_for(shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def error(rule, n):
    noise = noise_for(64)
    return (integrate(gaussian, noise, FlowSchedule().sigmas(n), rule) - gaussian_path(noise, 0)).abs().max().item()


@pytest.mark.parametrize(("rule", "order"), [(Euler(), 1), (Heun(), 2), (UniPC(), 2)], ids=["Euler", "Heun", "UniPC"])
def test_halving_the_steps_shrinks_the_error_as_the_order_says(rule, order):
    coarse, fine = error(rule, 64), error(rule, 128)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_higher_order_pays_at_equal_cost():
    assert error(UniPC(), 32) < error(Euler(), 32) / 4
    assert error(Heun(), 16) < error(Euler(), 32) / 2


def test_one_step_is_exact_where_all_data_is_one_point():
    x0, noise = noise_for(5), noise_for(5, seed=1)
    for rule in RULES:
        drawn = integrate(lambda x, *levels: noise - x0, noise, [1.0, 0.0], rule)
        torch.testing.assert_close(drawn, x0)


def test_a_flow_map_is_exact_in_any_number_of_jumps():
    noise = noise_for(64)

    def mean_velocity(x, start, end):
        return (gaussian_path(gaussian_noise(x, start), end) - x) / (end - start)

    for sigmas in ([1.0, 0.0], [1.0, 0.6, 0.1, 0.0]):
        torch.testing.assert_close(integrate(mean_velocity, noise, sigmas, FlowMap()), gaussian_path(noise, 0))


def test_renoising_keeps_the_data_and_replaces_the_noise():
    x0, old, new = noise_for(8), noise_for(8, seed=1), noise_for(8, seed=2)
    x, memory = Renoise().step(add_noise(x0, old, 0.8), old - x0, 0.8, 0.3, noise=new)
    torch.testing.assert_close(x, add_noise(x0, new, 0.3))
    assert memory is None


def test_renoising_with_the_ideal_consistency_model_draws_the_right_distribution():
    draws = 20_000
    x = integrate(
        # The ideal consistency model points at the end of the path: that is what distilled models learn.
        lambda x, sigma: (x - gaussian_path(gaussian_noise(x, sigma), 0)) / sigma,
        noise_for(draws),
        FlowSchedule(5).sigmas(4),
        Renoise(),
        noise=lambda step: noise_for(draws, seed=step + 1),
    )
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert x.std().item() == pytest.approx(SPREAD, abs=0.01)


def test_clean_and_add_noise_are_inverse():
    x0, noise = noise_for((2, 3)), noise_for((2, 3), seed=1)
    torch.testing.assert_close(clean(add_noise(x0, noise, 0.4), noise - x0, 0.4), x0)


@settings(max_examples=30)
@given(
    st.sampled_from([Euler(), Heun(), UniPC(), Renoise()]),
    st.lists(st.lists(st.floats(0.01, 1), min_size=2, max_size=2, unique=True), min_size=3, max_size=3),
)
def test_a_level_per_frame_equals_each_frame_alone(rule, pairs):
    pairs = [sorted(pair, reverse=True) for pair in pairs]
    # Three levels per frame, the last one 0 for the last frame, so that frames finish at different times.
    ladders = torch.tensor([[a, b, 0.0 if i == 2 else b / 2] for i, (a, b) in enumerate(pairs)], dtype=torch.float64)
    x, fresh = noise_for((2, 1, 3, 2, 2)), noise_for((2, 1, 3, 2, 2), seed=1)

    def run(x, fresh, levels):
        memory = None
        for sigma, sigma_next in pairwise(levels):
            for at in (sigma, sigma_next)[: rule.evaluations_per_step]:
                x, memory = rule.step(x, bent(x, at), sigma, sigma_next, noise=fresh, memory=memory)
        return x

    together = run(x, fresh, [level.view(1, 1, 3, 1, 1) for level in ladders.T])
    for frame in range(3):
        alone = run(x[:, :, frame], fresh[:, :, frame], ladders[frame].tolist())
        torch.testing.assert_close(together[:, :, frame], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", [Euler(), Heun(), Renoise()], ids=name)
def test_frames_that_are_clean_already_stay_as_they_are(rule):
    x, sigma = noise_for((1, 2, 4)), torch.tensor([0.0, 0.8]).view(1, 2, 1)
    memory = None
    moved = x
    for _ in range(rule.evaluations_per_step):
        moved, memory = rule.step(moved, bent(x, sigma), sigma, sigma / 2, noise=noise_for(x.shape), memory=memory)
    torch.testing.assert_close(moved[:, 0], x[:, 0], rtol=0, atol=0)
    assert not torch.equal(moved[:, 1], x[:, 1])


@pytest.mark.parametrize("rule", [*RULES, TrigConsistency()], ids=name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_dtype_of_x_is_kept_and_x_is_not_written_to(rule, dtype):
    x = noise_for((2, 3), dtype)
    before = x.clone()
    drawn = integrate(bent, x, [1.0, 0.5, 0.25, 0.0], rule, noise=lambda step: noise_for((2, 3), dtype))
    assert drawn.dtype == dtype
    assert drawn.isfinite().all()
    assert torch.equal(x, before)


def test_half_precision_costs_one_rounding_per_step_not_more():
    x, v = noise_for(1000, torch.bfloat16), noise_for(1000, torch.bfloat16, seed=1)
    exact = x.double() + (0.713 - 0.7142) * v.double()
    torch.testing.assert_close(Euler().step(x, v, 0.7142, 0.713)[0], exact.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_levels_given_in_half_precision_are_not_rounded_further(rule):
    x, levels = noise_for((1, 2, 4), torch.float32), torch.tensor([[1.0, 0.9375], [0.5, 0.2344]])
    half, full = (
        rule.step(x, x, *levels.to(dtype).to(kept).view(2, 1, 2, 1), noise=x)[0]
        for dtype, kept in [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
    )
    assert torch.equal(half, full)


def test_the_same_call_gives_the_same_answer_whatever_came_before():
    x, v = noise_for(4), noise_for(4, seed=1)
    for rule in [Euler(), Heun(), UniPC()]:
        first = rule.step(x, v, 0.9, 0.5)[0]
        rule.step(x * 2, v, 0.3, 0.1)
        assert torch.equal(rule.step(x, v, 0.9, 0.5)[0], first)


def test_heun_may_stop_after_its_first_call():
    x, v = noise_for(4), noise_for(4, seed=1)
    half_way, memory = Heun().step(x, v, 0.9, 0.5)
    torch.testing.assert_close(half_way, Euler().step(x, v, 0.9, 0.5)[0])
    finished, memory = Heun().step(half_way, 3 * v, 0.9, 0.5, memory=memory)
    torch.testing.assert_close(finished, x - 0.4 * 2 * v)
    assert memory is None


def test_the_network_is_asked_as_often_as_declared_and_where_declared():
    for rule in RULES:
        asked = []

        def denoise(x, *levels, asked=asked):
            asked.append(levels)
            return x

        integrate(denoise, noise_for(2), [1.0, 0.5, 0.0], rule, noise=lambda step: noise_for(2))
        if rule.predicts_jumps:
            assert asked == [(1.0, 0.5), (0.5, 0.0)]
        elif rule.evaluations_per_step == 2:
            assert asked == [(1.0,), (0.5,), (0.5,)]  # never at level 0
        else:
            assert asked == [(1.0,), (0.5,)]


@pytest.mark.parametrize("rule", [Renoise(), TrigConsistency()], ids=name)
def test_missing_noise_is_refused(rule):
    x = noise_for((2, 3))
    with pytest.raises(ValueError, match=r"adds fresh noise .* pass noise=.*\[2, 3\]"):
        rule.step(x, x, 1.0, 0.5)
    with pytest.raises(ValueError, match=f"{name(rule)} adds fresh noise between steps"):
        integrate(bent, x, [1.0, 0.5, 0.0], rule)
    with pytest.raises(ValueError, match=r"noise must have the shape of x, \[2, 3\], got \[3\]"):
        rule.step(x, x, 1.0, 0.5, noise=x[0])
    assert rule.step(x, x, 0.5, 0)[0].isfinite().all()


@pytest.mark.parametrize("rule", [*RULES, TrigConsistency()], ids=name)
@pytest.mark.parametrize(("sigma", "sigma_next"), [(1.6, 0.5), (-0.1, 0), (math.nan, 0.5), (1.0, 1.6), (1.0, math.nan)])
def test_levels_out_of_range_are_refused(rule, sigma, sigma_next):
    x = noise_for((2, 3))
    with pytest.raises(ValueError, match="sigma must be between 0"):
        rule.step(x, x, sigma, sigma_next, noise=x)


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_a_bare_vector_of_levels_is_refused_before_it_lines_up_with_the_wrong_axis(rule):
    x = noise_for((1, 2, 4, 3, 4))
    levels = torch.rand(4)  # meant for the 4 frames, but broadcasting would give it to the 4 columns
    with pytest.raises(ValueError, match=r"one level per frame of \[B, C, F, H, W\] is \[B, 1, F, 1, 1\]"):
        rule.step(x, x, levels, levels / 2, noise=x)
    with pytest.raises(ValueError, match="doesn't line up"):
        rule.step(x, x, torch.rand(1, 1, 3, 1, 1), 0.0, noise=x)


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_a_prediction_of_another_shape_is_refused(rule):
    with pytest.raises(ValueError, match=r"prediction must have the shape of x, \[2, 3\], got \[3\]"):
        rule.step(noise_for((2, 3)), noise_for(3), 1.0, 0.5, noise=noise_for((2, 3)))


def test_a_data_spread_of_zero_is_refused():
    with pytest.raises(ValueError, match="sigma_data must be above 0, got 0"):
        TrigConsistency(0)
