"""The last moment of every session, shared by several servers: an actor that keeps it, and each server's end of it."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Lock, Thread
from typing import Any

from .contract import Saved
from .history import size_of

log = logging.getLogger(__name__)
BEAT_SECONDS = 0.5
KEPT_BYTES = 4 * 2**30


class Keeper:
    """Holds the last moment of every session of all replicas. Runs as a Ray actor, one call at a time.

    Args:
        patience: seconds without a sign of the owner after which a session is given up.
        limit: bytes that all moments may take; the ones that were heard of longest ago go first.
    """

    def __init__(self, patience: float, limit: int = KEPT_BYTES) -> None:
        self._patience, self._limit = patience, limit
        self._kept: dict[str, tuple[str, float, Saved]] = {}  # secret -> owner, last sign, moment

    def put(self, owner: str, saved: Saved) -> None:
        """A newer moment. What another replica has claimed meanwhile stays as it is."""
        before = self._kept.pop(saved.secret, None)
        if before is not None and before[0] != owner:
            self._kept[saved.secret] = before
            return
        self._kept[saved.secret] = (owner, time.monotonic(), saved)
        total = sum(size_of(saved.snapshot) for _, _, saved in self._kept.values())
        while total > self._limit and len(self._kept) > 1:
            total -= size_of(self._kept.pop(next(iter(self._kept)))[2].snapshot)

    def beat(self, owner: str, held: list[str]) -> list[str]:
        """A replica is alive and holds these; returns those that aren't its own any more."""
        now, lost = time.monotonic(), []
        for secret in held:
            entry = self._kept.get(secret)
            if entry is not None and entry[0] == owner:
                self._kept[secret] = (owner, now, entry[2])
            elif entry is not None:
                lost.append(secret)
        for secret in [secret for secret, entry in self._kept.items() if now - entry[1] > self._patience]:
            del self._kept[secret]
        return lost

    def claim(self, owner: str, secret: str) -> Saved | None:
        """`owner` goes on with this session from now on."""
        entry = self._kept.get(secret)
        if entry is None:
            return None
        self._kept[secret] = (owner, time.monotonic(), entry[2])
        return entry[2]

    def forget(self, owner: str, secret: str) -> None:
        """The session has ended where it was."""
        entry = self._kept.get(secret)
        if entry is not None and entry[0] == owner:
            del self._kept[secret]

    def numbers(self) -> dict[str, int]:
        """How much is kept."""
        return {
            "sessions": len(self._kept),
            "bytes": sum(size_of(saved.snapshot) for _, _, saved in self._kept.values()),
            "replicas": len({owner for owner, _, _ in self._kept.values()}),
        }


class RayVault:
    """A replica's end of the keeper (see `Vault`). A thread of its own sends the newest moments and the heartbeat, so
    neither the engine nor the event loop ever waits for Ray.

    Args:
        keeper: handle of the `Keeper` actor.
        get: `ray.get`.
        trouble: what Ray raises while the actor is away. It is started again, empty, and filled by the next moments.
    """

    def __init__(self, keeper: Any, get: Callable[..., Any], trouble: type[Exception]) -> None:
        self.owner = secrets.token_hex(8)
        self._keeper, self._get, self._trouble = keeper, get, trouble
        self._newest: dict[str, Saved] = {}
        self._held: set[str] = set()
        self._lock = Lock()
        self._stopping = Event()
        self._lose: Callable[[str], object] = lambda secret: None
        self._thread = Thread(target=self._run, name="millstream-vault", daemon=True)

    def open(self, lose: Callable[[str], object]) -> None:
        self._lose = lose
        self._thread.start()

    def close(self) -> None:
        """Send what is left, so that other replicas can go on from there."""
        self._stopping.set()
        self._thread.join()
        with suppress(self._trouble):
            self._get(self._send())

    def put(self, saved: Saved) -> None:
        with self._lock:
            self._newest[saved.secret] = saved
            self._held.add(saved.secret)

    async def find(self, secret: str) -> Saved | None:
        try:
            saved = await self._keeper.claim.remote(self.owner, secret)
        except self._trouble as error:
            log.warning("the keeper of moments can't be reached: %s", error)
            return None
        if saved is not None:
            with self._lock:
                self._held.add(secret)
        return saved

    def forget(self, secret: str) -> None:
        with self._lock:
            self._held.discard(secret)
            self._newest.pop(secret, None)
        self._keeper.forget.remote(self.owner, secret)

    def _run(self) -> None:
        while not self._stopping.wait(BEAT_SECONDS):
            try:
                self._beat()
            except self._trouble as error:
                log.warning("the keeper of moments can't be reached: %s", error)

    def _beat(self) -> None:
        self._send()
        with self._lock:
            held = list(self._held)
        for secret in self._get(self._keeper.beat.remote(self.owner, held)):
            with self._lock:
                self._held.discard(secret)
            self._lose(secret)

    def _send(self) -> list[Any]:
        with self._lock:
            newest, self._newest = self._newest, {}
        return [self._keeper.put.remote(self.owner, saved) for saved in newest.values()]
