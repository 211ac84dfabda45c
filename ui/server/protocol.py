"""The words of the live socket: text messages are JSON, media are small binary headers before the bytes.

Everything here is a pure function of its input: what a message may say, how long it may be, how a picture is packed.
docs/serving.md tells the same as a reference. All numbers are little-endian.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NoReturn

from ...streaming import MAX_PROMPT_CHARACTERS

PROTOCOL = 1
MAX_TEXT_BYTES = 256 * 1024
MAX_CAMERA_BYTES = 2 * 2**20
MAX_TIMELINE = 100  # prompts
MAX_KEYS = 16  # more fingers than anybody has
MAX_MOUSE = 10_000.0  # pixels in one message
MAX_BACK_SECONDS = 3600.0
MAX_STEPS = 50  # sampler steps: one viewer's patience must not become everybody's
MAX_SEED = 2**53 - 1  # the largest whole number JavaScript holds exactly

CAMERA, VIDEO, AUDIO = 1, 2, 3
JPEG, WEBP = 0, 1
FORMATS = {"jpeg": JPEG, "webp": WEBP}
PCM_S16 = 0
CAMERA_HEADER = struct.Struct("<Bd")
VIDEO_HEADER = struct.Struct("<BBHIQd")
AUDIO_HEADER = struct.Struct("<BBHIQdI")


class Close(IntEnum):
    """Why the server closes a socket (RFC 6455 leaves 4000 to 4999 to applications)."""

    GOING_AWAY = 1001
    FAILED = 1011
    BAD_MESSAGE = 4400
    TOKEN = 4401
    ORIGIN = 4403
    IDLE = 4408
    TAKEN_OVER = 4409
    TOO_LARGE = 4413
    TOO_MANY = 4429


class Broken(Exception):
    """The client doesn't speak this protocol: the socket is closed with `code`."""

    def __init__(self, code: Close, message: str) -> None:
        super().__init__(message)
        self.code = code


class Refused(ValueError):
    """The client asked for something that can't be done; it is told so and goes on. `id` is the message's, if any."""

    def __init__(self, message: str, id: int | None = None) -> None:
        super().__init__(message)
        self.id = id


@dataclass(frozen=True, slots=True)
class Message:
    """A text message that is known and within its limits; `fields` holds only what the client gave."""

    type: str
    id: int | None
    fields: dict[str, Any]


def parse(text: str) -> Message:
    """Read a text message.

    Raises:
        Broken: longer than `MAX_TEXT_BYTES`, or not a JSON object with a type.
        Refused: an unknown type or field, or a value out of its limits.
    """
    if len(text) > MAX_TEXT_BYTES or len(text.encode(errors="replace")) > MAX_TEXT_BYTES:
        raise Broken(Close.TOO_LARGE, f"a text message has at most {MAX_TEXT_BYTES:,} bytes")
    try:
        raw = json.loads(text, parse_constant=_no_number, parse_int=_short_number)
    except (ValueError, RecursionError):
        raise Broken(Close.BAD_MESSAGE, "a text message is a JSON object") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("type"), str):
        raise Broken(Close.BAD_MESSAGE, 'a text message is a JSON object with a "type"')
    kind, id = raw.pop("type"), raw.pop("id", None)
    if id is not None and not (_is_whole(id) and 0 <= id <= MAX_SEED):
        raise Refused(f"id must be a whole number from 0, got {shortened(id)}")
    if kind not in MESSAGES:
        raise Refused(f"unknown message {shortened(kind)}; known are {', '.join(MESSAGES)}", id)
    return Message(kind, id, _checked(kind, raw, id))


def _checked(kind: str, raw: Mapping[str, Any], id: int | None) -> dict[str, Any]:
    known = MESSAGES[kind]
    fields = {}
    for name, value in raw.items():
        if name not in known:
            has = f"has {', '.join(known)}" if known else "has no fields"
            raise Refused(f"unknown field {shortened(name)}: {kind} {has}", id)
        try:
            fields[name] = known[name](value)
        except ValueError as error:
            raise Refused(f"{name} must be {error}, got {shortened(value)}", id) from None
    return fields


def shortened(value: Any) -> str:
    """`value` as a message may repeat it: never more of it than a line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)


def _short_number(digits: str) -> int:
    if len(digits) > 20:  # turning thousands of digits into a number takes quadratic time
        raise ValueError("a number is too long")
    return int(digits)


# What each field may hold. A checker returns the value, or raises `ValueError` with what was wanted.


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(low: float, high: float) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"a number from {low:g} to {high:g}")
        return value

    return check


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if not _is_whole(value) or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return check


def _text(longest: int) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or len(value) > longest:
            raise ValueError(f"a text of at most {longest:,} characters")
        return value

    return check


def _one_of(*choices: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError(" or ".join(choices))
        return value

    return check


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _keys(value: Any) -> frozenset[str]:
    short = isinstance(value, list) and len(value) <= MAX_KEYS
    if not short or not all(isinstance(code, str) and len(code) <= 32 for code in value):
        raise ValueError(f'a list of at most {MAX_KEYS} key codes such as "KeyW"')
    return frozenset(value)


def _mouse(value: Any) -> tuple[float, float]:
    movement = _number(-MAX_MOUSE, MAX_MOUSE)
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("two numbers, right and down in pixels")
    return movement(value[0]), movement(value[1])


def _formats(value: Any) -> tuple[str, ...]:
    known = [name for name in value if isinstance(name, str) and name in FORMATS] if isinstance(value, list) else []
    if not 1 <= len(known) <= 8:
        raise ValueError(f"a list with one of {', '.join(FORMATS)}")
    return tuple(known)


def _timeline(value: Any) -> tuple[dict[str, Any], ...]:
    wanted = f"at most {MAX_TIMELINE} entries {{at: seconds from 0, prompt, switch?}}"
    if not isinstance(value, list) or len(value) > MAX_TIMELINE:
        raise ValueError(wanted)
    entries = []
    for entry in value:
        if not isinstance(entry, dict) or not {"at", "prompt"} <= entry.keys() <= {"at", "prompt", "switch"}:
            raise ValueError(wanted)
        entries.append({name: _ENTRY[name](part) for name, part in entry.items()})
    return tuple(sorted(entries, key=lambda entry: entry["at"]))


def _optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


_prompt = _text(MAX_PROMPT_CHARACTERS)
_secret = _text(64)
_seed = _whole(0, MAX_SEED)
_milliseconds = _number(-1e15, 1e15)
_switch = _one_of("keep", "recache", "lerp", "cut")
_ENTRY = {"at": _number(0, 1e6), "prompt": _prompt, "switch": _switch}

CONTROLS: dict[str, Callable[[Any], Any]] = {
    "keys": _keys,
    "mouse": _mouse,
    "prompt": _prompt,
    "strength": _optional(_number(0, 1)),
    "stream_batch": _flag,
    "skip_similar": _optional(_number(0, 1)),
    "follow_motion": _number(0, 1),
    "switch": _switch,
    "num_inference_steps": _optional(_whole(1, MAX_STEPS)),
    "guidance_scale": _number(0, 100),
    "text": _prompt,
    "voice": _text(200),
}
MESSAGES: dict[str, dict[str, Callable[[Any], Any]]] = {
    "hello": {
        "protocol": _whole(0, MAX_SEED),
        "resume": _optional(_secret),
        "token": _optional(_text(256)),
        "mode": _one_of("play", "camera"),
        "prompt": _optional(_prompt),
        "seed": _optional(_seed),
        "formats": _formats,
    },
    "steer": CONTROLS,
    "start": {},
    "pause": {},
    "step": {},
    "reset": {"seed": _optional(_seed)},
    "back": {"seconds": _number(0, MAX_BACK_SECONDS)},
    "branch": {},
    "switch": {"resume": _secret},
    "timeline": {"entries": _timeline},
    "record": {"on": _flag},
    "leave": {},
    "ping": {"t": _milliseconds},
    "shown": {"frame": _whole(0, MAX_SEED), "age": _optional(_number(-1e12, 1e12))},
    "heard": {"underruns": _whole(0, MAX_SEED)},
}


def unpack_camera(data: bytes) -> tuple[float, bytes]:
    """Capture time (client milliseconds) and JPEG or WebP bytes of a camera message.

    Raises:
        Broken: too long, of another kind, or without a picture.
    """
    if len(data) > MAX_CAMERA_BYTES:
        raise Broken(Close.TOO_LARGE, f"a camera picture has at most {MAX_CAMERA_BYTES:,} bytes")
    if len(data) <= CAMERA_HEADER.size or data[0] != CAMERA:
        raise Broken(Close.BAD_MESSAGE, "a binary message is a camera picture: 1, capture time (f64), JPEG or WebP")
    _, captured = CAMERA_HEADER.unpack_from(data)
    if not math.isfinite(captured):
        raise Broken(Close.BAD_MESSAGE, "a capture time is a finite number of milliseconds")
    return captured, data[CAMERA_HEADER.size :]


def pack_video(format: int, version: int, frame: int, time: float, image: bytes) -> bytes:
    """A picture for the canvas. `time`: client ms for an answer to a camera picture, else server ms."""
    return VIDEO_HEADER.pack(VIDEO, format, 0, version % 2**32, frame, time) + image


def pack_audio(channels: int, version: int, start: int, time: float, rate: int, samples: bytes) -> bytes:
    """Interleaved signed 16-bit samples for the loudspeaker."""
    return AUDIO_HEADER.pack(AUDIO, PCM_S16, channels, version % 2**32, start, time, rate) + samples
