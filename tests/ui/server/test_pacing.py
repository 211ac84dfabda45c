"""How much is sent to whom: window and quality follow the acknowledgements, the newest picture wins."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from millstream.ui.server.contract import Picture
from millstream.ui.server.outbox import Outbox
from millstream.ui.server.pacing import FIRST_QUALITY, LEAST_QUALITY, MOST_QUALITY, Flow
from millstream.ui.server.protocol import VIDEO_HEADER


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_near_client_has_two_pictures_under_way_and_a_distant_one_more():
    for trip, limit in ((0.01, 2), (0.2, 7), (2.0, 8)):
        clock = Clock()
        flow = Flow(30, clock=clock)
        for frame in range(20):
            flow.sent(frame)
            clock.now += trip
            flow.shown(frame)
        assert flow.limit == limit, trip


def test_a_full_window_waits_for_an_acknowledgement():
    clock = Clock()
    flow = Flow(30, clock=clock)
    flow.sent(0)
    flow.shown(0)
    flow.sent(1)
    flow.sent(2)
    assert flow.wait() > 0.9
    flow.shown(2)  # acknowledges 1 as well
    assert flow.wait() == 0


def test_a_client_that_never_acknowledges_is_paced_by_time():
    clock = Clock()
    flow = Flow(30, clock=clock)
    sent = 0
    for _ in range(1000):
        if flow.wait() == 0:
            flow.sent(sent)
            sent += 1
        clock.now += 0.01
    assert 150 <= sent <= 220  # two every tenth of a second


def test_acknowledging_what_was_never_sent_changes_nothing():
    flow = Flow(30)
    flow.shown(2**53)
    assert flow.acknowledged == 0
    assert flow.wait() == 0


def test_quality_falls_when_pictures_queue_up_and_rises_again():
    clock = Clock()
    flow = Flow(30, clock=clock)

    def talk(trips) -> None:
        for frame, trip in enumerate(trips):
            flow.sent(frame)
            clock.now += trip
            flow.shown(frame)

    talk([0.02] * 5)
    assert flow.quality >= FIRST_QUALITY
    talk([0.3] * 40)
    assert flow.quality == LEAST_QUALITY
    talk([0.02] * 1000)
    assert flow.quality == MOST_QUALITY


def test_a_distant_client_is_not_taken_for_a_congested_one():
    clock = Clock()
    flow = Flow(30, clock=clock)
    for frame in range(50):
        flow.sent(frame)
        clock.now += 0.25
        flow.shown(frame)
    assert flow.quality > FIRST_QUALITY


def test_of_pictures_only_the_newest_is_sent_and_of_words_all(run_async):
    async def talk() -> tuple[list, Outbox]:
        sent: list = []
        gate = asyncio.Event()

        async def send(message) -> None:
            await gate.wait()
            sent.append(message)

        with ThreadPoolExecutor(1) as pool:
            outbox = Outbox(send, pool, ("jpeg",), 30)
            running = asyncio.create_task(outbox.run())
            outbox.say("first")
            await asyncio.sleep(0.02)
            for frame in range(50):
                outbox.show([(time.monotonic(), Picture(torch.zeros(3, 8, 8), 1, frame, 0.0))])
                outbox.say(f"word {frame}")
            gate.set()
            await asyncio.sleep(0.2)
            running.cancel()
        return sent, outbox

    sent, outbox = run_async(talk())
    assert [message for message in sent if isinstance(message, str)] == ["first", *(f"word {n}" for n in range(50))]
    (picture,) = (message for message in sent if isinstance(message, bytes))
    assert VIDEO_HEADER.unpack_from(picture)[4] == 49
    assert outbox.dropped == 49
    assert outbox.sent == 1


def test_a_picture_that_comes_late_never_turns_time_back(run_async):
    async def talk() -> list[int]:
        sent: list[int] = []

        async def send(message) -> None:
            sent.append(VIDEO_HEADER.unpack_from(message)[4])

        with ThreadPoolExecutor(1) as pool:
            outbox = Outbox(send, pool, ("jpeg",), 30)
            running = asyncio.create_task(outbox.run())
            now = time.monotonic()
            picture = lambda frame: Picture(torch.zeros(3, 8, 8), 1, frame, 0.0)  # noqa: E731
            outbox.show([(now, picture(0)), (now + 0.1, picture(1))])
            await asyncio.sleep(0.05)
            outbox.show([(now + 0.05, picture(2))])
            await asyncio.sleep(0.15)
            running.cancel()
        return sent

    assert run_async(talk()) == [0, 2]
