"""All seats of a server: who has one, who waits for one, who has been away for too long. Lives on the event loop."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field, replace
from typing import Any

from .contract import Mode, Saved, Servable, Vault, Viewer
from .engine import Engine
from .protocol import Broken, Close
from .recordings import Recordings
from .seat import Seat
from .settings import Settings

log = logging.getLogger(__name__)
SWEEP_SECONDS = 0.5
GOODBYE_SECONDS = 2.5
PARK_SECONDS = 3.0  # away for so long, a session leaves its place to those who wait, and is kept in memory


@dataclass(frozen=True, slots=True)
class Wish:
    """What a newcomer asked for in its hello."""

    mode: Mode = "play"
    prompt: str | None = None
    seed: int | None = None


@dataclass(eq=False)
class Ticket:
    """A newcomer's turn: `seat` is done when its place is free, or raises what is wrong with the wish."""

    client: Viewer
    wish: Wish
    seat: asyncio.Future[Seat] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    position: int = 0


class Sessions:
    """The seats of one pipeline.

    Args:
        pipe: shared by all.
        settings: limits and times.
        vault: None keeps sessions on this server alone.
    """

    def __init__(self, pipe: Servable, settings: Settings, vault: Vault | None = None) -> None:
        self.pipe, self.settings, self.vault = pipe, settings, vault
        self.engine = Engine(pipe.rate, self._failed)
        total = 2 * settings.max_sessions * settings.recording_bytes
        self.recordings = Recordings(settings.recordings, settings.recording_bytes, total)
        self.seats: list[Seat] = []
        self.waiting: deque[Ticket] = deque()
        self.viewers: set[Viewer] = set()  # every open socket, with a seat or without
        self.opened = self.failures = 0
        self._parked: OrderedDict[str, tuple[float, Saved]] = OrderedDict()  # by secret, until when
        self._parking: dict[Seat, asyncio.Task] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sweeper: asyncio.Task | None = None
        self._closing = False

    async def open(self) -> None:
        """Begin to draw."""
        self._loop = loop = asyncio.get_running_loop()
        self.engine.start()
        if self.vault is not None:
            self.vault.open(lambda secret: loop.call_soon_threadsafe(self._lose, secret))
        self._sweeper = asyncio.create_task(self._sweep_for_ever())

    async def close(self) -> None:
        """Say goodbye to everybody, finish the recordings, end the streams. Harmless twice."""
        self._closing = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
            await asyncio.gather(*self._parking.values(), return_exceptions=True)
        for viewer in list(self.viewers):
            viewer.end(Close.GOING_AWAY, "the server is going away")
        patience = time.monotonic() + GOODBYE_SECONDS
        while self.viewers and time.monotonic() < patience:
            await asyncio.sleep(0.01)
        if self.vault is not None:
            for seat in self.seats:
                await asyncio.wrap_future(self.engine.call(lambda seat=seat: self._hand_over(seat)))
            await asyncio.to_thread(self.vault.close)
            self.vault = None  # from here on it would forget what it has just been given
        for seat in list(self.seats):
            self.close_seat(seat)
        await asyncio.to_thread(self.engine.stop)
        await asyncio.to_thread(self.recordings.close)

    # Coming in.

    def enter(self, client: Viewer, wish: Wish) -> Ticket:
        """Stand in the queue; where a place is free the seat is ready at once.

        Raises:
            Broken: the queue is full, or the server is going away.
        """
        if self._closing:
            raise Broken(Close.GOING_AWAY, "the server is going away")
        if len(self.waiting) >= self.settings.max_waiting:
            raise Broken(Close.TOO_MANY, f"{len(self.waiting)} others are waiting already; come back later")
        ticket = Ticket(client, wish)
        self.waiting.append(ticket)
        self._admit()
        return ticket

    def leave_queue(self, ticket: Ticket) -> None:
        """The newcomer is gone. A seat that it has just got becomes free again."""
        if ticket in self.waiting:
            self.waiting.remove(ticket)
            self._admit()
        elif ticket.seat.done() and not ticket.seat.cancelled() and ticket.seat.exception() is None:
            self.close_seat(ticket.seat.result())
        ticket.seat.cancel()

    def _admit(self) -> None:
        while self.waiting and len(self.seats) < self.settings.max_sessions and not self._closing:
            ticket = self.waiting.popleft()
            try:
                ticket.seat.set_result(self._new_seat(ticket.wish))
            except (ValueError, TypeError) as error:
                ticket.seat.set_exception(error)
        for position, ticket in enumerate(self.waiting, start=1):
            if ticket.position != position:
                ticket.position = position
                ticket.client.queued(position)

    def _new_seat(self, wish: Wish) -> Seat:
        worlds = getattr(self.pipe, "worlds", None)
        prompt = wish.prompt if wish.prompt is not None else (worlds[0] if worlds else "")
        seed = secrets.randbits(32) if wish.seed is None else wish.seed
        seat = Seat(self.pipe, self.settings, prompt=prompt, seed=seed, mode=wish.mode)
        seat.on_moment = None if self.vault is None else self.vault.put
        self.seats.append(seat)
        self.opened += 1
        self.engine.add(seat)
        self.engine.call(seat.find_nearest)
        return seat

    def find(self, secret: str | None) -> Seat | None:
        """The seat that `secret` owns."""
        return next((seat for seat in self.seats if secret and seat.owns(secret)), None)

    async def saved(self, secret: str | None) -> Saved | None:
        """What is kept of a session that has no seat here: parked, or on another server."""
        if not secret:
            return None
        if secret in self._parked:
            return self._parked[secret][1]
        return await self.vault.find(secret) if self.vault is not None else None

    async def revive(self, seat: Seat, saved: Saved) -> None:
        """Let a new seat become what was kept.

        Raises:
            ValueError: it is of another pipeline.
        """
        await asyncio.wrap_future(self.engine.call(lambda: seat.revive(saved)))
        self._parked.pop(saved.secret, None)

    def attach(self, seat: Seat, client: Viewer) -> None:
        """`client` sees this seat from now on. Whoever did so before is told."""
        before, seat.viewer = seat.viewer, client
        seat.touched = time.monotonic()
        if before is not None and before is not client:
            before.end(Close.TAKEN_OVER, "this session goes on in another window")
        self.engine.wake()

    def detach(self, seat: Seat, client: Viewer) -> None:
        """The socket of `client` is gone; the seat waits for it a while."""
        if seat.viewer is client:
            seat.viewer, seat.due, seat.left = None, None, time.monotonic()
            self.engine.call(lambda: self._hand_over(seat))

    def _hand_over(self, seat: Seat) -> None:
        """Let other servers go on from exactly here. Called on the engine's thread."""
        if self.vault is not None and seat in self.seats and not seat.history.too_large:
            self.vault.put(seat.save())

    # Going out.

    def close_seat(self, seat: Seat) -> None:
        """End a session and give its place to the next. Harmless twice."""
        if seat not in self.seats:
            return
        self.seats.remove(seat)
        self.engine.remove(seat)
        if seat.recording is not None:
            asyncio.get_running_loop().run_in_executor(None, seat.recording.finish)
        self.recordings.leave(seat.name)
        if self.vault is not None:
            self.vault.forget(seat.secret)
        if self.engine.alive:
            self.engine.call(seat.close)
        else:
            seat.close()
        self._admit()

    def swap(self, pipe: Servable, model: str, recipe: str, preset: str) -> None:
        """Draw with another pipeline from now on: whoever is here is told, and begins anew. For any thread but ours."""
        assert self._loop is not None
        settings = replace(self.settings, model=model, recipe=recipe, preset=preset)
        asyncio.run_coroutine_threadsafe(self._swap(pipe, settings), self._loop).result()

    async def _swap(self, pipe: Servable, settings: Settings) -> None:
        self.pipe, self.settings = pipe, settings
        self.engine.follow(pipe.rate)
        self._parked.clear()
        for seat in list(self.seats):
            self._drop(seat, Close.GOING_AWAY, f"{settings.model} is loaded now")
        await asyncio.wrap_future(self.engine.call(lambda: None))  # the old streams are closed, their memory is free

    def _drop(self, seat: Seat, code: Close, message: str) -> None:
        viewer, seat.viewer = seat.viewer, None
        self.close_seat(seat)
        if viewer is not None:
            viewer.end(code, message)

    def _lose(self, secret: str) -> None:
        seat = self.find(secret)
        if seat is not None:
            self._drop(seat, Close.TAKEN_OVER, "this session goes on in another window")

    def _failed(self, seat: Seat, error: Exception) -> None:
        """Called on the engine's thread."""
        assert self._loop is not None
        message = f"the stream has failed: {str(error) or type(error).__name__}"
        self._loop.call_soon_threadsafe(self._drop_failed, seat, message)

    def _drop_failed(self, seat: Seat, message: str) -> None:
        self.failures += 1
        self._drop(seat, Close.FAILED, message[:300])

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                self.sweep(time.monotonic())
            except Exception:
                log.exception("sweeping failed; it is tried again")

    def sweep(self, now: float) -> None:
        """Take back the places of those who left or fell asleep."""
        for seat in list(self.seats):
            if seat.viewer is None and now - seat.left > self.settings.grace_seconds:
                self.close_seat(seat)
            elif now - seat.touched > self.settings.idle_seconds:
                self._drop(seat, Close.IDLE, f"nothing was touched for {self.settings.idle_seconds:g} seconds")
        self._make_room(now)
        self.recordings.sweep()

    def _make_room(self, now: float) -> None:
        """Who waits needs a place more than who is away; those can still come back to what is kept of theirs."""
        for secret in [secret for secret, (until, _) in self._parked.items() if until < now]:
            del self._parked[secret]
        away = [seat for seat in self.seats if seat.viewer is None and now - seat.left > PARK_SECONDS]
        for seat in sorted(away, key=lambda seat: seat.left)[: len(self.waiting)]:
            if seat not in self._parking and not seat.history.too_large:
                self._parking[seat] = asyncio.create_task(self._park(seat))

    async def _park(self, seat: Seat) -> None:
        try:
            saved = await asyncio.wrap_future(self.engine.call(seat.save))
            if seat.viewer is None and seat in self.seats:
                self._parked[seat.secret] = (seat.left + self.settings.grace_seconds, saved)
                while len(self._parked) > self.settings.max_sessions:
                    self._parked.popitem(last=False)
                self.close_seat(seat)
        finally:
            del self._parking[seat]

    def numbers(self) -> dict[str, Any]:
        """How the server is doing, for /metrics."""
        return {
            "sessions": len(self.seats),
            "max_sessions": self.settings.max_sessions,
            "watched": sum(seat.viewer is not None for seat in self.seats),
            "waiting": len(self.waiting),
            "opened": self.opened,
            "failures": self.failures,
            "underruns": sum(seat.underruns for seat in self.seats),
            "rounds": self.engine.rounds,
            "steps": self.engine.steps,
            "drawing": self.engine.alive,
        }
