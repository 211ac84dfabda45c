"""What a player sees: frames that obey keys, pause, step, reset, back, branches, a timeline, several at once."""

from __future__ import annotations

import struct
import time
from itertools import pairwise

import pytest

from millstream.ui.server.protocol import AUDIO_HEADER


def test_a_player_is_welcomed_with_everything_the_page_needs(serve, client):
    welcome = client(serve(model="toy", recipe="plain")).hello(seed=7)
    assert welcome["protocol"] == 1
    assert welcome["model"] == "toy"
    assert welcome["recipe"] == "plain"
    assert welcome["size"] == [24, 32]
    assert welcome["rate"] == 50.0
    assert welcome["worlds"] == ["a brick corridor", "a slime arena"]
    assert welcome["keys"]["KeyW"] == "MOVE_FORWARD"
    assert welcome["prompt"] == "a brick corridor"
    assert welcome["seed"] == 7
    assert welcome["running"] is False
    assert welcome["resumed"] is False
    assert "keys" in welcome["controls"]
    assert "voice" not in welcome["controls"]
    assert len(welcome["resume"]) >= 24


def test_nothing_is_drawn_before_start(serve, client):
    running = serve()
    player = client(running)
    player.hello()
    with pytest.raises(TimeoutError):
        player.shot(timeout=0.3)
    assert running.pipe.batches == []


def test_keys_reach_the_picture_under_the_version_that_was_answered(serve, client):
    player = client(serve())
    player.hello()
    player.say("start")
    assert player.shot().rgb[1] < 0.2
    version = player.ask("steer", keys=["KeyW"])["version"]
    held = player.shot(lambda shot: shot.version >= version)
    assert held.version == version
    assert held.rgb[1] > 0.8
    released = player.ask("steer", keys=[])["version"]
    assert player.shot(lambda shot: shot.version >= released).rgb[1] < 0.2


def test_frames_come_at_the_stream_s_rate(serve, client, fake):
    player = client(serve(fake(rate=15)))
    player.hello()
    player.say("start")
    player.shot()
    start, before = time.monotonic(), len(player.shots)
    while time.monotonic() - start < 1.5:
        player.read()
    rate = (len(player.shots) - before) / (time.monotonic() - start)
    assert 12 <= rate <= 16


def test_chunks_of_several_frames_are_played_out_one_by_one(serve, client, fake):
    player = client(serve(fake(rate=20, frames=8)))
    player.hello()
    player.say("start")
    times = []
    for _ in range(24):
        player.shot()
        times.append(time.monotonic())
    gaps = [after - before for before, after in pairwise(times)]
    assert max(gaps) < 0.3  # a chunk lasts 0.4 s
    assert [shot.frame for shot in player.shots] == list(range(24))


def test_pause_single_steps_and_reset(serve, client, eventually):
    running = serve()
    player = client(running)
    player.hello(seed=3)
    player.say("start")
    player.shot()
    assert player.ask("pause")["type"] == "done"
    time.sleep(0.1)
    drawn = len(running.pipe.batches)
    time.sleep(0.2)
    assert len(running.pipe.batches) == drawn
    for _ in range(3):
        player.say("step")
    eventually(lambda: len(running.pipe.batches) == drawn + 3)
    player.ask("reset", seed=11)
    player.ask("step")
    eventually(lambda: len(running.pipe.batches) == drawn + 4)
    eventually(lambda: running.sessions.seats[0].session.state.frame == 1)  # a step is counted before it is kept
    first = running.sessions.seats[0].session.state.seed
    player.ask("reset", seed=11)
    player.ask("step")
    eventually(lambda: len(running.pipe.batches) == drawn + 5)
    assert running.sessions.seats[0].session.state.seed == first


def test_back_goes_back_and_forgets_what_came_after(serve, client, fake):
    running = serve(fake(rate=100))
    player = client(running)
    player.hello()
    player.say("start")
    player.shot(lambda shot: shot.frame >= 330)
    player.ask("pause")
    before = running.sessions.seats[0].position
    answer = player.ask("back", seconds=2)
    assert answer["type"] == "done"
    assert 2 <= answer["seconds"] < 3.2
    assert running.sessions.seats[0].position == pytest.approx(before - answer["seconds"])
    last = max(shot.frame for shot in player.shots)
    player.say("start")
    assert player.shot().frame > last, "the serial number of a frame never repeats"


def test_back_keeps_the_fingers_where_they_are(serve, client, fake):
    player = client(serve(fake(rate=100)))
    player.hello()
    player.say("start")
    player.shot(lambda shot: shot.frame >= 120)
    version = player.ask("steer", keys=["KeyW"])["version"]
    player.shot(lambda shot: shot.version >= version)
    player.ask("back", seconds=1)
    frame = player.shots[-1].frame
    assert player.shot(lambda shot: shot.frame > frame + 3).rgb[1] > 0.8


def test_back_before_anything_is_refused(serve, client):
    player = client(serve())
    player.hello()
    assert "no way back" in player.ask("back", seconds=1)["message"]


def test_a_history_that_would_not_fit_is_not_kept(serve, client, fake, eventually):
    running = serve(fake(rate=100), history_bytes=8)
    player = client(running)
    player.hello()
    player.say("start")
    eventually(lambda: running.sessions.seats[0].position > 0.1)
    assert "16 bytes and 8 may be used" in player.ask("back", seconds=1)["message"]


def test_branches_go_on_side_by_side(serve, client, fake, eventually):
    running = serve(fake(rate=100), max_branches=1)
    player = client(running)
    welcome = player.hello()
    player.say("start")
    player.shot(lambda shot: shot.frame >= 20)
    player.ask("pause")
    seat = running.sessions.seats[0]
    fork = seat.session.state.frame
    branch = player.ask("branch")["resume"]
    assert "at most 1 branches" in player.ask("branch")["message"]
    player.ask("steer", prompt="a slime arena")
    for _ in range(5):
        player.say("step")
    eventually(lambda: seat.session.state.frame == fork + 5)
    answer = player.ask("switch", resume=branch)
    assert answer["prompt"] == "a brick corridor"
    assert seat.session.state.frame == fork
    answer = player.ask("switch", resume=welcome["resume"])
    assert answer["prompt"] == "a slime arena"
    assert seat.session.state.frame == fork + 5
    assert "no such branch" in player.ask("switch", resume="somebody else's")["message"]


def test_a_timeline_changes_the_prompt_at_its_times(serve, client, fake):
    running = serve(fake(rate=100))
    player = client(running)
    player.hello()
    entries = [{"at": 0.4, "prompt": "second"}, {"at": 0.2, "prompt": "first"}]
    assert player.ask("timeline", entries=entries)["entries"] == 2
    player.say("start")
    player.shot(lambda shot: shot.frame >= 60)
    prompts = [control.prompt for _, control in running.pipe.read[:60]]
    assert prompts[:20] == ["a brick corridor"] * 20
    assert prompts[20:40] == ["first"] * 20
    assert prompts[40:60] == ["second"] * 20


def test_a_timeline_with_a_bad_prompt_is_refused_at_once(serve, client):
    player = client(serve())
    player.hello()
    assert "empty" in player.ask("timeline", entries=[{"at": 5, "prompt": " "}])["message"]
    switch = [{"at": 5, "prompt": "x", "switch": "cut"}]
    assert "unknown control switch" in player.ask("timeline", entries=switch)["message"]


def test_a_prompt_is_told_its_nearest_world(serve, client):
    player = client(serve())
    player.hello()
    status = player.find(lambda message: message["type"] == "status")
    assert status["nearest"] == {"world": "a brick corridor", "similarity": 0.25}


def test_the_status_line_has_its_numbers(serve, client, fake):
    player = client(serve(fake(rate=20)))
    player.hello()
    player.say("start")
    player.until("status")
    status = player.until("status")
    assert 14 <= status["fps"] <= 22
    assert status["age_ms"] == 1.0
    assert status["running"] is True
    assert status["step_ms"]["p50"] <= status["step_ms"]["p99"] < 500
    assert status["memory_mb"] > 10
    assert status["sessions"] == 1
    assert status["frame"] > 15


def test_sessions_advance_together_and_each_draws_what_it_would_alone(serve, client, fake):
    running = serve(fake(rate=30), max_sessions=4)
    players = [client(running) for _ in range(4)]
    for seed, player in enumerate(players):
        player.hello(seed=seed)
        player.say("start")
        time.sleep(0.007)
    for player in players:
        player.shot(lambda shot: shot.frame >= 20)
    assert running.pipe.batches[-10:] == [4] * 10
    assert running.pipe.threads == {"millstream-engine"}


def test_sound_comes_whole_and_in_order_while_pictures_may_drop(serve, client, fake_talkie):
    player = client(serve(fake_talkie(rate=50)), acks=False)
    player.hello()
    player.say("start")
    while len(player.sounds) < 60:
        player.read()
    heads = [AUDIO_HEADER.unpack_from(sound) for sound in player.sounds]
    assert [head[4] for head in heads] == [160 * number for number in range(len(heads))]
    assert {(head[0], head[1], head[2], head[6]) for head in heads} == {(3, 0, 2, 8000)}
    left_right = struct.unpack_from("<320h", player.sounds[0], AUDIO_HEADER.size)
    assert set(left_right[::2]) == {16384}
    assert set(left_right[1::2]) == {-32767}
    assert len(player.shots) < 40, "who acknowledges nothing gets ten pictures a second"


def test_a_session_that_fails_is_closed_with_a_reason_and_no_other_is(serve, client, eventually):
    running = serve(max_sessions=3)
    players = [client(running) for _ in range(3)]
    for player in players:
        player.hello()
        player.say("start")
        player.shot()
    players[1].say("steer", prompt="explode")
    code, bye = players[1].farewell()
    assert code == 1011
    assert "the reactor has exploded" in bye["message"]
    for player in (players[0], players[2]):
        frame = player.shots[-1].frame
        player.shot(lambda shot, frame=frame: shot.frame > frame + 20)
    eventually(lambda: len(running.sessions.seats) == 2)
