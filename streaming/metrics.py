"""How a stream is doing: frames per second, step times, ages, drops, gaps. Constant memory however long it runs."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Literal

from .jitter import Playout
from .types import Chunk

Ended = Literal["source", "sink", "until", "interrupt"]
WINDOW_SECONDS = 2.0  # long enough to be steady, short enough to show a stall at once
WINDOW_STEPS = 1024  # p99 of about a thousand steps still rests on ten of them


class Metrics:
    """Written by the stream's threads, read from any thread; every figure covers a recent window except the counters.

    Attributes:
        frames: video frames drawn so far.
        steps: steps taken so far.
        dropped: input frames that were never used because a newer one came.
        applied: version of the last control that a step read.
        time_to_first_frame: seconds from the start of the first step to the first chunk, None before it.
        sound_seconds: of sound drawn so far.
        time_to_first_sound: seconds from the start of the first step to the first sound, None before it.
        ended: what ended the last `live` loop: the source, the sink, its `until` or Ctrl-C; None otherwise.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.frames = 0
        self.steps = 0
        self.dropped = 0
        self.applied = 0
        self.time_to_first_frame: float | None = None
        self.sound_seconds = 0.0
        self.time_to_first_sound: float | None = None
        self.ended: Ended | None = None
        self._clock = clock
        self._first_start: float | None = None
        self._drawn: deque[tuple[float, int]] = deque(maxlen=WINDOW_STEPS)
        self._seconds: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._ages: deque[tuple[float, float]] = deque(maxlen=WINDOW_STEPS)
        self._sound: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._playout = Playout()
        self._has_viewer = False
        self._lock = Lock()

    def stepped(self, start: float, chunks: Sequence[Chunk], applied: int) -> None:
        """Count a step that began at `start`, has just ended with `chunks` and read control version `applied`."""
        now = self._clock()
        frames = sum(len(chunk.data) for chunk in chunks if chunk.kind == "video")
        sound = sum(sound_seconds(chunk) for chunk in chunks)
        with self._lock:
            self.steps += 1
            self.frames += frames
            self.applied = applied
            self._first_start = start if self._first_start is None else self._first_start
            if chunks and self.time_to_first_frame is None:
                self.time_to_first_frame = now - self._first_start
            if sound and self.time_to_first_sound is None:
                self.time_to_first_sound = now - self._first_start
            self.sound_seconds += sound
            self._seconds.append(now - start)
            self._sound.append(sound)
            self._drawn.append((now, frames))
            while len(self._drawn) > 2 and now - self._drawn[0][0] > WINDOW_SECONDS:
                self._drawn.popleft()
            if not self._has_viewer:
                self._note_ages(now, chunks)

    def delivered(self, chunk: Chunk) -> None:
        """Count a chunk that has reached its viewer. From the first one on, ages are those at delivery."""
        with self._lock:
            if not self._has_viewer:
                self._has_viewer = True
                self._ages.clear()
            now = self._clock()
            self._note_ages(now, (chunk,))
            if chunk.kind == "audio":
                self._playout.arrived(now, sound_seconds(chunk))

    def paused(self) -> None:
        """What was asked for is said; the silence until the next sound is no underrun."""
        with self._lock:
            self._playout.paused()

    def _note_ages(self, now: float, chunks: Sequence[Chunk]) -> None:
        self._ages.extend((now, now - chunk.time) for chunk in chunks)
        while len(self._ages) > 1 and now - self._ages[0][0] > WINDOW_SECONDS:
            self._ages.popleft()

    @property
    def fps(self) -> float:
        """Video frames per second over the last `WINDOW_SECONDS`; 0 until two steps have ended."""
        with self._lock:
            if len(self._drawn) < 2 or self._drawn[-1][0] <= self._drawn[0][0]:
                return 0.0
            frames = sum(count for _, count in self._drawn) - self._drawn[0][1]
            return frames / (self._drawn[-1][0] - self._drawn[0][0])

    @property
    def real_time_factor(self) -> float | None:
        """Seconds of work per second of sound over the last `WINDOW_STEPS` steps; None where there was no sound."""
        with self._lock:
            sound = sum(self._sound)
            return sum(self._seconds) / sound if sound else None

    @property
    def underruns(self) -> int:
        """Gaps that a listener heard who began `LEAD_SECONDS` after the first delivered sound."""
        with self._lock:
            return self._playout.underruns

    @property
    def frame_age(self) -> float | None:
        """Median seconds from capture (or from the step, without input) to delivery, lately; None before any chunk."""
        with self._lock:
            return _percentile([age for _, age in self._ages], 50)

    def step_seconds(self, percent: float) -> float | None:
        """The step time that `percent` of the last `WINDOW_STEPS` steps did not exceed; None before the first."""
        with self._lock:
            return _percentile(list(self._seconds), percent)

    def as_dict(self) -> dict[str, float | int | str | None]:
        """Everything, ready for JSON; seconds throughout."""
        return {
            "frames": self.frames,
            "steps": self.steps,
            "dropped": self.dropped,
            "applied": self.applied,
            "fps": self.fps,
            "time_to_first_frame": self.time_to_first_frame,
            "frame_age": self.frame_age,
            "step_p50": self.step_seconds(50),
            "step_p95": self.step_seconds(95),
            "step_p99": self.step_seconds(99),
            "ended": self.ended,
            "sound_seconds": self.sound_seconds,
            "time_to_first_sound": self.time_to_first_sound,
            "real_time_factor": self.real_time_factor,
            "underruns": self.underruns,
        }

    def status(self) -> str:
        """One line for an overlay: `16.2 fps · 78 ms old · 0 dropped · v4 applied`."""
        age = self.frame_age
        old = "no frame yet" if age is None else f"{age * 1000:.0f} ms old"
        return f"{self.fps:.1f} fps · {old} · {self.dropped} dropped · v{self.applied} applied"


def sound_seconds(chunk: Chunk) -> float:
    """How long a chunk sounds; 0 for video."""
    return chunk.data.shape[-1] / chunk.rate if chunk.kind == "audio" else 0.0


def _percentile(values: list[float], percent: float) -> float | None:
    """Nearest rank: always one of the values, so a p99 was really seen."""
    if not values:
        return None
    rank = math.ceil(percent / 100 * len(values))
    return sorted(values)[max(rank, 1) - 1]
