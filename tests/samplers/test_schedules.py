"""Schedules: the published numbers, the ends, the order, and what is refused."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from millstream.samplers import FlowSchedule, TrigSchedule, WarpedSchedule


@given(st.integers(1, 200), st.floats(0.01, 100))
def test_flow_levels_fall_from_exactly_one_to_exactly_zero(n, shift):
    sigmas = FlowSchedule(shift).sigmas(n)
    assert len(sigmas) == n + 1
    assert (sigmas[0], sigmas[-1]) == (1.0, 0.0)
    assert all(a > b for a, b in pairwise(sigmas))


@given(st.floats(0.001, 0.999), st.floats(0.01, 100))
def test_flow_levels_follow_the_published_formula(s, shift):
    assert FlowSchedule(shift).sigmas(1, strength=s)[0] == pytest.approx(shift * s / (1 + (shift - 1) * s))


def test_flow_levels_equal_those_of_diffusers():
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert FlowSchedule(3.0).sigmas(4) == pytest.approx(theirs.sigmas.tolist())


@pytest.mark.parametrize(
    ("timesteps", "shift", "published"),
    [
        ([1000, 750, 500, 250], 5, [1000, 937.5, 833.33, 625]),  # Self-Forcing, LongLive
        ([1000, 750, 500, 250], 8, [1000, 960, 888.9, 727.3]),  # Self-Forcing's demo
        ([1000, 800, 600, 400, 200], 5, [1000, 952.4, 882.4, 769.2, 555.6]),  # Rolling Forcing
        ([1000, 666, 333], 5, [1000, 908.8, 714.0]),  # Matrix-Game 2
        ([1000, 757, 522], 1, [1000, 757, 522]),  # CausVid
        ([700, 500], 1, [700, 500]),  # StreamDiffusionV2
    ],
)
def test_warped_lists_are_the_published_ones(timesteps, shift, published):
    sigmas = WarpedSchedule(timesteps, shift).sigmas()
    assert [1000 * s for s in sigmas] == pytest.approx([*published, 0], abs=0.06)


def test_strength_starts_further_down_as_krea_does():
    # linspace(1000 * strength, 0, n + 1) looked up in the warped table; its final 0 is ours.
    lookup = WarpedSchedule([800, 600, 400, 200], shift=5).sigmas()
    assert FlowSchedule(5).sigmas(4, strength=0.8) == pytest.approx(lookup)


def test_a_listed_schedule_has_no_other_number_of_steps():
    schedule = WarpedSchedule([1000, 500], shift=5)
    assert schedule.sigmas(2) == schedule.sigmas()
    with pytest.raises(ValueError, match=r"lists 2 steps, \[1000, 500\], so n must be 2 or None, got 4"):
        schedule.sigmas(4)


def test_trig_angles_fall_from_a_quarter_turn_to_zero():
    assert TrigSchedule().sigmas(2) == pytest.approx([math.pi / 2, math.pi / 4, 0])
    assert TrigSchedule(start=math.atan(80 / 0.5)).sigmas(1) == pytest.approx([1.56454, 0], abs=1e-5)
    assert TrigSchedule(angles=(1.5708, 1.3)).sigmas() == [1.5708, 1.3, 0]
    with pytest.raises(ValueError, match="lists 2 angles"):
        TrigSchedule(angles=(1.5708, 1.3)).sigmas(3)


@pytest.mark.parametrize("n", [0, -1, 2.5, None, True, "4"])
def test_the_number_of_steps_is_checked(n):
    with pytest.raises(ValueError, match="n must be a whole number of at least 1, got"):
        FlowSchedule().sigmas(n)


@pytest.mark.parametrize("shift", [0, -3.0, math.inf, math.nan])
def test_the_shift_is_checked(shift):
    with pytest.raises(ValueError, match="shift must be positive and finite"):
        FlowSchedule(shift)
    with pytest.raises(ValueError, match="shift must be positive and finite"):
        WarpedSchedule([1000], shift)


@pytest.mark.parametrize("strength", [0, -0.1, 1.1, math.nan])
def test_the_strength_is_checked(strength):
    with pytest.raises(ValueError, match="strength must be above 0 and at most 1"):
        FlowSchedule().sigmas(4, strength=strength)


@pytest.mark.parametrize("timesteps", [[], [0], [1000, 0], [1001], [500, 500], [250, 500], [math.nan]])
def test_timestep_lists_are_checked(timesteps):
    with pytest.raises(ValueError, match="strictly decreasing values above 0 and at most 1000"):
        WarpedSchedule(timesteps)


def test_angles_are_checked():
    with pytest.raises(ValueError, match=r"angles must be .* at most 1\.5708"):
        TrigSchedule(start=2.0)


@pytest.mark.parametrize(
    "schedule",
    [FlowSchedule(3.0), WarpedSchedule((1000, 500), 5.0), TrigSchedule(angles=(1.5708, 1.3)), TrigSchedule(1.5)],
    ids=lambda schedule: type(schedule).__name__,
)
def test_schedules_survive_a_round_trip(schedule, tmp_path):
    schedule.save_pretrained(tmp_path)
    again = type(schedule).from_pretrained(tmp_path)
    assert again.sigmas(2) == schedule.sigmas(2)
