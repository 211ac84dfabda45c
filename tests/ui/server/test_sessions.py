"""Coming, waiting, going away and coming back."""

from __future__ import annotations

import time

import pytest


def test_a_dropped_socket_comes_back_to_where_it_was(serve, client, eventually):
    running = serve(max_sessions=1)
    player = client(running)
    welcome = player.hello()
    player.say("start")
    version = player.ask("steer", keys=["KeyW"], prompt="a slime arena")["version"]
    player.shot(lambda shot: shot.frame > 10)
    player.drop()
    seat = running.sessions.seats[0]
    eventually(lambda: seat.viewer is None)
    time.sleep(0.05)
    drawn = seat.session.state.frame
    time.sleep(0.2)
    assert seat.session.state.frame == drawn, "nothing is drawn for nobody"

    again = client(running)
    back = again.hello(resume=welcome["resume"])
    assert back["resumed"] is True
    assert back["running"] is True
    assert back["session"] == welcome["session"]
    assert back["prompt"] == "a slime arena"
    shot = again.shot()
    assert shot.version == version
    assert shot.frame >= drawn
    assert shot.rgb[1] > 0.8


def test_an_unknown_secret_begins_anew(serve, client):
    running = serve()
    assert client(running).hello(resume="not a secret of ours")["resumed"] is False


def test_a_second_window_takes_the_session_over(serve, client):
    running = serve(max_sessions=1)
    first = client(running)
    secret = first.hello()["resume"]
    second = client(running)
    second.hello(resume=secret)
    code, bye = first.farewell()
    assert code == 4409
    assert bye["reason"] == "taken_over"
    second.say("start")
    second.shot()


def test_a_session_that_nobody_comes_back_to_ends(serve, client, eventually):
    running = serve(grace_seconds=0.2)
    player = client(running)
    secret = player.hello()["resume"]
    player.say("step")
    player.shot()
    player.drop()
    eventually(lambda: not running.sessions.seats)
    eventually(lambda: running.pipe.states == 0)
    assert client(running).hello(resume=secret)["resumed"] is False


def test_who_leaves_gives_the_place_up_at_once(serve, client, eventually):
    running = serve()
    player = client(running)
    player.hello()
    player.say("leave")
    assert player.farewell()[0] == 1001
    eventually(lambda: not running.sessions.seats)


def test_an_idle_session_is_told_so_and_ends(serve, client):
    player = client(serve(idle_seconds=0.3))
    player.hello()
    player.say("start")
    code, bye = player.farewell()
    assert code == 4408
    assert bye["reason"] == "idle"
    assert "0.3 seconds" in bye["message"]


def test_a_silent_socket_is_given_up_but_its_session_waits(serve, client):
    running = serve(silence_seconds=0.3)
    player = client(running, acks=False)
    player.hello()
    assert player.farewell()[0] == 4408
    assert len(running.sessions.seats) == 1


def test_the_queue_tells_positions_and_moves_up(serve, client):
    running = serve(max_sessions=1)
    playing, second, third = client(running), client(running), client(running)
    playing.hello()
    for position, waiting in enumerate((second, third), start=1):
        waiting.say("hello", protocol=1)
        assert waiting.until("queued")["position"] == position
    assert "wait for welcome" in third.ask("start")["message"]
    third.say("ping", t=5)
    assert third.until("pong")["t"] == 5
    second.close()
    assert third.until("queued")["position"] == 1
    playing.say("leave")
    assert third.until("welcome")["resumed"] is False


def test_a_full_queue_refuses(serve, client):
    running = serve(max_sessions=1, max_waiting=1)
    client(running).hello()
    client(running).say("hello", protocol=1)
    late = client(running)
    late.say("hello", protocol=1)
    code, bye = late.farewell()
    assert code == 4429
    assert "come back later" in bye["message"]


def test_who_is_away_makes_room_for_who_waits_and_loses_nothing(serve, client, eventually, monkeypatch):
    monkeypatch.setattr("millstream.ui.server.sessions.PARK_SECONDS", 0.1)
    running = serve(max_sessions=1)
    first = client(running)
    secret = first.hello(seed=5)["resume"]
    first.say("start")
    first.shot(lambda shot: shot.frame > 5)
    first.drop()
    eventually(lambda: running.sessions.seats[0].viewer is None)
    drawn = running.sessions.seats[0].session.state.frame
    second = client(running)
    second.hello()
    first = client(running)
    first.say("hello", protocol=1, resume=secret)
    assert first.until("queued")["position"] == 1
    second.say("leave")
    back = first.until("welcome")
    assert (back["resumed"], back["resume"], back["running"], back["seed"]) == (True, secret, True, 5)
    first.shot()
    assert running.sessions.seats[0].session.state.frame > drawn


@pytest.mark.parametrize(
    ("hello", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"protocol": 2}, "speaks protocol 1"),
        ({"mode": "dance"}, "play or camera"),
        ({"formats": ["gif"]}, "jpeg, webp"),
        ({"seed": -1}, "whole number"),
    ],
)
def test_a_bad_hello_is_refused_in_words_and_holds_no_place(serve, client, hello, message):
    running = serve()
    player = client(running)
    player.say("hello", **{"protocol": 1, **hello})
    code, bye = player.farewell()
    assert code == 4400
    assert message in bye["message"]
    assert not running.sessions.seats


def test_the_server_says_goodbye_when_it_ends(serve, client):
    running = serve()
    player = client(running)
    player.hello()
    player.say("start")
    player.shot()
    running.server.should_exit = True
    code, _ = player.farewell()
    assert code in (1001, 1012)
