"""Prompts at times: a script of shots that can be written by hand, saved from a session and replayed.

[{"at": 0, "prompt": "a corgi surfs"},
 {"at": 4.5, "prompt": "the corgi lands on the beach", "switch": "recache"},
 {"at": 9, "prompt": "night falls", "switch": "lerp"},
 {"at": 15, "prompt": "a fox in the snow", "switch": "cut"}]
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from ..streaming import Session, VideoControl


class Script(Protocol):
    """What steers a session as its video goes on."""

    def follow(self, session: Session[Any, Any]) -> Callable[[float], None]:
        """What is called with the seconds at which the session's next chunk begins, before every chunk."""
        ...


@dataclass(frozen=True, slots=True)
class Cue:
    """From `at` seconds of the video on, this prompt; `switch` as in `VideoControl`.

    Raises:
        TypeError, ValueError: values that a control would refuse, half a character in the prompt, or a time that is
            not finite and at least 0.
    """

    at: float
    prompt: str
    switch: str = "keep"

    def __post_init__(self) -> None:
        number = isinstance(self.at, (int, float)) and not isinstance(self.at, bool)
        if not number or not 0 <= self.at < math.inf:
            raise ValueError(f"a cue's time must be seconds from 0 on, got {self.at!r}")
        VideoControl(self.prompt, switch=self.switch)  # pyright: ignore[reportArgumentType] (it refuses what is wrong)
        if any("\ud800" <= character <= "\udfff" for character in self.prompt):
            raise ValueError("the prompt holds half a character (a lone surrogate)")


@dataclass(frozen=True)
class Timeline:
    """Cues in the order of their times, the first at 0. ValueError if they are not."""

    cues: tuple[Cue, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "cues", tuple(self.cues))
        if not self.cues or self.cues[0].at != 0 or any(a.at >= b.at for a, b in pairwise(self.cues)):
            raise ValueError(f"a timeline begins at 0 and goes on, got cues at {[cue.at for cue in self.cues]}")

    @property
    def prompt(self) -> str:
        """What a stream begins with."""
        return self.cues[0].prompt

    def follow(self, session: Session[Any, VideoControl]) -> Callable[[float], None]:
        """What steers `session`: called with the seconds at which its next chunk begins, for the cues due since.

        The prompt of the cue that comes next is read on a thread of its own meanwhile.
        """
        since = 0.0

        def read_next() -> None:
            coming = next((cue for cue in self.cues if cue.at > since), None)
            if coming is not None:
                Thread(target=_read, args=(session, coming), name="timeline").start()

        def steer(seconds: float) -> None:
            nonlocal since
            due = [cue for cue in self.cues if since < cue.at <= seconds]
            since = max(since, seconds)
            for cue in due:
                session.steer(prompt=cue.prompt, switch=cue.switch)
            if due:
                read_next()

        read_next()

        return steer

    @staticmethod
    def of(cues: Iterable[dict[str, Any]]) -> Timeline:
        """From what JSON holds. ValueError tells what is wrong, and in which cue."""
        made = []
        for number, cue in enumerate(cues):
            if not isinstance(cue, dict) or not {"at", "prompt"} <= cue.keys() <= {"at", "prompt", "switch"}:
                raise ValueError(f'cue {number} must be {{"at": seconds, "prompt": words, "switch": how}}, got {cue!r}')
            try:
                made.append(Cue(**cue))
            except (TypeError, ValueError) as error:
                raise ValueError(f"cue {number}: {error}") from None
        return Timeline(tuple(made))

    @staticmethod
    def load(path: str | Path) -> Timeline:
        """Read a JSON file. FileNotFoundError, or ValueError if it is no timeline, with the file and the cue."""
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
        except RecursionError:
            raise ValueError(f"{path} is nested too deeply for a timeline") from None
        if not isinstance(stored, list):
            raise ValueError(f"{path} must hold a list of cues, got a {type(stored).__name__}")
        try:
            return Timeline.of(stored)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write what `load` reads."""
        cues = json.dumps([asdict(cue) for cue in self.cues], indent=1, ensure_ascii=False)
        Path(path).write_text(cues + "\n", encoding="utf-8")


def _read(session: Session[Any, VideoControl], cue: Cue) -> None:
    """Let the pipeline read a cue's prompt. What it refuses, it refuses again when the cue is due."""
    with suppress(ValueError):
        session.pipeline.check(session.control.changed(prompt=cue.prompt))
