"""Two replicas on Ray Serve: sockets stick, sessions move, and the death of one replica costs a second."""

from __future__ import annotations

import os
import signal
import time

import httpx
import pytest
from websockets.exceptions import WebSocketException

ray = pytest.importorskip("ray", reason='Ray Serve is missing: pip install "millstream[ray]"')
pytestmark = pytest.mark.slow
RATE = 25


@pytest.fixture(scope="module")
def replicas(on_ray):
    return on_ray((2, 2), max_sessions=4, grace_seconds=20)


def cookie(place: str) -> dict[str, str]:
    return {"cookie": f"millstream_place={place}"}


def process_at(replicas, place: str) -> int:
    """Which replica's process this browser speaks to."""
    return httpx.get(f"{replicas.http}/metrics", headers=cookie(place), timeout=20).json()["process"]


def two_places(replicas) -> tuple[str, str]:
    """Two browsers, each at another replica."""
    first = "browser-0"
    for number in range(1, 50):
        if process_at(replicas, f"browser-{number}") != process_at(replicas, first):
            return first, f"browser-{number}"
    raise AssertionError("every browser came to one replica")


def test_a_browser_gets_a_place_and_stays_there(replicas):
    page = httpx.get(replicas.http, timeout=20)
    assert page.status_code == 200
    assert "millstream_place=" in page.headers["set-cookie"]
    assert "set-cookie" not in httpx.get(replicas.http, headers=cookie("x"), timeout=20).headers
    assert len({process_at(replicas, "browser-0") for _ in range(12)}) == 1


def test_a_session_moves_with_its_viewer(replicas, client):
    here, there = two_places(replicas)
    player = client(replicas, additional_headers=cookie(here))
    secret = player.hello(prompt="a slime arena")["resume"]
    player.say("start")
    player.shot(lambda shot: shot.frame > 2 * RATE, timeout=20)
    moved = client(replicas, additional_headers=cookie(there))
    welcome = moved.hello(resume=secret)
    assert (welcome["resumed"], welcome["prompt"]) == (True, "a slime arena")
    assert moved.until("status")["frame"] > RATE / 2
    assert player.farewell()[0] == 4409
    moved.say("leave")


def test_when_a_replica_dies_its_sessions_go_on_at_the_other(replicas, client):
    here, there = two_places(replicas)
    doomed, safe = (client(replicas, additional_headers=cookie(place)) for place in (here, there))
    secret = doomed.hello(prompt="a slime arena", seed=4)["resume"]
    safe.hello()
    for player in (doomed, safe):
        player.say("start")
    version = doomed.ask("steer", keys=["KeyW"])["version"]
    last = doomed.shot(lambda shot: shot.frame > 4 * RATE and shot.version >= version, timeout=20)
    os.kill(process_at(replicas, here), signal.SIGKILL)
    doomed.farewell(timeout=20)

    start = time.monotonic()
    welcome = None
    while welcome is None and time.monotonic() - start < 15:
        try:
            again = client(replicas, additional_headers=cookie(here))
            welcome = again.hello(resume=secret)
        except (OSError, WebSocketException, EOFError, TimeoutError):
            time.sleep(0.2)
    assert welcome is not None, "no replica answered"
    assert welcome["resumed"] is True
    assert (welcome["resume"], welcome["seed"], welcome["prompt"]) == (secret, 4, "a slime arena")
    assert welcome["running"] is True
    shot = again.shot(timeout=20)
    assert shot.rgb[1] > 0.8, "KeyW is still down"
    assert last.frame - 2.5 * RATE < shot.frame, "about a second is lost, no more"
    frame = safe.shots[-1].frame if safe.shots else 0
    safe.shot(lambda shot: shot.frame > frame + RATE, timeout=20)
