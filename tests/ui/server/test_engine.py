"""The thread that draws: one beat for all, nobody starved, nobody stopped by another."""

from __future__ import annotations

import time

import pytest
import torch

from millstream.ui.server.engine import Engine
from millstream.ui.server.seat import Seat
from millstream.ui.server.settings import Settings


class Silent:
    """A viewer that looks away."""

    def __init__(self) -> None:
        self.pictures: list = []

    def show(self, pictures) -> None:
        self.pictures += pictures

    def hear(self, chunk) -> None: ...

    def forget(self) -> None: ...


@pytest.fixture
def engine():
    """`engine(pipe)` with its list of (seat, error)."""
    started = []

    def start(pipe):
        failures: list = []
        made = Engine(pipe.rate, lambda seat, error: failures.append((seat, error)))
        made.start()
        started.append(made)
        return made, failures

    yield start
    for each in started:
        each.stop()


def seated(pipe, engine, mode="play", prompt="x") -> Seat:
    seat = Seat(pipe, Settings(), prompt=prompt, seed=1, mode=mode)
    seat.viewer = Silent()
    engine.add(seat)
    return seat


def test_a_new_session_joins_the_beat(fake, engine, eventually):
    pipe = fake(rate=10)
    made, _ = engine(pipe)
    first, second = seated(pipe, made), seated(pipe, made)
    first.start()
    made.wake()
    eventually(lambda: first.frame == 2)
    second.start()
    made.wake()
    eventually(lambda: second.frame == 5)
    assert pipe.batches[-4:] == [2] * 4


def test_sessions_that_fell_out_of_step_come_together_again(fake, engine, eventually):
    class ShortStart(fake):
        """As Wan's streams: the first chunk is shorter than the others."""

        def _draw(self, state, control, picture):
            self.frames = 4 if state.frame else 3
            return super()._draw(state, control, picture)

    pipe = ShortStart(rate=20)
    made, _ = engine(pipe)
    first, second = seated(pipe, made), seated(pipe, made)
    first.start()
    made.wake()
    eventually(lambda: first.frame >= 7)
    second.start()
    made.wake()
    eventually(lambda: second.frame >= 15)
    assert pipe.batches[-2:] == [2, 2]
    assert first.due == second.due


def test_a_camera_that_floods_doesn_t_starve_players(fake, engine, eventually):
    pipe = fake(rate=20, delay=0.004)
    made, _ = engine(pipe)
    player, camera = seated(pipe, made), seated(pipe, made, "camera")
    for seat in (player, camera):
        seat.start()
    end = time.monotonic() + 1
    while time.monotonic() < end:
        camera.give(torch.zeros(3, 24, 32), 0.0)
        made.wake()
        time.sleep(0.001)
    assert player.frame >= 12
    assert camera.frame >= 20


def test_a_slow_model_is_stepped_without_a_rest_and_owes_nothing_later(fake, engine, eventually):
    pipe = fake(rate=50, delay=0.04)
    made, _ = engine(pipe)
    seat = seated(pipe, made)
    seat.start()
    made.wake()
    eventually(lambda: seat.frame >= 12)
    pipe.delay = 0.0
    eventually(lambda: seat.frame >= 14)
    frame, start = seat.frame, time.monotonic()
    time.sleep(0.5)
    assert (seat.frame - frame) / (time.monotonic() - start) < 60, "what was missed is not hurried through"


def test_an_idle_engine_sleeps(fake, engine):
    pipe = fake()
    made, _ = engine(pipe)
    seated(pipe, made)
    start = time.thread_time_ns(), time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start[1] < 0.1
    assert made.rounds == 0


def test_calls_run_between_steps_and_bring_their_errors_back(fake, engine):
    pipe = fake(delay=0.02)
    made, failures = engine(pipe)
    seat = seated(pipe, made)
    seat.start()
    made.wake()
    assert made.call(lambda: 5).result(2) == 5
    with pytest.raises(ZeroDivisionError):
        made.call(lambda: 1 / 0).result(2)
    assert made.alive
    assert failures == []


def test_whatever_fails_is_named_and_taken_out(fake, engine, eventually, caplog):
    pipe = fake()
    made, failures = engine(pipe)
    good, bad = seated(pipe, made), seated(pipe, made, prompt="explode")
    worse = seated(pipe, made)
    worse.viewer.show = lambda pictures: 1 / 0
    for seat in (good, bad, worse):
        seat.start()
    made.wake()
    eventually(lambda: good.frame > 5)
    assert {seat for seat, _ in failures} == {bad, worse}
    assert f"session {bad.name} has failed" in caplog.text
    frame = good.frame
    eventually(lambda: good.frame > frame + 5)


def test_what_waits_when_the_engine_ends_is_still_done(fake, engine):
    pipe = fake(delay=0.05)
    made, _ = engine(pipe)
    seat = seated(pipe, made)
    seat.start()
    made.wake()
    time.sleep(0.02)
    made.remove(seat)
    future = made.call(seat.close)
    made.stop()
    assert future.done()
    assert pipe.states == 0


def test_a_control_is_answered_at_once_and_only_one_step_ahead_of_time(fake, engine, eventually):
    pipe = fake(rate=0.5)
    made, _ = engine(pipe)
    seat = seated(pipe, made)
    seat.start()
    made.wake()
    eventually(lambda: seat.frame == 1)
    seat.session.steer(keys=["KeyW"])
    made.wake()
    eventually(lambda: seat.frame == 2)
    assert seat.due - time.monotonic() > seat.step_seconds, "it was drawn before its time, which stays as it was"
    seat.session.steer(keys=[])
    made.call(lambda: None).result(2)
    made.call(lambda: None).result(2)
    assert (seat.frame, pipe.batches) == (2, [1, 1])


def test_players_who_share_a_step_keep_their_beat(fake, engine, eventually):
    pipe = fake(rate=0.5)
    made, _ = engine(pipe)
    seats = [seated(pipe, made), seated(pipe, made)]
    for seat in seats:
        seat.start()
    made.wake()
    eventually(lambda: all(seat.frame == 1 for seat in seats))
    seats[0].session.steer(keys=["KeyW"])
    made.call(lambda: None).result(2)
    made.call(lambda: None).result(2)
    assert [seat.frame for seat in seats] == [1, 1]


def test_who_asks_without_end_waits_for_the_others(fake, engine, eventually):
    pipe = fake(rate=100)
    made, _ = engine(pipe)
    player, asking = seated(pipe, made), seated(pipe, made)
    player.start()
    made.wake()
    eventually(lambda: player.frame >= 1)
    start, frames = player.frame, []
    for _ in range(20):
        made.call(lambda: (time.sleep(0.02), frames.append(player.frame)), asking)
    made.call(lambda: None).result(2)
    assert len(frames) <= 1, "what the server itself wants doesn't stand behind them"
    eventually(lambda: len(frames) == 20, 20)
    assert frames[-1] - start >= 40, "the player's stream went on"


def test_single_steps_are_no_faster_than_the_stream(fake, engine, eventually):
    pipe = fake(rate=50)
    made, _ = engine(pipe)
    player, stepping = seated(pipe, made), seated(pipe, made)
    player.start()
    made.wake()
    eventually(lambda: player.frame >= 1)
    start = player.frame
    for _ in range(100):
        stepping.single_step()
    made.wake()
    eventually(lambda: stepping.frame == 32)
    assert player.frame - start >= 30, "they were drawn together"


def test_chunks_follow_one_another_even_when_one_is_drawn_early(fake):
    seat = Seat(fake(rate=10, frames=4), Settings(history_seconds=0), prompt="x", seed=1, mode="play")
    seat.viewer = Silent()
    for now in (100.0, 100.3, 100.8, 109.0):
        seat.drew(seat.session.step(), now)
    due = [when for when, _ in seat.viewer.pictures]
    assert due[:12] == pytest.approx([100 + 0.1 * index for index in range(12)])
    assert due[12:] == pytest.approx([109.0, 109.1, 109.2, 109.3])
    seat.close()
