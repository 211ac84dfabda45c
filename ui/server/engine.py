"""The thread that draws: all sessions of one pipeline that have something to draw step together.

Everything that touches the model happens here, so requests to save, restore or reset a stream are run between steps.
A session that fails is named and taken out; the others of its step are drawn again without it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Condition, Thread
from typing import Any

from ...streaming import Frame, step_together
from ...streaming.threads import rest
from .seat import Seat

log = logging.getLogger(__name__)
SHARE = 0.25  # of the engine's time that what one seat asks for between two steps may take
TOGETHER = 0.25  # of a frame: sessions due within it of one another share a step


class Engine:
    """Steps seats until it is stopped.

    A paced seat is due when its last step's media has played. A new one joins the beat of those that run, and one that
    fell out of step (a stream's first chunk may be shorter) waits once for the others, so that all go through the model
    together. Alone, a seat that has just been steered is stepped at once, though never more than one step ahead of its
    time: the picture comes sooner, the rate stays. Camera seats are due as soon as a picture is there.

    Every round steps each seat that is due exactly once, so none can take another's turn; nor by what it asks for in
    between: that is done one thing a round, and then the seat waits three times as long as it took.

    Args:
        rate: frames per second of the stream.
        failed: called on this thread with a seat that can't go on, and why.

    Attributes:
        rounds, steps: rounds so far, and seats stepped in them.
    """

    def __init__(self, rate: float, failed: Callable[[Seat, Exception], None]) -> None:
        self.rounds = self.steps = 0
        self.follow(rate)
        self._failed = failed
        self._seats: list[Seat] = []
        self._calls: dict[Seat | None, deque[tuple[Callable[[], Any], Future]]] = {}
        self._changed = Condition()
        self._stopping = False
        self._nudged = False
        self._thread = Thread(target=self._run, name="millstream-engine", daemon=True)

    def follow(self, rate: float) -> None:
        """The frames of what is drawn come at `rate` from now on."""
        self._slack = TOGETHER / rate

    def start(self) -> None:
        rest()
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """End after the running step and the calls that wait already."""
        self._stopping = True
        self.wake()
        if self._thread.ident is not None:
            self._thread.join()

    def wake(self) -> None:
        """Something has changed: look again."""
        with self._changed:
            self._nudged = True
            self._changed.notify()

    def add(self, seat: Seat) -> None:
        with self._changed:
            self._seats = [*self._seats, seat]

    def remove(self, seat: Seat) -> None:
        """From the next round on. Harmless twice."""
        with self._changed:
            self._seats = [other for other in self._seats if other is not seat]

    def call(self, function: Callable[[], Any], seat: Seat | None = None) -> Future:
        """Run `function` on the engine's thread, between two steps. What a `seat` asked for waits for its turn."""
        future: Future = Future()
        with self._changed:
            self._calls.setdefault(seat, deque()).append((function, future))
        self.wake()
        return future

    def _run(self) -> None:
        while not self._stopping:
            self._nudged = False
            self._run_calls()
            now = time.monotonic()
            ready, next_due = self._look(now)
            if ready:
                self.rounds += 1
                self.step(self._take(ready))
            else:
                times = [when for when in (next_due, self._next_call()) if when is not None]
                self._rest(min(times) - now if times else None)
        while self._calls:  # sessions that were closed just before the end give back what they hold
            self._run_calls(ended=True)

    def _run_calls(self, ended: bool = False) -> None:
        """All that the server wants, and one thing for each seat whose turn it is."""
        now = time.monotonic()
        with self._changed:
            turns = [seat for seat in self._calls if seat is None or ended or seat.next_call <= now]
        for seat in turns:
            while self._run_call(seat) and seat is None:
                pass

    def _next_call(self) -> float | None:
        """When the next thing that a seat asked for may be done."""
        with self._changed:
            return min((seat.next_call for seat in self._calls if seat is not None), default=None)

    def _run_call(self, seat: Seat | None) -> bool:
        """Run the oldest call of `seat`. Is there another?"""
        with self._changed:
            waiting = self._calls[seat]
            function, future = waiting.popleft()
            if not waiting:
                del self._calls[seat]
        start = time.monotonic()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
        if seat is not None:
            end = time.monotonic()
            seat.next_call = end + (end - start) * (1 / SHARE - 1)
        return bool(waiting)

    def _look(self, now: float) -> tuple[list[Seat], float | None]:
        """Seats to step now, or else when the next is due."""
        waiting = [seat for seat in self._seats if seat.ready]
        paced = [seat for seat in waiting if seat.paced]
        beat = min((seat.due for seat in paced if seat.due is not None and seat.due > now), default=now)
        for seat in paced:
            seat.due = beat - seat.ahead if seat.due is None else seat.due
        hurried = [seat for seat in paced if len(paced) == 1 and seat.hurried(now)]
        ready = [seat for seat in waiting if not seat.paced or (seat.due or 0) <= now or seat in hurried]
        if not ready:
            return [], min((seat.due for seat in paced if seat.due is not None), default=None)
        soon = [seat for seat in paced if seat not in ready and (seat.due or 0) <= now + self._slack]
        return ready + soon, None

    def _rest(self, seconds: float | None) -> None:
        with self._changed:
            if not self._nudged and not self._stopping:
                self._changed.wait(seconds)

    def _take(self, ready: Sequence[Seat]) -> list[tuple[Seat, Frame | None]]:
        pairs = []
        for seat in ready:
            try:
                pairs.append((seat, seat.take()))
            except Exception as error:
                self._fail(seat, error)
        return pairs

    def step(self, pairs: Sequence[tuple[Seat, Frame | None]]) -> None:
        """Step these seats together; if that fails, each alone, and take out those that fail again."""
        try:
            drawn = step_together([seat.session for seat, _ in pairs], [media for _, media in pairs])
        except Exception as error:
            if len(pairs) == 1:
                return self._fail(pairs[0][0], error)
            for pair in pairs:
                self.step([pair])
            return
        now = time.monotonic()
        for (seat, _), chunks in zip(pairs, drawn, strict=True):
            self.steps += 1
            try:
                seat.drew(chunks, now)
            except Exception as error:
                self._fail(seat, error)
        for seat, _ in pairs:
            self._align(seat)

    def _align(self, seat: Seat) -> None:
        """Put a seat off until another's turn, if that comes less than half a step later."""
        due, reach = seat.due, seat.step_seconds / 2
        others = [other.due for other in self._seats if other is not seat and other.ready and other.paced]
        beats = [beat for beat in others if beat is not None and due is not None and due < beat <= due + reach]
        if beats:
            seat.due = min(beats)

    def _fail(self, seat: Seat, error: Exception) -> None:
        log.error("session %s has failed", seat.name, exc_info=error)
        self.remove(seat)
        self._failed(seat, error)
