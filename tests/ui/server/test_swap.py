"""Another model, while viewers look on."""

from __future__ import annotations

import threading

import pytest

from millstream.ui.page.memory import MemoryPlan
from millstream.ui.server import swap as swap_module
from millstream.ui.server.swap import Swap


def test_viewers_are_told_and_begin_anew_with_the_other_model(serve, client, fake):
    first, second = fake(rate=50), fake(rate=25)
    running = serve(first, model="first")
    player = client(running)
    resume = player.hello()["resume"]
    player.say("start")
    player.shot()
    player.acks = False  # an acknowledgement after the end would hide the bye
    Swap(lambda: running.sessions, lambda *choice: second)("second", "", "")
    code, bye = player.farewell()
    assert (code, bye["message"]) == (1001, "second is loaded now")
    again = client(running)
    welcome = again.hello(resume=resume)
    assert (welcome["model"], welcome["resumed"], welcome["rate"]) == ("second", False, 25)
    again.say("start")
    again.shot()
    assert first.states == 0, "the old streams have given back what they held"
    assert second.batches


def test_who_waits_goes_on_waiting_and_gets_the_other_model(serve, client, fake):
    running = serve(fake(), model="first", max_sessions=1)
    player = client(running)
    player.hello()
    waiting = client(running)
    waiting.say("hello", protocol=1, mode="play", formats=["jpeg"])
    waiting.until("queued")
    Swap(lambda: running.sessions, lambda *choice: fake())("second", "", "")
    assert waiting.until("welcome")["model"] == "second"


def test_a_model_that_cannot_be_loaded_changes_nothing(serve, client, fake, monkeypatch):
    def load(*choice):
        raise OSError("there is no such model")

    running = serve(fake(), model="first")
    player = client(running)
    player.hello()
    swap = Swap(lambda: running.sessions, load)
    with pytest.raises(OSError, match="no such model"):
        swap("second", "", "")
    monkeypatch.setattr(
        swap_module, "memory_plan", lambda model, *_: MemoryPlan(model, {"all": 9 << 30}, 0, 1 << 30, "a GPU")
    )
    with pytest.raises(ValueError, match="second takes 9216 MB, and 1024 MB are free"):
        swap("second", "", "")
    player.say("start")
    player.shot()
    assert running.sessions.settings.model == "first"


def test_one_model_is_loaded_at_a_time(serve, fake):
    begun, go = threading.Event(), threading.Event()

    def load(*choice):
        begun.set()
        go.wait(10)
        return fake()

    running = serve(fake())
    swap = Swap(lambda: running.sessions, load)
    slow = threading.Thread(target=swap, args=("second", "", ""))
    slow.start()
    begun.wait(10)
    with pytest.raises(ValueError, match="another model is being loaded"):
        swap("third", "", "")
    go.set()
    slow.join(10)
    assert running.sessions.settings.model == "second"
