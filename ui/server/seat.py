"""One viewer's stream on the server: what runs, what it remembers, where its pictures go.

The event loop steers it and says start and pause; the engine's thread does everything that touches the stream itself.
A seat outlives its socket: who comes back with the secret goes on where the stream stood.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...streaming import Chunk, Control, Frame, Latest, Snapshot
from ...streaming.live import pictures_per_chunk
from ...streaming.types import MAX_TEXT_CHARACTERS
from .contract import Mode, Picture, Saved, Servable, Viewer
from .history import History, parked, size_of
from .recordings import Recording
from .settings import Settings

REMEMBERED_TIMES = 64  # camera pictures that may be inside the pipeline at once
MOST_STEPS_OWED = 32
AHEAD_SECONDS = 1.0  # of sound that is sent before it is due: a gap in it is not forgiven, unlike a late picture


class Seat:
    """A stream and its viewer.

    Args:
        pipe: draws.
        prompt, seed: what the stream starts from.
        mode: "play" is paced to the stream's rate, "camera" answers pictures as they come.

    Attributes:
        name: what the server calls it, in logs and folders. No secret.
        secret: whoever has it owns the seat.
        session: the stream; steer it from any thread.
        inbox: camera pictures for the next step, or for the next few of a pipeline that answers several at once; the
            newest win.
        due: monotonic second of the next step; None until the engine has found a beat to join.
        ahead: seconds of media that are drawn before they are due.
        underruns: gaps in the sound that the viewer has heard.
    """

    def __init__(self, pipe: Servable, settings: Settings, *, prompt: str, seed: int, mode: Mode) -> None:
        self.pipe, self.settings, self.seed = pipe, settings, seed
        self.mode: Mode = mode
        self._generator = torch.Generator().manual_seed(seed)
        self.session = pipe.stream(prompt, generator=self._generator)
        self.name = secrets.token_hex(6)
        self.secret = secrets.token_urlsafe(24)
        self.inbox: Latest[Frame] = Latest(pictures_per_chunk(pipe))
        self.viewer: Viewer | None = None
        self.recording: Recording | None = None
        self.due: float | None = None
        self.next_call = 0.0  # monotonic second from which the engine does what this seat asks for
        self.ahead = AHEAD_SECONDS if hasattr(pipe, "sampling_rate") else 0.0
        self.underruns = 0
        self.running = False
        self.frame = 0
        self.position = 0.0  # seconds of the stream that are drawn
        self.step_seconds = 0.0  # of media that the last step has drawn
        self._played = 0.0  # monotonic second at which the last chunk will have been shown
        self.touched = self.left = time.monotonic()
        self.on_moment: Callable[[Saved], None] | None = None
        self.nearest: tuple[str, float] | None = None
        self.timeline: tuple[dict[str, Any], ...] = ()
        self._cue = -1
        self._asked = self._stepped = 0  # single steps; each is counted by one thread only
        self._branch = self.secret
        self.branches: dict[str, Snapshot] = {}
        self.history = History(settings.history_seconds, settings.history_bytes)
        self._captured: OrderedDict[float, float] = OrderedDict()

    # The event loop's side.

    def start(self) -> None:
        if not self.running:
            self._rejoin()
        self.running = True

    def pause(self) -> None:
        self.running = False

    def single_step(self) -> None:
        """Stop, and draw one step more; many are drawn no faster than a stream that runs."""
        self.running = False
        self._rejoin()
        self._asked = min(self._asked + 1, self._stepped + MOST_STEPS_OWED)

    def _rejoin(self) -> None:
        """What was not drawn while the stream stood still is not made up for."""
        if self.due is not None and self.due < time.monotonic():
            self.due = None

    def give(self, picture: Tensor, captured: float) -> None:
        """A camera picture for the next step, taken at `captured` (client ms). The newest wins."""
        now = time.monotonic()
        self._captured[now] = captured
        while len(self._captured) > REMEMBERED_TIMES:
            self._captured.popitem(last=False)
        self.inbox.put(Frame(picture, now))

    def check_room(self, text: str) -> None:
        """Raises ValueError if too much waits already to be spoken."""
        waiting = len(getattr(self.session.state, "waiting", ""))
        if waiting + len(text) > MAX_TEXT_CHARACTERS:
            raise ValueError(f"{waiting:,} characters wait to be spoken already; append more when it has said them")

    def owns(self, secret: str) -> bool:
        return secret == self.secret or secret in self.branches or secret == self._branch

    def plan(self, entries: tuple[dict[str, Any], ...]) -> None:
        """Follow these prompts from now on. Each is tried first, so a bad one is refused now and not in a minute.

        Raises:
            TypeError, ValueError: the pipeline can't draw one of them.
        """
        control: Control = self.session.control
        for entry in entries:
            self.pipe.check(control.changed(**{name: value for name, value in entry.items() if name != "at"}))
        self.timeline, self._cue = entries, -1

    # The engine's side.

    @property
    def wanted(self) -> bool:
        """Does somebody watch, and want to see more, of what has more to show?"""
        return self.viewer is not None and (self.running or self._asked > self._stepped) and not self.session.ended

    @property
    def ready(self) -> bool:
        """Can the next step be drawn?"""
        return self.wanted and (self.mode == "play" or len(self.inbox) > 0)

    @property
    def paced(self) -> bool:
        """Does the clock say when to step? Else it is done as soon as it can be."""
        return self.mode == "play"

    def hurried(self, now: float) -> bool:
        """Would a step before its time show a new control sooner? (Of several pictures each waits its turn.)"""
        ahead = 0.0 if self.due is None else self.due - now
        return self.session.steered and ahead <= self.step_seconds <= 1.5 / self.pipe.rate

    def take(self) -> Frame | None:
        """What the next step answers; called just before it."""
        self._stepped += self._asked > self._stepped
        self._follow_timeline()
        return self.inbox.get(0) if self.mode == "camera" else None

    def _follow_timeline(self) -> None:
        passed = [number for number, entry in enumerate(self.timeline) if entry["at"] <= self.position]
        cue = passed[-1] if passed else -1
        if cue != self._cue and cue >= 0:
            first = self._cue + 1 if cue > self._cue else cue  # back in time only the one that holds there
            for entry in self.timeline[first : cue + 1]:
                self.session.steer(**{name: value for name, value in entry.items() if name != "at"})
            self.find_nearest()
        self._cue = cue

    def drew(self, chunks: Sequence[Chunk], now: float) -> None:
        """Pace, show, record and remember what a step has drawn."""
        seconds = self.step_seconds = duration(chunks)
        due = self.due
        if due is not None:
            # late by up to one step's media is made up for, and sound until it is ahead again
            self.due = max(due + seconds, now - max(seconds, self.ahead))
        viewer, recording = self.viewer, self.recording
        for chunk in chunks:
            self.position = chunk.start / chunk.rate + duration([chunk])
            if recording is not None:
                recording.write(chunk)
            if viewer is None:
                continue
            if chunk.kind == "audio":
                viewer.hear(chunk)
            else:
                viewer.show(self._pictures(chunk, now))
        if self.session.ended:
            self.due = None
            if viewer is not None:
                viewer.said()
        if chunks and self.history.due(self.position):
            self._remember()

    def _pictures(self, chunk: Chunk, now: float) -> list[tuple[float, Picture]]:
        """The frames of `chunk` and when each is due: several are played at the stream's rate, one is shown at once."""
        captured, count = self._captured.get(chunk.time), len(chunk.data)
        seconds = count / chunk.rate
        start = now
        if count > 1:
            # after the chunk before, which may still be playing; but never a whole chunk late
            start = self._played if now < self._played <= now + seconds else now
            self._played = start + seconds
        pictures = []
        for index, data in enumerate(chunk.data):
            later = index / chunk.rate
            # a chunk bears the time of the last picture it answers; the others were taken before, at the stream's rate
            before = (count - 1 - index) / chunk.rate
            when = (chunk.time + later) * 1000 if captured is None else captured - before * 1000
            pictures.append((start + later, Picture(data, chunk.version, self.frame, when)))
            self.frame += 1
        return pictures

    def _remember(self) -> None:
        snapshot = parked(self.session.snapshot())
        self.history.add(self.position, snapshot)
        if self.on_moment is not None:
            self.on_moment(self._saved(snapshot))

    def _saved(self, snapshot: Snapshot) -> Saved:
        return Saved(snapshot, self.secret, self.mode, self.seed, self.running, self.frame, self.timeline)

    def save(self) -> Saved:
        """Everything, as it is now."""
        return self._saved(parked(self.session.snapshot()))

    def revive(self, saved: Saved) -> None:
        """Become what `saved` was, on this server.

        Raises:
            ValueError: it is of another pipeline.
        """
        self.session.restore(saved.snapshot)
        self.secret = self._branch = saved.secret
        self.frame, self.timeline, self.running = saved.frame, saved.timeline, saved.running
        self.find_nearest()

    def reset(self, seed: int | None) -> dict[str, Any]:
        """Begin anew, from `seed` or from a new one."""
        self.seed = secrets.randbits(32) if seed is None else seed
        self._generator.manual_seed(self.seed)
        self.session.reset()
        self._jumped(0.0)
        self.history.clear()
        return {"seed": self.seed}

    def back(self, seconds: float) -> dict[str, Any]:
        """Go on from `seconds` ago, or from the oldest moment that is remembered."""
        was = self.position
        position, snapshot = self.history.before(was - seconds)
        self._restore(snapshot)
        self._jumped(position)
        return {"seconds": was - position, "prompt": self.session.control.prompt}

    def branch(self) -> dict[str, Any]:
        """Keep this moment under a secret of its own."""
        if len(self.branches) >= self.settings.max_branches:
            raise ValueError(f"a session has at most {self.settings.max_branches} branches")
        snapshot = parked(self.session.snapshot())
        used = sum(size_of(kept) for kept in self.branches.values())
        if used + size_of(snapshot) > self.settings.history_bytes:
            raise ValueError(f"the branches of a session take at most {self.settings.history_bytes:,} bytes")
        secret = secrets.token_urlsafe(24)
        self.branches[secret] = snapshot
        return {"resume": secret}

    def switch(self, secret: str) -> dict[str, Any]:
        """Go on in another branch; the one that was running keeps this moment."""
        if secret != self._branch:
            if secret not in self.branches:
                raise ValueError("there is no such branch in this session")
            here = parked(self.session.snapshot())
            self._restore(self.branches[secret])
            del self.branches[secret]
            self.branches[self._branch], self._branch = here, secret
            self.history.clear()
            self._jumped(self.position)
        return {"resume": secret, "prompt": self.session.control.prompt}

    def _restore(self, snapshot: Snapshot) -> None:
        """Put the stream back, but not the fingers: the keys that are down now stay down."""
        keys = getattr(self.session.control, "keys", None)
        self.session.restore(snapshot)
        if keys is not None:
            self.session.steer(keys=keys)
        self.find_nearest()

    def _jumped(self, position: float) -> None:
        self.position, self._cue, self.due = position, -1, None
        if self.viewer is not None:
            self.viewer.forget()

    def find_nearest(self) -> None:
        """Which learnt world the prompt will be drawn like, where the pipeline knows."""
        nearest = getattr(self.pipe, "nearest_world", None)
        if nearest is not None:
            self.nearest = nearest(self.session.control.prompt)

    def close(self) -> None:
        self.inbox.close()
        self.session.close()


def duration(chunks: Sequence[Chunk]) -> float:
    """Seconds of media in `chunks`: of the longest medium."""
    lengths = dict.fromkeys((chunk.kind for chunk in chunks), 0.0)
    for chunk in chunks:
        count = len(chunk.data) if chunk.kind == "video" else chunk.data.shape[-1]
        lengths[chunk.kind] += count / chunk.rate
    return max(lengths.values(), default=0.0)
