"""Plans: every frame takes every step once and in order, and the published systems come out as special cases."""

from __future__ import annotations

import math
from collections import defaultdict
from fractions import Fraction
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millstream.samplers import FlowSchedule, Lag, OneShot, Staircase, Triangle, WarpedSchedule


def ladder(steps):
    return FlowSchedule(3.0).sigmas(steps)


@st.composite
def plans(draw):
    steps, chunk = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    return draw(
        st.sampled_from(
            [
                OneShot(ladder(steps)),
                Staircase(ladder(steps), chunk=chunk),
                Lag(ladder(steps), draw(st.integers(1, steps)), chunk=chunk),
                Triangle(ladder(steps), draw(st.integers(1, 12)), chunk=chunk),
            ]
        )
    )


def check_complete(plan, rows, n_frames):
    """Each frame moves through all levels in order, is committed once, right after its last move, in frame order."""
    visited, committed = defaultdict(list), []
    for row in rows:
        assert len(row.active) == len(row.sigma_from) == len(row.sigma_to) > 0
        assert row.active.stop <= n_frames
        for frame, sigma_from, sigma_to in zip(row.active, row.sigma_from, row.sigma_to, strict=True):
            assert frame not in committed
            assert visited[frame][-1:] in ([], [sigma_from])
            visited[frame] += [sigma_to] if visited[frame] else [sigma_from, sigma_to]
        finished = [f for f, sigma_to in zip(row.active, row.sigma_to, strict=True) if sigma_to == plan.sigmas[-1]]
        assert list(row.commit) == finished
        committed += row.commit
    assert committed == list(range(n_frames))
    assert all(levels == list(plan.sigmas) for levels in visited.values())


@given(plans(), st.integers(1, 40))
def test_every_frame_takes_every_step_once_in_order_and_is_committed_once(plan, n_frames):
    rows = list(plan.rows(n_frames))
    assert len(rows) == plan.steps(n_frames)
    check_complete(plan, rows, n_frames)


@given(plans(), st.integers(1, 40))
def test_older_frames_are_never_noisier_than_younger_ones(plan, n_frames):
    for row in plan.rows(n_frames):
        assert list(row.sigma_from) == sorted(row.sigma_from)


@given(plans().filter(lambda plan: not isinstance(plan, OneShot)), st.integers(0, 60))
def test_an_endless_stream_stopped_anywhere_and_flushed_loses_nothing(plan, stopped):
    rows = list(islice(plan.rows(None), stopped))
    entered = max((row.active.stop for row in rows), default=0)
    check_complete(plan, rows + list(plan.flush(stopped)), entered)


@given(plans(), st.integers(1, 40), st.data())
def test_a_row_depends_on_nothing_but_its_number(plan, n_frames, data):
    step = data.draw(st.integers(0, plan.steps(n_frames) - 1))
    assert plan.row(step, n_frames) == list(plan.rows(n_frames))[step]


@given(plans().filter(lambda plan: not isinstance(plan, OneShot)), st.integers(1, 40))
def test_an_endless_stream_begins_like_a_clip(plan, n_units):
    n_frames = n_units * plan.chunk
    for endless, clip in zip(plan.rows(None), plan.rows(n_frames), strict=False):
        if endless.active.stop > n_frames:
            break
        assert endless == clip


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 30))
def test_a_triangle_of_one_unit_is_the_staircase(steps, chunk, n_frames):
    triangle, stairs = Triangle(ladder(steps), 1, chunk=chunk), Staircase(ladder(steps), chunk=chunk)
    assert list(triangle.rows(n_frames)) == list(stairs.rows(n_frames))
    assert list(Lag(ladder(steps), steps, chunk=chunk).rows(n_frames)) == list(stairs.rows(n_frames))


@given(st.integers(1, 10), st.integers(1, 12), st.integers(1, 20))
def test_the_triangle_follows_its_definition(steps, units, n_units):
    """Unit u is at j = k - ceil(u K / n) at step k, and active while 0 <= j < K."""
    sigmas = ladder(steps)
    for k, row in enumerate(Triangle(sigmas, units).rows(n_units)):
        j = {u: k - math.ceil(Fraction(u * steps, units)) for u in range(n_units)}
        active = [u for u in j if 0 <= j[u] < steps]
        assert list(row.active) == active
        assert row.sigma_from == tuple(sigmas[j[u]] for u in active)
        assert row.sigma_to == tuple(sigmas[j[u] + 1] for u in active)
        assert list(row.commit) == [u for u in active if j[u] == steps - 1]


@settings(max_examples=20)
@given(st.integers(1, 30))
def test_flood_diffusion(n_frames):
    """Its paper's form: at time tau frame i stands at clip(1 + i / n - tau, 0, 1); n = 5, K = 10 steps per frame."""
    n, steps = 5, 10

    def level(frame, tau):
        return min(max(1 + Fraction(frame, n) - tau, Fraction(0)), Fraction(1))

    expected, step = [], 0
    while level(n_frames - 1, Fraction(step, steps)) > 0:
        now, then = Fraction(step, steps), Fraction(step + 1, steps)
        moving = [f for f in range(n_frames) if level(f, now) != level(f, then)]
        expected.append((moving, [level(f, now) for f in moving], [level(f, then) for f in moving]))
        step += 1
    rows = list(Triangle(FlowSchedule().sigmas(steps), n).rows(n_frames))
    assert len(rows) == len(expected)
    for row, (moving, before, after) in zip(rows, expected, strict=True):
        assert list(row.active) == moving
        assert row.sigma_from == pytest.approx([float(s) for s in before])
        assert row.sigma_to == pytest.approx([float(s) for s in after])


@settings(max_examples=20)
@given(st.integers(1, 20))
def test_rolling_forcing(n_blocks):
    """A window of 5 blocks of 3 frames slides by one block per pass; within it block i has i more levels to go."""
    sigmas = WarpedSchedule([1000, 800, 600, 400, 200], shift=5).sigmas()
    window, noise_of = [], dict.fromkeys(range(n_blocks), 0)
    expected, waiting = [], list(range(n_blocks))
    while waiting or window:
        window += waiting[:1]
        waiting = waiting[1:]
        frames = [3 * block + i for block in window for i in range(3)]
        before = [sigmas[noise_of[block]] for block in window for _ in range(3)]
        for block in window:
            noise_of[block] += 1
        after = [sigmas[noise_of[block]] for block in window for _ in range(3)]
        done = [block for block in window if noise_of[block] == 5]
        expected.append((frames, before, after, [3 * block + i for block in done for i in range(3)]))
        window = [block for block in window if block not in done]
    rows = Triangle(sigmas, 5, chunk=3).rows(3 * n_blocks)
    assert [tuple(map(list, row)) for row in rows] == expected


def test_a_stream_batch_is_full_after_its_latency_and_gives_one_frame_per_pass():
    plan = Triangle(ladder(4), 4)
    rows = list(islice(plan.rows(None), 50))
    assert [len(row.active) for row in rows] == [1, 2, 3] + [4] * 47
    assert [list(row.commit) for row in rows] == [[], [], []] + [[k] for k in range(47)]
    for row in rows[3:]:  # slot u % 4 of the batch holds one frame from its entry to its end
        assert sorted(frame % 4 for frame in row.active) == [0, 1, 2, 3]
    assert [list(row.commit) for row in plan.flush(50)] == [[47], [48], [49]]


def test_one_shot_moves_all_frames_together():
    rows = list(OneShot([1.0, 0.4, 0.0]).rows(3))
    assert [tuple(row) for row in rows] == [
        (range(3), (1.0,) * 3, (0.4,) * 3, range(0)),
        (range(3), (0.4,) * 3, (0.0,) * 3, range(3)),
    ]


def test_the_last_unit_of_a_clip_is_shorter_if_need_be():
    rows = list(Staircase([1.0, 0.0], chunk=3).rows(7))
    assert [row.active for row in rows] == [range(3), range(3, 6), range(6, 7)]


def test_an_endless_plan_is_lazy_and_reaches_far_rows_at_once():
    row = Triangle(ladder(10), 5).row(10**15 + 1)
    assert row.active == range((10**15 + 1) * 5 // 10 - 4, (10**15 + 1) * 5 // 10 + 1)


def test_one_shot_refuses_to_be_endless():
    with pytest.raises(ValueError, match="give n_frames, or use Staircase to stream"):
        next(OneShot(ladder(2)).rows(None))


@pytest.mark.parametrize("count", [0, -1, 2.5, True])
def test_counts_are_checked(count):
    with pytest.raises(ValueError, match="units must be a whole number of at least 1"):
        Triangle(ladder(2), count)
    with pytest.raises(ValueError, match="chunk must be a whole number of at least 1"):
        Staircase(ladder(2), chunk=count)
    with pytest.raises(ValueError, match="lag must be a whole number of at least 1"):
        Lag(ladder(2), count)
    for plan in (OneShot(ladder(2)), Staircase(ladder(2))):
        with pytest.raises(ValueError, match="n_frames must be a whole number of at least 1"):
            next(plan.rows(count))


def test_a_lag_that_would_leave_gaps_is_refused():
    with pytest.raises(ValueError, match=r"lag must be at most 2, .* got 3"):
        Lag(ladder(2), 3)


@pytest.mark.parametrize("sigmas", [[], [1.0], [1.0, 1.0], [0.0, 1.0], [1.0, math.nan]])
def test_levels_that_do_not_fall_are_refused(sigmas):
    with pytest.raises(ValueError, match="two or more decreasing levels"):
        Staircase(sigmas)


def test_steps_out_of_range_are_refused():
    for plan in (OneShot(ladder(2)), Staircase(ladder(2), chunk=4)):
        with pytest.raises(ValueError, match="step must be from 0 to 1, got 2"):
            plan.row(2, n_frames=4)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        Staircase(ladder(2)).row(-1)
