"""Clients that are broken, hostile or gone: they lose their own socket, and nobody else notices."""

from __future__ import annotations

import json
import random
import socket
import threading
import time

import pytest
from websockets.exceptions import ConnectionClosed, WebSocketException


@pytest.fixture
def witness(client):
    """A player who must see frames all the while: `witness(running)` gives a check to call at the end."""

    def watch(running):
        player = client(running)
        player.hello()
        player.say("start")
        player.shot()

        def still_served() -> None:
            frame = player.shots[-1].frame
            player.shot(lambda shot: shot.frame > frame + 10)
            assert not [message for message in player.heard if message["type"] in ("bye", "refused")]

        return still_served

    return watch


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("nonsense", 4400),
        ("[" * 100_000, 4400),
        (b"", 4400),
        (bytes(100), 4400),
        (b"\x01" + bytes(8), 4400),
        (b"\x01" + bytes(8) + bytes(2**21), 4413),
        (json.dumps({"type": "steer", "prompt": "x" * 300_000}), 4413),
    ],
)
def test_garbage_costs_its_sender_the_socket(serve, client, witness, frame, code):
    running = serve()
    still_served = witness(running)
    hostile = client(running)
    hostile.hello()
    hostile.socket.send(frame)
    closed, bye = hostile.farewell()
    assert closed == code
    assert bye["message"]
    still_served()


@pytest.mark.parametrize("first", ["nonsense", b"\x01picture", json.dumps({"type": "start"}), ""])
def test_who_doesn_t_say_hello_is_hung_up_on(serve, client, first):
    stranger = client(serve())
    stranger.socket.send(first)
    assert stranger.farewell()[0] == 4400


def test_who_says_nothing_is_hung_up_on(serve, client):
    assert client(serve(hello_seconds=0.2)).farewell()[0] == 4408


def test_refusals_leave_the_session_as_it_was(serve, client):
    player = client(serve())
    player.hello()
    for bad in ({"keys": ["KeyW"] * 17}, {"guidance_scale": 1e9}, {"prompt": ""}, {"warp": 9}, {}):
        assert player.ask("steer", **bad)["type"] == "refused"
    assert player.ask("steer", keys=["KeyW"])["version"] == 1


def storm(hostile) -> None:
    for _ in range(100_000):
        hostile.say("ping", t=1)


def test_a_storm_of_messages_is_stopped(serve, client, witness):
    running = serve()
    still_served = witness(running)
    hostile = client(running, max_queue=None)
    hostile.hello()
    with pytest.raises(ConnectionClosed):
        storm(hostile)
    assert hostile.farewell()[0] in (4429, 1006)
    still_served()


def test_who_asks_but_never_reads_is_cut_off(serve, client, witness, eventually):
    running = serve()
    still_served = witness(running)
    hostile = client(running, max_queue=1)
    hostile.hello()
    for _ in range(800):
        hostile.say("back", id=1, seconds=1)
    still_served()
    hostile.drop()
    eventually(lambda: sum(seat.viewer is not None for seat in running.sessions.seats) == 1)


def flood(hostile, messages) -> None:
    for message in messages:
        hostile.socket.send(message)
        hostile.socket.ping().wait(0.5)  # so that it hears why it is closed


@pytest.mark.parametrize(
    "message",
    [
        {"type": "reset"},
        {"type": "branch"},
        {"type": "back"},
        {"type": "record", "on": True},
        {"type": "timeline", "entries": []},
        {"type": "steer", "prompt": "a slime arena"},
    ],
)
def test_a_flood_of_what_is_costly_is_refused_and_then_cut_off(serve, client, witness, message):
    running = serve()
    still_served = witness(running)
    hostile = client(running, max_queue=None)
    hostile.hello()
    with pytest.raises(ConnectionClosed):
        flood(hostile, [json.dumps({**message, "id": number}) for number in range(800)])
    code, bye = hostile.farewell()
    assert code == 4429
    assert "commands such as" in bye["message"]
    assert any("wait a moment" in heard.get("message", "") for heard in hostile.heard)
    still_served()


@pytest.mark.parametrize(
    ("message", "times"), [(b"\x01" + bytes(20), 2000), (json.dumps({"type": "timeline", "id": "x" * 250_000}), 20)]
)
def test_a_flood_of_pictures_or_bytes_is_cut_off(serve, client, witness, message, times):
    running = serve()
    still_served = witness(running)
    hostile = client(running, max_queue=None)
    hostile.hello()
    with pytest.raises(ConnectionClosed):
        flood(hostile, [message] * times)
    assert hostile.farewell()[0] == 4429
    still_served()


def test_half_open_sockets_hold_nothing_up(serve, witness):
    running = serve(hello_seconds=0.3)
    still_served = witness(running)
    sockets = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(50)]
    for index, half in enumerate(sockets):
        if index % 2:
            half.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n")
    still_served()
    for half in sockets:
        half.close()


def test_clients_that_vanish_leave_their_places_after_the_grace(serve, client, witness, eventually):
    running = serve(max_sessions=8, grace_seconds=0.2)
    still_served = witness(running)
    for _ in range(7):
        gone = client(running)
        gone.hello()
        gone.say("start")
        gone.shot()
        gone.drop()
    eventually(lambda: len(running.sessions.seats) == 1)
    eventually(lambda: running.pipe.states == 1)
    still_served()


def test_a_flood_of_connections_is_turned_away_at_the_door(serve, client, witness, eventually):
    running = serve(connects=100)
    still_served = witness(running)
    turned_away = []

    def flood() -> None:
        for _ in range(75):
            try:
                visitor = client(running)
                visitor.say("hello", protocol=1)
                visitor.close()
            except (OSError, WebSocketException, EOFError) as error:
                turned_away.append(error)

    threads = [threading.Thread(target=flood) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    still_served()
    eventually(lambda: len(running.sessions.viewers) == 1)
    assert running.sessions.opened <= 101
    assert not running.sessions.waiting


def test_random_talk_never_breaks_the_server(serve, client, witness):
    running = serve(max_sessions=3)
    still_served = witness(running)
    words = random.Random(3)
    types = ["steer", "start", "pause", "step", "reset", "back", "branch", "switch", "timeline", "record", "shown"]
    values = [None, True, -1, 0, 1.5, "x", [], ["KeyW"], [1, 2], {}, [{"at": 0, "prompt": "p"}]]
    fields = ["keys", "mouse", "prompt", "seconds", "resume", "entries", "on", "seed", "frame", "age", "strength"]
    hostile = client(running)
    hostile.hello()
    for number in range(400):
        chosen = {words.choice(fields): words.choice(values) for _ in range(words.randrange(3))}
        hostile.say(words.choice(types), id=number, **chosen)
    hostile.find(lambda message: message.get("id") == 399 or message["type"] == "bye", timeout=20)
    still_served()
    assert running.sessions.failures == 0
    hostile.drop()  # it has read so little of what it was told that a polite end would take ten seconds


def test_twenty_sockets_lose_no_control(serve, client, fake):
    running = serve(fake(rate=20), max_sessions=20)
    players = [client(running) for _ in range(20)]
    lost = []

    def play(player, seed: int) -> None:
        player.hello(seed=seed)
        player.say("start")
        player.shot()
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            version = player.ask("steer", keys=["KeyW"] if seed % 2 else [])["version"]
            seen = player.shot(lambda shot, version=version: shot.version >= version)
            if (seen.rgb[1] > 0.5) != bool(seed % 2):
                lost.append((seed, version))

    threads = [threading.Thread(target=play, args=(player, seed)) for seed, player in enumerate(players)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert lost == []
    assert all(len(player.shots) > 20 for player in players)
    assert max(running.pipe.batches) == 20
