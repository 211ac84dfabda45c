import json
import sys

import pytest
import torch

from millstream.streaming import Chunk, Metrics


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def chunk(time, frames=1):
    return Chunk("video", torch.zeros(frames, 3, 2, 2), 0, 10.0, 0, time)


def run(metrics, clock, steps, *, seconds=0.1, frames=1, age=0.0):
    for _ in range(steps):
        start = clock.now
        clock.now += seconds
        metrics.stepped(start, [chunk(clock.now - age, frames)] if frames else [], applied=4)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def metrics(clock):
    return Metrics(clock=clock)


def test_fps_counts_frames_not_steps(metrics, clock):
    run(metrics, clock, 20, seconds=0.1, frames=3)
    assert metrics.fps == pytest.approx(30)
    assert metrics.frames == 60


def test_fps_follows_the_recent_past(metrics, clock):
    run(metrics, clock, 500, seconds=0.01)
    run(metrics, clock, 30, seconds=0.2)
    assert metrics.fps == pytest.approx(5)


def test_fps_of_a_very_slow_model(metrics, clock):
    run(metrics, clock, 4, seconds=10)
    assert metrics.fps == pytest.approx(0.1)


def test_time_to_first_frame_includes_steps_that_drew_nothing(metrics, clock):
    run(metrics, clock, 3, frames=0)
    assert metrics.time_to_first_frame is None
    run(metrics, clock, 5)
    assert metrics.time_to_first_frame == pytest.approx(0.4)


def test_percentiles_are_steps_that_were_seen(metrics, clock):
    run(metrics, clock, 98, seconds=0.1)
    run(metrics, clock, 2, seconds=1.0)
    assert metrics.step_seconds(50) == pytest.approx(0.1)
    assert metrics.step_seconds(95) == pytest.approx(0.1)
    assert metrics.step_seconds(99) == pytest.approx(1.0)


def test_age_is_that_at_delivery_once_there_is_a_viewer(metrics, clock):
    run(metrics, clock, 3, age=0.05)
    assert metrics.frame_age == pytest.approx(0.05)
    metrics.delivered(chunk(clock.now - 0.3))
    run(metrics, clock, 3, age=0.05)
    assert metrics.frame_age == pytest.approx(0.3)


def test_memory_is_constant_over_endless_runs(metrics, clock):
    def size():
        return sum(sys.getsizeof(value) for value in vars(metrics).values())

    run(metrics, clock, 3_000, seconds=0.001)
    before = size()
    run(metrics, clock, 10_000, seconds=0.001)
    assert size() <= before * 1.05
    assert metrics.steps == 13_000


def test_status_and_json(metrics, clock):
    assert metrics.status() == "0.0 fps · no frame yet · 0 dropped · v0 applied"
    assert json.loads(json.dumps(metrics.as_dict()))["step_p99"] is None
    run(metrics, clock, 20, seconds=0.0625, age=0.078)
    assert metrics.status() == "16.0 fps · 78 ms old · 0 dropped · v4 applied"
    assert json.loads(json.dumps(metrics.as_dict()))["fps"] == pytest.approx(16)
