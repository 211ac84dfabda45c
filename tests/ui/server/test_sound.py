"""Speech over the socket at /sound: what is said comes as PCM, ahead of time and in order, and then it is quiet."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from millstream.pipelines.audio import AudioPipeline
from millstream.ui.server.protocol import AUDIO_HEADER, PCM_S16
from millstream.ui.server.seat import AHEAD_SECONDS, Seat
from millstream.ui.server.settings import Settings
from millstream.ui.server.speaking import Speaking


@pytest.fixture(scope="module")
def speech(speech_folder: Path) -> AudioPipeline:
    return AudioPipeline.from_pretrained(speech_folder)


def pcm(sounds: list[bytes]) -> np.ndarray:
    return np.concatenate([np.frombuffer(sound, "<i2", offset=AUDIO_HEADER.size) for sound in sounds])


@pytest.fixture
def talker(serve, client, speech):
    """A socket that has said hello and start, and the server."""
    running = serve(speech=speech)
    ear = client(running, "/sound")
    ear.welcomed = ear.hello(seed=5)
    ear.ask("start")
    return ear, running


def test_words_come_back_as_the_call_speaks_them(talker, speech) -> None:
    ear, _ = talker
    assert ear.welcomed["voices"] == ["ann", "bob"]
    assert ear.welcomed["sampling_rate"] == 16000
    assert {"text", "voice"} <= set(ear.welcomed["controls"])
    ear.ask("steer", text="hello there", voice="bob")
    said = ear.until("said", 20)
    assert said["real_time_factor"] > 0
    headers = [AUDIO_HEADER.unpack_from(sound) for sound in ear.sounds]
    assert {(header[1], header[2], header[6]) for header in headers} == {(PCM_S16, 1, 16000)}
    lengths = [(len(sound) - AUDIO_HEADER.size) // 2 for sound in ear.sounds]
    assert [header[4] for header in headers] == np.cumsum([0, *lengths[:-1]]).tolist()
    whole = speech("hello there", voice="bob", generator=torch.Generator().manual_seed(5)).audios[0]
    heard = pcm(ear.sounds)
    assert np.abs(heard - np.round(32767 * whole[: len(heard)])).max() <= 1


def test_more_words_follow_and_stop_is_silence(talker) -> None:
    ear, running = talker
    ear.ask("steer", text="hello there")
    ear.ask("steer", text="my friend")
    ear.until("said", 20)
    first = len(pcm(ear.sounds))
    ear.ask("steer", text="and more")
    ear.until("said", 20)
    assert AUDIO_HEADER.unpack_from(ear.sounds[-1])[4] >= first
    ear.ask("steer", text="a very long tale, " * 50)
    ear.ask("steer", text="which goes on")
    ear.ask("reset")
    ear.sounds.clear()
    ear.until("status")
    ear.until("status")
    assert not ear.sounds
    ear.ask("steer", text="hello")
    ear.until("said", 20)
    assert AUDIO_HEADER.unpack_from(ear.sounds[0])[4] == 0
    assert running.app.state.speech.numbers()["failures"] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "hello", "voice": "kal"}, "voice must be one of ann, bob"),
        ({"text": "hello", "voice": "/etc/voice.safetensors"}, "voice must be one of ann, bob"),
        ({"text": "…"}, "there is nothing to say"),
        ({"text": "a" * 2001}, "at most 2,000 characters"),
        ({"text": 5}, "text of at most 2,000 characters"),
        ({"keys": ["KeyW"]}, "unknown control keys"),
    ],
)
def test_what_cannot_be_said_is_refused_and_the_socket_lives(talker, fields, message) -> None:
    ear, _ = talker
    assert message in ear.ask("steer", **fields)["message"]
    ear.ask("steer", text="hello")
    ear.until("said", 20)


def test_what_waits_is_limited(serve, client, speech) -> None:
    ear = client(serve(speech=speech), "/sound")
    ear.hello(seed=5)  # and no start: a step that is under way would take words
    answers = [ear.ask("steer", text="a " * 900) for _ in range(4)]
    assert [answer["type"] for answer in answers] == ["done", "done", "refused", "refused"]
    assert re.search("append (the rest|more)", answers[-1]["message"])
    ear.ask("step")
    ear.find(lambda message: message["type"] == "status" and message.get("sound", {}).get("seconds", 0) > 0, 20)
    assert "wait to be spoken already" in ear.ask("steer", text="a " * 990)["message"]
    ear.ask("reset")
    assert ear.ask("steer", text="hello")["type"] == "done"


def test_gaps_that_a_listener_heard_are_counted(talker) -> None:
    ear, running = talker
    ear.ask("steer", text="hello")
    ear.say("heard", underruns=2)
    ear.say("heard", underruns=3)
    ear.find(lambda message: message["type"] == "status" and message.get("sound", {}).get("underruns") == 3)
    assert running.app.state.speech.numbers()["underruns"] == 3
    assert "whole number" in ear.ask("heard", underruns=-1)["message"]


def test_sound_is_not_recorded_as_a_film(talker) -> None:
    ear, _ = talker
    assert "only pictures are recorded" in ear.ask("record")["message"]


def test_a_server_without_speech_has_no_such_socket(serve, client) -> None:
    with pytest.raises(Exception, match=r"HTTP 40[34]"):
        client(serve(), "/sound")


def test_sound_is_drawn_ahead_and_no_further(speech) -> None:
    """The clock of a seat: a second at once, then in real time."""

    class Listener:
        def hear(self, chunk) -> None: ...

        def said(self) -> None: ...

    seat = Seat(
        Speaking(speech),
        Settings(history_seconds=0.0),
        prompt="hello there my friend, how do you do; it is so good to see you",
        seed=0,
        mode="play",
    )
    seat.viewer, now = Listener(), 100.0
    seat.start()
    seat.due = now - seat.ahead
    steps = 0
    while seat.due is not None and seat.due <= now:
        seat.drew(seat.session.step(), now)
        steps += 1
    assert steps == int(AHEAD_SECONDS * speech.rate) + 1
    while seat.ready:
        seat.drew(seat.session.step(), now)
    assert seat.due is None  # the next words come at once again
    seat.close()
