"""A session: one running stream of a pipeline. Steered from any thread, stepped from one.

The pipeline stays as it was; everything that changes is one state object that the session owns. So sessions of one
pipeline never touch each other, and a session can be saved, put back and forked.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from threading import Lock
from types import TracebackType
from typing import Any, Generic

import torch
from torch import Tensor

from .metrics import Metrics
from .snapshot import Snapshot, control_fields, control_from
from .types import Chunk, ControlT, Frame, State, Streamable


class Session(Generic[State, ControlT]):
    """One endless stream. Nothing is computed before the first step.

    Args:
        pipeline: draws the stream; see `Streamable`.
        control: what the stream starts under.
        generator: gives the stream its seed; the same generator state and controls give the same frames.

    Iterating yields single frames [3, H, W] in [0, 1] without end (from a pipeline of sound: blocks
    [channels, samples], until it has `ended`); `chunks` yields them as drawn, with their times and control versions.
    """

    def __init__(
        self,
        pipeline: Streamable[State, ControlT],
        control: ControlT,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        pipeline.check(control)
        self.pipeline = pipeline
        self.metrics = Metrics()
        self._generator = generator
        self._control = control
        self._unread: ControlT | None = control
        self._applied = control.version
        self._steering = Lock()  # held for moments only, so that `steer` never waits for a step
        self._stepping = Lock()  # refuses a second stepping thread
        self._owning = Lock()  # whoever reads or replaces the state; a snapshot waits here for the step to end
        self._states: list[State] = []  # none or one; a list, because the finalizer must not hold the session itself
        self._finalizer = weakref.finalize(self, _end, pipeline, self._states)
        self._finalizer.atexit = False

    @property
    def control(self) -> ControlT:
        """The control as last steered: keys that are down now, and movement that came with the last `steer`."""
        return self._control

    @property
    def applied(self) -> int:
        """Version of the last control that a step has read."""
        return self._applied

    @property
    def state(self) -> State | None:
        """The pipeline's state, to look at; None before the first step."""
        return self._states[0] if self._states else None

    def steer(self, **changes: Any) -> int:
        """Change fields of the control from any thread; the next step reads it. Returns the new control's version.

        Between two steps nothing is lost: mouse movement adds up, and a key that was pressed and let go still counts.

        Raises:
            TypeError, ValueError: a change is unknown or not valid. Nothing has changed then.
        """
        while True:
            before = self._control
            steered = before.held().changed(**changes)
            self.pipeline.check(steered)  # which may read a prompt; no step waits for that
            with self._steering:
                if self._control is before:  # nobody else has steered meanwhile
                    self._unread = steered if self._unread is None else self._unread.merged(steered)
                    self._control = steered
                    return steered.version

    def _read_control(self) -> ControlT:
        with self._steering:
            control = self._control.held() if self._unread is None else self._unread
            self._unread = None
            return control

    @property
    def steered(self) -> bool:
        """Is there a control that no step has read yet?"""
        return self._unread is not None

    @property
    def ended(self) -> bool:
        """Is everything said that was asked for? Never true of an endless stream; steering may go on from here."""
        ended = getattr(self.pipeline, "ended", None)
        return ended is not None and bool(self._states) and self._unread is None and ended(self._states[0])

    def step(self, media: Frame | None = None) -> Sequence[Chunk]:
        """Draw what comes next, answering `media` if given. May be empty while a codec fills.

        Raises:
            RuntimeError: the session is closed, or another thread is stepping it.
        """
        return step_together([self], [media])[0]

    def chunks(self) -> Iterator[Chunk]:
        """Chunks as they are drawn, until the session is closed or has `ended`."""
        yield from self.step()
        while self._finalizer.alive and not self.ended:
            yield from self.step()

    def __iter__(self) -> Iterator[Tensor]:
        for chunk in self.chunks():
            if chunk.kind == "video":
                yield from chunk.data
            else:
                yield chunk.data

    def flush(self) -> Sequence[Chunk]:
        """The last chunks, which the codec still holds. The stream is over: `reset`, `restore` or `close` it next."""
        with self._owning:
            self._check_open()
            return self.pipeline.flush(self._states[0]) if self._states else ()

    def reset(self) -> None:
        """Begin anew under the current control, with the generator's next seed. Waits for a running step.

        What was only for the next step (mouse movement, words to speak) is forgotten with the stream.
        """
        with self._owning:
            self._check_open()
            _end(self.pipeline, self._states)
            with self._steering:
                self._unread = self._control.held()

    def _begun(self) -> State:
        self._check_open()
        if not self._states:
            self._states.append(self.pipeline.begin(self._control.held(), generator=self._generator))
        return self._states[0]

    def snapshot(self) -> Snapshot:
        """The session as it is now; it may go on. Waits for a running step. Begins the stream if no step has."""
        with self._owning:
            leaves = self.pipeline.save(self._begun())
            with self._steering:
                control, unread = self._control, self._unread
        waiting = None if unread is None else control_fields(unread)
        return Snapshot(leaves, control_fields(control), waiting, type(control).__name__)

    def restore(self, snapshot: Snapshot) -> None:
        """Put `snapshot` back: the same controls from here on draw the same frames. Waits for a running step.

        Control versions only rise in the life of a session, so a restored control may get a new one.

        Raises:
            ValueError: the snapshot is of another pipeline or kind of control. The session goes on as it was.
        """
        control = control_from(snapshot.control, snapshot.kind, self._control)
        unread = None if snapshot.unread is None else control_from(snapshot.unread, snapshot.kind, self._control)
        for restored in (control, unread):
            if restored is not None:
                self.pipeline.check(restored)
        with self._owning:
            self._check_open()
            state = self.pipeline.load(snapshot.leaves)
            _end(self.pipeline, self._states)
            self._states.append(state)
            with self._steering:
                if control != self._control and control.version <= self._control.version:
                    control = replace(control, version=self._control.version + 1)
                self._control = control
                self._unread = None if unread is None else replace(unread, version=control.version)

    def fork(self) -> Session[State, ControlT]:
        """A second session that goes on from here on its own: the same controls draw the same frames in both."""
        twin = self._twin(None if self._generator is None else self._generator.clone_state())
        twin.restore(self.snapshot())
        return twin

    def _twin(self, generator: torch.Generator | None) -> Session[State, ControlT]:
        """A session like this one that has not begun."""
        return Session(self.pipeline, self._control, generator=generator)

    def close(self) -> None:
        """Give the pipeline back what the session holds. Waits for a running step; harmless twice."""
        with self._owning:
            self._finalizer()

    def __enter__(self) -> Session[State, ControlT]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("this session is closed; open another one on the pipeline")


def step_together(
    sessions: Sequence[Session[State, ControlT]], media: Sequence[Frame | None] | None = None
) -> Sequence[Sequence[Chunk]]:
    """Step several sessions of one pipeline in one `advance`: what a server does to fill the machine.

    Each session draws exactly what it would have drawn alone.

    Args:
        sessions: distinct open sessions of one pipeline.
        media: one frame (or None) per session; None stands for none at all.

    Returns:
        Each session's chunks, in order.

    Raises:
        ValueError: sessions of different pipelines, one session twice, or not as many `media` as sessions.
        RuntimeError: a session is closed or being stepped by another thread. No session has moved then.
    """
    media = [None] * len(sessions) if media is None else media
    _check_companions(sessions, media)
    if not sessions:
        return []
    with ExitStack() as locks:
        for session in sessions:
            if not session._stepping.acquire(blocking=False):
                raise RuntimeError("another thread is stepping this session; step from one thread, steer from any")
            locks.callback(session._stepping.release)
        for session in sessions:
            locks.enter_context(session._owning)
        start = time.monotonic()
        states = [session._begun() for session in sessions]
        controls = [session._read_control() for session in sessions]
        drawn = sessions[0].pipeline.advance(states, controls, media)
        _wait_until_drawn(drawn)
        for session, control, chunks in zip(sessions, controls, drawn, strict=True):
            session._applied = control.version
            session.metrics.stepped(start, chunks, control.version)
        return drawn


def _check_companions(sessions: Sequence[Session[State, ControlT]], media: Sequence[Frame | None]) -> None:
    if len(media) != len(sessions):
        raise ValueError(f"got {len(media)} media for {len(sessions)} sessions; give one frame or None for each")
    if len({id(session) for session in sessions}) < len(sessions):
        raise ValueError("a session stands in the list twice; it can only step once at a time")
    if len({id(session.pipeline) for session in sessions}) > 1:
        raise ValueError("the sessions belong to different pipelines; only sessions of one pipeline step together")


def _wait_until_drawn(drawn: Sequence[Sequence[Chunk]]) -> None:
    """A GPU is still working when `advance` returns; without waiting, step times and frame ages would be fiction."""
    for chunks in drawn:
        for chunk in chunks:
            if chunk.data.is_cuda:
                torch.cuda.current_stream(chunk.data.device).synchronize()


def _end(pipeline: Streamable[State, Any], states: list[State]) -> None:
    while states:
        pipeline.end(states.pop())
