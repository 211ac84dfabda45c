"""What flows through a stream: chunks of media, controls that steer them, and who may take part.

Layouts: video is [T, 3, H, W] in [0, 1]; audio is [channels, samples] in [-1, 1]. Times are monotonic seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

MAX_PROMPT_CHARACTERS = 2000


class EndOfStream(Exception):
    """Raised by `Source.read` when nothing will ever come again."""


class Frame(NamedTuple):
    """What a source gives: `data` [3, H, W] in [0, 1] (or [channels, samples]) and its capture `time`."""

    data: Tensor
    time: float


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """What one step yields, one per medium.

    Attributes:
        kind: the medium.
        data: video [T, 3, H, W] in [0, 1]; audio [channels, samples] in [-1, 1].
        start: index of the first frame (sample) of `data` in the stream.
        rate: frames (samples) per second of media.
        version: the control the chunk was DRAWN under (codecs and batches may delay it).
        time: capture time of the input it answers, or of the step.
    """

    kind: Literal["video", "audio"]
    data: Tensor
    start: int
    rate: float
    version: int
    time: float


@dataclass(frozen=True, slots=True)
class Control:
    """What the user asks for. Replaced whole, never edited in place.

    Raises:
        TypeError, ValueError: a field of the wrong type or out of range, with the value seen and the value wanted.
    """

    prompt: str = ""
    version: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise TypeError(f"prompt must be a string, got {type(self.prompt).__name__}")
        if len(self.prompt) > MAX_PROMPT_CHARACTERS:
            raise ValueError(
                f"prompt has {len(self.prompt):,} characters; at most {MAX_PROMPT_CHARACTERS:,} are read, so shorten it"
            )

    def changed(self, **changes: Any) -> Control:
        """A copy with `changes` and the next version; unknown fields are refused with the list of valid ones."""
        valid = [field.name for field in fields(self) if field.name != "version"]
        unknown = sorted(set(changes) - set(valid))
        if unknown:
            raise ValueError(f"unknown control {', '.join(unknown)}; valid controls are {', '.join(valid)}")
        return replace(self, **changes, version=self.version + 1)

    def merged(self, newer: Control) -> Control:
        """What the next step reads when `newer` arrives before this control was read: the newest value of everything."""
        return newer


@dataclass(frozen=True, slots=True)
class WorldControl(Control):
    """Keys held (W3C codes such as "KeyW", "Space") and mouse movement in pixels since the last step.

    `merged` keeps short inputs: mouse movement adds up, and a key that was down at any time since the last step counts.
    """

    keys: frozenset[str] = frozenset()
    mouse: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        Control.__post_init__(self)
        if isinstance(self.keys, str) or not all(isinstance(key, str) for key in self.keys):
            raise TypeError(f"keys must be a set of key codes such as {{'KeyW', 'ArrowLeft'}}, got {self.keys!r}")
        object.__setattr__(self, "keys", frozenset(self.keys))
        dx, dy = (float(movement) for movement in self.mouse)
        if not (math.isfinite(dx) and math.isfinite(dy)):
            raise ValueError(f"mouse movement must be finite, got {self.mouse}")
        object.__setattr__(self, "mouse", (dx, dy))

    def merged(self, newer: WorldControl) -> WorldControl:
        mouse = (self.mouse[0] + newer.mouse[0], self.mouse[1] + newer.mouse[1])
        return replace(newer, keys=self.keys | newer.keys, mouse=mouse)


@dataclass(frozen=True, slots=True)
class VideoControl(Control):
    """`strength`: 0 keeps the input, 1 ignores it. `switch`: what happens to the memory when the prompt changes."""

    strength: float = 1.0
    switch: Literal["keep", "recache", "lerp", "cut"] = "keep"

    def __post_init__(self) -> None:
        Control.__post_init__(self)
        if not 0.0 <= self.strength <= 1.0:
            raise ValueError(f"strength must be between 0 (keep the input) and 1 (ignore it), got {self.strength}")
        if self.switch not in ("keep", "recache", "lerp", "cut"):
            raise ValueError(f"switch must be keep, recache, lerp or cut, got {self.switch!r}")


@dataclass(frozen=True, slots=True)
class SpeechControl(Control):
    """The text to speak so far, and the voice that speaks it."""

    text: str = ""
    voice: str = ""


State = TypeVar("State")
ControlT = TypeVar("ControlT", bound=Control)
Leaves = dict[str, "Tensor | int | float | str"]


class Streamable(Protocol[State, ControlT]):
    """What a pipeline owes a session. One state per session; the pipeline itself never changes between calls."""

    rate: float

    def begin(self, control: ControlT, *, generator: torch.Generator | None = None) -> State:
        """A fresh state. Draws one seed from `generator`; every later draw is a pure function of it."""
        ...

    def advance(
        self, states: Sequence[State], controls: Sequence[ControlT], media: Sequence[Frame | None]
    ) -> Sequence[Sequence[Chunk]]:
        """Move every state one step on, together; returns each one's chunks."""
        ...

    def flush(self, state: State) -> Sequence[Chunk]:
        """What the codec still holds at the end."""
        ...

    def save(self, state: State) -> Leaves:
        """Everything `state` is, as tensors and JSON scalars, safe to keep after further steps."""
        ...

    def load(self, leaves: Leaves) -> State:
        """A new state equal to the saved one. Raises `ValueError` if `leaves` is not this pipeline's."""
        ...

    def end(self, state: State) -> None:
        """Give back what `state` holds (its rows). Harmless when called twice."""
        ...


class Source(Protocol):
    """Camera, file, microphone, socket."""

    def read(self) -> Frame | None:
        """The next frame, None when nothing new is there yet; raises `EndOfStream` at the end."""
        ...

    def close(self) -> None: ...


class Sink(Protocol):
    """File, window, socket, speaker, virtual camera."""

    def write(self, chunk: Chunk) -> None: ...

    def close(self) -> None: ...
