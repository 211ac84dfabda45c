"""What flows through a stream: chunks of media, controls that steer them, and who may take part.

Layouts: video is [T, 3, H, W] in [0, 1]; audio is [channels, samples] in [-1, 1]. Times are monotonic seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_PROMPT_CHARACTERS = 2000
MAX_TEXT_CHARACTERS = 5000  # that wait to be spoken: five minutes


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

    def changed(self, **changes: Any) -> Self:
        """A copy with `changes` and the next version; unknown fields are refused with the list of valid ones."""
        valid = [field.name for field in fields(self) if field.name != "version"]
        unknown = sorted(set(changes) - set(valid))
        if unknown:
            raise ValueError(f"unknown control {', '.join(unknown)}; valid controls are {', '.join(valid)}")
        return replace(self, **changes, version=self.version + 1)

    def merged(self, newer: Self) -> Self:
        """What the next step reads when `newer` comes before this control was read: the newest value of everything."""
        return newer

    def held(self) -> Self:
        """What still holds once a step has read this control and nothing newer came: everything but movement."""
        return self


@dataclass(frozen=True, slots=True)
class WorldControl(Control):
    """Keys held (W3C codes such as "KeyW", "Space") and mouse movement in pixels since the last step.

    `merged` keeps short inputs: mouse movement adds up, and a key that was down at any time since the last step counts.

    `num_inference_steps` trades quality for speed, None takes the sampler's own; `guidance_scale` above 1 follows the
    prompt harder at twice the cost.

    The others say what becomes of a picture that a step is given:

    - `strength`: how far it is redrawn, from 0 (kept) to 1 (ignored); None shows it to the world as a true frame, as 0
      does.
    - `stream_batch`: redraw several pictures at once, each at another noise level, so that a step is one pass of the
      network; chunks then come that many steps late, less one.
    - `skip_similar`: likeness (cosine, 0 to 1) to the last drawn picture above which a picture may be left out, the
      more likely the more alike; the last frame is then given again. None draws every one.
    - `follow_motion`: share of `strength`, 0 to 0.9, that fast motion takes off, so that what moves keeps its shape.
    """

    keys: frozenset[str] = frozenset()
    mouse: tuple[float, float] = (0.0, 0.0)
    num_inference_steps: int | None = None
    guidance_scale: float = 1.0
    strength: float | None = None
    stream_batch: bool = False
    skip_similar: float | None = None
    follow_motion: float = 0.0

    def __post_init__(self) -> None:
        Control.__post_init__(self)
        steps = self.num_inference_steps
        if steps is not None and (not isinstance(steps, int) or not 1 <= steps <= 1000):
            raise ValueError(f"num_inference_steps must be a whole number from 1 to 1000, got {steps!r}")
        if not isinstance(self.guidance_scale, (int, float)) or not 0 <= self.guidance_scale <= 100:
            raise ValueError(f"guidance_scale must be a number from 0 to 100, got {self.guidance_scale!r}")
        if self.strength is not None:
            check_strength(self.strength)
        if not isinstance(self.stream_batch, bool):
            raise TypeError(f"stream_batch must be True or False, got {self.stream_batch!r}")
        if self.skip_similar is not None and not lies_between(0, self.skip_similar, 1):
            raise ValueError(f"skip_similar must be a likeness from 0 to 1, or None, got {self.skip_similar!r}")
        if not lies_between(0, self.follow_motion, 0.9):
            raise ValueError(f"follow_motion must be a number from 0 to 0.9, got {self.follow_motion!r}")
        object.__setattr__(self, "keys", _key_codes(self.keys))
        object.__setattr__(self, "mouse", _movement(self.mouse))

    def merged(self, newer: Self) -> Self:
        mouse = (self.mouse[0] + newer.mouse[0], self.mouse[1] + newer.mouse[1])
        return replace(newer, keys=self.keys | newer.keys, mouse=mouse)

    def held(self) -> Self:
        return replace(self, mouse=(0.0, 0.0))


def check_strength(strength: float) -> None:
    if not isinstance(strength, (int, float)):
        raise TypeError(f"strength must be a number between 0 and 1, got {strength!r}")
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must be between 0 (keep the input) and 1 (ignore it), got {strength}")


def lies_between(low: float, value: object, high: float) -> bool:
    return isinstance(value, (int, float)) and low <= value <= high


def _key_codes(keys: Iterable[str]) -> frozenset[str]:
    if isinstance(keys, str) or not isinstance(keys, Iterable):
        raise TypeError(f"keys must be a set of key codes such as {{'KeyW', 'ArrowLeft'}}, got {keys!r}")
    codes = list(keys)
    if not all(isinstance(code, str) for code in codes):
        raise TypeError(f"keys must be a set of key codes such as {{'KeyW', 'ArrowLeft'}}, got {codes!r}")
    return frozenset(codes)


def _movement(mouse: tuple[float, float]) -> tuple[float, float]:
    try:
        dx, dy = (float(movement) for movement in mouse)
    except (TypeError, ValueError):
        raise TypeError(f"mouse must be two numbers (right, down) in pixels, got {mouse!r}") from None
    if not (math.isfinite(dx) and math.isfinite(dy)):
        raise ValueError(f"mouse movement must be finite, got {mouse!r}")
    return dx, dy


Switch: TypeAlias = Literal["keep", "lerp", "recache", "cut"]
SWITCHES: tuple[Switch, ...] = get_args(Switch)  # each forgets more than the one before it


def stronger(one: Switch, other: Switch) -> Switch:
    """The switch that forgets more."""
    return SWITCHES[max(SWITCHES.index(one), SWITCHES.index(other))]


@dataclass(frozen=True, slots=True)
class VideoControl(Control):
    """`strength`: 0 keeps the input, 1 ignores it. `switch`: what happens to the memory, once, also without new words.

    `merged` keeps the switch that forgets more: a cut before a step is a cut, whatever is steered after it.
    """

    strength: float = 1.0
    switch: Switch = "keep"

    def __post_init__(self) -> None:
        Control.__post_init__(self)
        check_strength(self.strength)
        if self.switch not in SWITCHES:
            raise ValueError(f"switch must be keep, recache, lerp or cut, got {self.switch!r}")

    def merged(self, newer: Self) -> Self:
        return replace(newer, switch=stronger(self.switch, newer.switch))

    def held(self) -> Self:
        return replace(self, switch="keep")


@dataclass(frozen=True, slots=True)
class GameControl(VideoControl):
    """`keys` and `mouse` as in `WorldControl`, for video models that are played."""

    keys: frozenset[str] = frozenset()
    mouse: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        VideoControl.__post_init__(self)
        object.__setattr__(self, "keys", _key_codes(self.keys))
        object.__setattr__(self, "mouse", _movement(self.mouse))

    def merged(self, newer: Self) -> Self:
        mouse = (self.mouse[0] + newer.mouse[0], self.mouse[1] + newer.mouse[1])
        return replace(newer, switch=stronger(self.switch, newer.switch), keys=self.keys | newer.keys, mouse=mouse)

    def held(self) -> Self:
        return replace(self, switch="keep", mouse=(0.0, 0.0))


@dataclass(frozen=True, slots=True)
class SpeechControl(Control):
    """Words to speak after those before, and the voice that speaks them.

    `merged` keeps every word: texts that come between two steps follow each other. A step that has read them has them.
    """

    text: str = ""
    voice: str = ""

    def __post_init__(self) -> None:
        Control.__post_init__(self)
        for name in ("text", "voice"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a string, got {type(getattr(self, name)).__name__}")
        if len(self.text) > MAX_TEXT_CHARACTERS:
            raise ValueError(
                f"the text has {len(self.text):,} characters; at most {MAX_TEXT_CHARACTERS:,} are read at once, so "
                "append the rest while it speaks"
            )

    def merged(self, newer: Self) -> Self:
        return replace(newer, text=f"{self.text} {newer.text}".strip())

    def held(self) -> Self:
        return replace(self, text="")


State = TypeVar("State")
ControlT = TypeVar("ControlT", bound=Control)
ControlT_contra = TypeVar("ControlT_contra", bound=Control, contravariant=True)
Leaves = dict[str, "Tensor | int | float | str"]


class Streamable(Protocol[State, ControlT_contra]):
    """What a pipeline owes a session. One state per session; the pipeline itself never changes between calls."""

    rate: float

    def check(self, control: ControlT_contra) -> None:
        """Raise `ValueError` if this pipeline cannot obey `control`. Called before anything changes."""
        ...

    def begin(self, control: ControlT_contra, *, generator: torch.Generator | None = None) -> State:
        """A fresh state. Draws one seed from `generator`; every later draw is a pure function of it."""
        ...

    def advance(
        self, states: Sequence[State], controls: Sequence[ControlT_contra], media: Sequence[Frame | None]
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
