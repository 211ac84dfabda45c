"""What several servers share of their sessions: the newest moment, and who goes on with it."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from millstream.streaming import Snapshot
from millstream.ui.server.contract import Saved
from millstream.ui.server.keeper import Keeper, RayVault


def saved(secret: str = "s", frame: int = 0, floats: int = 4) -> Saved:
    snapshot = Snapshot({"memory": torch.zeros(floats)}, {"prompt": "x", "version": 0}, None, "WorldControl")
    return Saved(snapshot, secret, "play", 1, True, frame, ())


def test_a_moment_is_kept_and_the_newest_wins():
    keeper = Keeper(10)
    keeper.put("a", saved(frame=1))
    keeper.put("a", saved(frame=2))
    assert keeper.claim("b", "s").frame == 2
    assert keeper.claim("b", "another") is None


def test_what_another_has_taken_over_can_t_be_overwritten_or_forgotten():
    keeper = Keeper(10)
    keeper.put("a", saved(frame=1))
    keeper.claim("b", "s")
    keeper.put("a", saved(frame=5))
    keeper.forget("a", "s")
    assert keeper.beat("a", ["s"]) == ["s"]
    assert keeper.beat("b", ["s"]) == []
    assert keeper.claim("c", "s").frame == 1


def test_the_sessions_of_a_dead_server_wait_for_their_viewers_and_then_go():
    keeper = Keeper(0.1)
    keeper.put("a", saved("kept"))
    keeper.put("a", saved("dead"))
    for _ in range(4):
        time.sleep(0.04)
        keeper.beat("a", ["kept"])
    assert keeper.numbers()["sessions"] == 1
    assert keeper.claim("b", "dead") is None


def test_memory_has_a_limit_and_the_oldest_goes_first():
    keeper = Keeper(10, limit=3000)
    for name in ("one", "two", "three"):
        keeper.put("a", saved(name, floats=300))
    assert keeper.numbers() == {"sessions": 2, "bytes": 2400, "replicas": 1}
    assert keeper.claim("b", "one") is None


class Handle:
    """An actor handle, without Ray."""

    def __init__(self, keeper: Keeper) -> None:
        for name in ("put", "beat", "claim", "forget"):
            setattr(self, name, SimpleNamespace(remote=self._remote(getattr(keeper, name))))

    @staticmethod
    def _remote(method):
        class Answer(SimpleNamespace):
            def __await__(self):
                yield from ()
                return self.value

        return lambda *arguments: Answer(value=method(*arguments))


@pytest.fixture
def vaults():
    """Two servers' ends of one keeper."""
    keeper = Keeper(10)

    def get(answer):
        return [each.value for each in answer] if isinstance(answer, list) else answer.value

    made = [RayVault(Handle(keeper), get, ConnectionError) for _ in range(2)]
    yield made
    for vault in made:
        vault.close()


def test_a_server_learns_that_its_session_has_gone_elsewhere(vaults, eventually, run_async):
    first, second = vaults
    lost: list[str] = []
    first.open(lost.append)
    second.open(lambda secret: pytest.fail("it has just taken it"))
    for frame in range(5):
        first.put(saved(frame=frame))
    assert run_async(second.find("s")) is None, "nothing was sent yet"
    eventually(lambda: run_async(second.find("s")) is not None)
    eventually(lambda: lost == ["s"])


def test_what_is_put_last_is_sent_before_the_end(vaults, run_async):
    first, second = vaults
    for vault in vaults:
        vault.open(lambda secret: None)
    first.put(saved(frame=9))
    first.close()
    assert run_async(second.find("s")).frame == 9


def test_a_keeper_that_is_away_costs_a_moment_and_no_session(eventually):
    away = True
    keeper = Keeper(10)

    def get(answer):
        if away:
            raise ConnectionError("the actor is starting again")
        return [each.value for each in answer] if isinstance(answer, list) else answer.value

    vault = RayVault(Handle(keeper), get, ConnectionError)
    vault.open(lambda secret: None)
    vault.put(saved(frame=1))
    time.sleep(1.2)
    away = False
    vault.put(saved(frame=2))
    eventually(lambda: "s" in keeper._kept and keeper._kept["s"][2].frame == 2)
    vault.close()


def test_two_servers_hand_a_session_over(serve, client, fake, eventually):
    """The same through sockets: what one server has drawn goes on at the other."""
    from millstream.ui.server.app import create_app
    from millstream.ui.server.settings import Settings

    keeper = Keeper(10)

    def get(answer):
        return [each.value for each in answer] if isinstance(answer, list) else answer.value

    running = [serve(fake(rate=100), vault=RayVault(Handle(keeper), get, ConnectionError)) for _ in range(2)]
    assert create_app(fake(), Settings()).state.sessions.vault is None
    player = client(running[0])
    secret = player.hello(seed=9)["resume"]
    player.say("start")
    version = player.ask("steer", prompt="a slime arena")["version"]
    player.shot(lambda shot: shot.frame > 150 and shot.version >= version)
    eventually(lambda: keeper.numbers()["sessions"] == 1)

    moved = client(running[1])
    welcome = moved.hello(resume=secret)
    assert welcome["resumed"] is True
    assert welcome["resume"] == secret
    assert welcome["prompt"] == "a slime arena"
    assert welcome["seed"] == 9
    moved.shot()
    assert running[1].sessions.seats[0].session.state.frame > 90
    assert player.farewell()[0] == 4409
    eventually(lambda: not running[0].sessions.seats)
    assert client(running[1]).hello()["resumed"] is False
