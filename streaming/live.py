"""The live loop: newest input in, steps, output in order.

    source thread -> Latest -> session thread -> Bounded(1) -> sink, on the caller's thread

The sink runs where the caller is, because windows want the main thread and Ctrl-C arrives there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from threading import Event, Thread
from typing import Any

from .fit import fit
from .mailbox import Bounded, Closed, Latest
from .metrics import Ended, Metrics
from .session import Session
from .threads import rest
from .types import Chunk, EndOfStream, Frame, Sink, Source

POLL_SECONDS = 0.002  # how long a source with nothing new rests
WAKE_SECONDS = 0.05  # how often a waiting thread looks whether it is time to stop
WAITING_SOUNDS = 64  # blocks of a microphone that may wait for a slow step
AHEAD_SECONDS = 0.4  # of sound, beyond what was delivered and played
FAREWELL_SECONDS = 2.0  # a source that is stuck in `read` is left to close itself after this


def live(
    source: Source | None,
    session: Session[Any, Any],
    sink: Sink,
    *,
    until: float | Callable[[], bool] | None = None,
) -> Metrics:
    """Run `session` on `source` into `sink` until one of them ends, `until` says so, or Ctrl-C.

    With a source, each step answers the newest frame and older ones are dropped, so a camera that is faster than the
    model never builds a queue; pictures are fitted (`fit`) to the size of a pipeline that has one. A pipeline that
    draws several pictures at once (`pictures_per_chunk`) gets the newest so many, at its own rate, since it takes them
    for so far apart. Without a source, steps are paced to the rate of the stream and begin as late as they may, so that
    each reads the newest control; sound is made `AHEAD_SECONDS` before it is due, for a late frame is forgiven and a
    gap in sound is not.

    Args:
        source: read on a thread of its own and closed there (one whose `kind` is "audio" loses nothing); None for a
            stream that needs no input, which ends when its session has `ended`.
        session: stepped on a thread of its own; it stays open and may go on afterwards.
        sink: written and closed on the calling thread; it ends the stream by raising `EndOfStream`. One that `paces` by
            waiting in `write`, as a speaker does, is the clock instead of ours.
        until: seconds from now, or a callable that is asked often and returns True to stop.

    Returns:
        `session.metrics`, whose `ended` says why: "source", "sink", "until" or "interrupt".

    Raises:
        ValueError: `until` is not a positive number of seconds.
        Exception: whatever source, session or sink raised. Source and sink are closed all the same, once.
    """
    return _Loop(source, session, sink).run(until)


class _Loop:
    def __init__(self, source: Source | None, session: Session[Any, Any], sink: Sink) -> None:
        self.source, self.session, self.sink = source, session, sink
        together = pictures_per_chunk(session.pipeline)
        hears = getattr(source, "kind", "video") == "audio"
        self.inbox: Latest[Frame] | Bounded[Frame] = Bounded(WAITING_SOUNDS) if hears else Latest(together)
        self.thin = Thin(session.pipeline.rate if together > 1 else None)
        self.outbox: Bounded[Sequence[Chunk]] = Bounded(1)
        self.stopping = Event()
        self.errors: list[BaseException] = []
        self.drawer = Thread(target=self._guarded, args=(self._draw,), name="millstream-session", daemon=True)
        self.reader = Thread(target=self._guarded, args=(self._capture,), name="millstream-source", daemon=True)

    def run(self, until: float | Callable[[], bool] | None) -> Metrics:
        for part in (lambda: self._work(until), self._halt, self.sink.close):
            self._guarded(part)
        if self.errors:
            raise self.errors[0]  # the first is the cause, what follows are its consequences
        return self.session.metrics

    def _guarded(self, part: Callable[[], object]) -> None:
        try:
            part()
        except BaseException as error:
            self.errors.append(error)

    def _work(self, until: float | Callable[[], bool] | None) -> None:
        stop = _stop_condition(until)
        self.session.metrics.ended = None
        rest()
        self.drawer.start()
        if self.source is not None:
            self.reader.start()
        try:
            ended = self._deliver(stop)
        except KeyboardInterrupt:
            self._stop()
            self._deliver(lambda: False)
            ended = "interrupt"
        except EndOfStream:
            ended = "sink"
        self.session.metrics.ended = ended

    def _capture(self) -> None:
        assert self.source is not None
        try:
            while not self.stopping.is_set():
                frame = self.source.read()
                if frame is None:
                    self.stopping.wait(POLL_SECONDS)
                elif self.thin.keeps(frame.time):
                    self.inbox.put(self._fitted(frame))
        except (EndOfStream, Closed):
            pass
        finally:
            self.inbox.close()
            self.source.close()  # here, because closing a camera under a running read crashes drivers

    def _fitted(self, frame: Frame) -> Frame:
        """A picture as the pipeline takes it; here, because the source's thread has the time."""
        size = getattr(self.session.pipeline, "size", None)
        return frame if size is None else frame._replace(data=fit(frame.data, size))

    def _draw(self) -> None:
        metrics = self.session.metrics
        dropped_before = metrics.dropped
        pace = _Pace(held_by_sink=getattr(self.sink, "paces", False))
        try:
            for media in self.inbox if self.source is not None else pace.beats(self.stopping):
                if self.stopping.is_set():
                    break
                chunks = self.session.step(media)
                metrics.dropped = dropped_before + (self.inbox.dropped if isinstance(self.inbox, Latest) else 0)
                pace.drew(chunks)
                self.outbox.put(chunks)
                if self.session.ended and self.source is None:
                    break
            self.outbox.put(self.session.flush())
        except Closed:
            pass  # the sink is gone, so nobody waits for the last frames
        finally:
            self.outbox.close()

    def _deliver(self, stop: Callable[[], bool]) -> Ended:
        ended: Ended = "source"
        while True:
            if ended == "source" and stop():
                ended = "until"
                self._stop()
            try:
                chunks = self.outbox.get(WAKE_SECONDS)
            except TimeoutError:
                continue
            except Closed:
                return ended
            for chunk in chunks:
                self.sink.write(chunk)
                self.session.metrics.delivered(chunk)

    def _stop(self) -> None:
        self.stopping.set()
        self.inbox.close()

    def _halt(self) -> None:
        self._stop()
        self.outbox.close()
        if self.drawer.ident is not None:
            self.drawer.join()
        if self.reader.ident is not None:
            self.reader.join(FAREWELL_SECONDS)
        elif self.source is not None:
            self.source.close()  # its thread, which would have, was never started


def pictures_per_chunk(pipeline: object) -> int:
    """How many pictures of an input a step of `pipeline` answers together: 1 unless it says otherwise."""
    return getattr(pipeline, "pictures_per_chunk", 1)


class Thin:
    """Leaves out frames that come faster than `rate`; None keeps all.

    Frames at that very rate come now a little early, now a little late, and are all kept.
    """

    def __init__(self, rate: float | None) -> None:
        self._period = 0.0 if rate is None else 1.0 / rate
        self._due = -math.inf

    def keeps(self, when: float) -> bool:
        """Is the frame captured at `when` (seconds) one of those that are kept?"""
        if when < self._due - self._period / 2:
            return False
        self._due = max(self._due, when - self._period) + self._period
        return True


class _Pace:
    """Begins each step when the last one's media has played; lateness up to one step's media is made up for."""

    def __init__(self, *, held_by_sink: bool) -> None:
        self._due = time.monotonic()
        self._ahead = math.inf if held_by_sink else 0.0

    def beats(self, stopping: Event) -> Iterator[None]:
        while not stopping.wait(max(0.0, self._due - self._ahead - time.monotonic())):
            yield None

    def drew(self, chunks: Sequence[Chunk]) -> None:
        lengths = dict.fromkeys((chunk.kind for chunk in chunks), 0.0)
        for chunk in chunks:
            count = len(chunk.data) if chunk.kind == "video" else chunk.data.shape[-1]
            lengths[chunk.kind] += count / chunk.rate
        if "audio" in lengths:
            self._ahead = max(self._ahead, AHEAD_SECONDS)
        seconds = max(lengths.values(), default=0.0)
        self._due = max(self._due + seconds, time.monotonic() - seconds)


def _stop_condition(until: float | Callable[[], bool] | None) -> Callable[[], bool]:
    if until is None:
        return lambda: False
    if callable(until):
        return until
    if not (isinstance(until, (int, float)) and until > 0):
        raise ValueError(f"until must be a positive number of seconds or a callable, got {until!r}")
    end = time.monotonic() + until
    return lambda: time.monotonic() >= end
