"""Replicas follow the number of viewers."""

from __future__ import annotations

import threading
import time

import httpx
import pytest

pytest.importorskip("ray", reason='Ray Serve is missing: pip install "millstream[ray]"')
pytestmark = pytest.mark.slow


def processes(running) -> set[int]:
    """Of the replicas that browsers come to."""
    numbers = [
        httpx.get(f"{running.http}/metrics", headers={"cookie": f"millstream_place={place}"}, timeout=20).json()
        for place in range(12)
    ]
    return {each["process"] for each in numbers}


def test_more_viewers_start_another_replica_and_notice_nothing(on_ray, client):
    running = on_ray((1, 2), max_sessions=2)
    (first,) = processes(running)
    players = [client(running) for _ in range(2)]
    for player in players:
        player.hello()
        player.say("start")
    done = threading.Event()

    def watch(player) -> None:
        while not done.is_set():
            player.read(20)

    threads = [threading.Thread(target=watch, args=(player,)) for player in players]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 90
    while len(processes(running)) < 2 and time.monotonic() < end:
        time.sleep(2)
    found = processes(running)
    done.set()
    for thread in threads:
        thread.join(30)
    assert len(found) == 2
    assert first in found
    for player in players:
        assert len(player.shots) > 50
        assert not [message for message in player.heard if message["type"] == "bye"]
