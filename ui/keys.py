"""Keys as text (a script such as "KeyW*40 KeyW+Space*10") and as presses (a window that never sees a key go up)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import cycle

NO_KEY = ("-", "None")
MAX_COUNT = 1_000_000
OPPOSITES = (("KeyW", "KeyS"), ("KeyA", "KeyD"), ("ArrowLeft", "ArrowRight"), ("ArrowUp", "ArrowDown"))

_ITEM = re.compile(r"(?P<keys>[^*\s]+)(?:\*(?P<count>\d+))?")


@dataclass(frozen=True, slots=True)
class KeyScript:
    """Which keys are down in each frame: `runs` of (keys, number of frames), repeated for ever."""

    runs: tuple[tuple[frozenset[str], int], ...]

    @classmethod
    def parse(cls, text: str, valid: Collection[str]) -> KeyScript:
        """Read a space-separated list of `KEY[+KEY]*COUNT`; "-" or "None" is no key, a missing count is one frame.

        Args:
            text: for example "KeyW*40 ArrowLeft*20 KeyW+Space*10". Empty: no key, ever.
            valid: the key codes that do something.

        Raises:
            ValueError: an unknown key (with the list of valid ones), a count that isn't 1 to a million, other text.
        """
        runs = tuple(_run(item, valid) for item in text.split())
        return cls(runs or ((frozenset(), 1),))

    def __iter__(self) -> Iterator[frozenset[str]]:
        for keys, count in cycle(self.runs):
            for _ in range(count):
                yield keys


def _run(item: str, valid: Collection[str]) -> tuple[frozenset[str], int]:
    match = _ITEM.fullmatch(item)
    if match is None:
        raise ValueError(f"keys must look like KeyW*40 or KeyW+Space*10, got {item!r}")
    count = int(match["count"] or 1)
    if not 1 <= count <= MAX_COUNT:
        raise ValueError(f"the count in {item!r} must be between 1 and {MAX_COUNT:,}")
    if match["keys"] in NO_KEY:
        return frozenset(), count
    keys = match["keys"].split("+")
    for key in keys:
        if key not in valid:
            close = get_close_matches(key, valid, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"unknown key {key!r}: {hint}valid keys are {', '.join(sorted(valid))}, and - for none")
    return frozenset(keys), count


class HeldKeys:
    """Guesses which keys are down where only presses and their repeats can be seen, as in an OpenCV window.

    A press counts for `hold` seconds, and each repeat renews it. Only the key pressed last repeats, so a key that was
    repeating when another came stays down for as long as that one does. Opposite keys end each other.
    """

    def __init__(self, hold: float = 0.3) -> None:
        self.hold = hold
        self._until: dict[str, float] = {}
        self._repeating: set[str] = set()
        self._carried: frozenset[str] = frozenset()
        self._newest = ""

    def press(self, key: str, now: float) -> None:
        """`key` went down, or repeated, at `now` (monotonic seconds)."""
        held = self.held(now)
        for pair in OPPOSITES:
            if key in pair:
                self._forget(pair[1 - pair.index(key)])
        if key in held:
            self._repeating.add(key)
        else:
            self._repeating.discard(key)
        if key != self._newest:
            self._carried = frozenset(other for other in self._repeating & held if other != key)
            self._newest = key
        self._until[key] = now + self.hold

    def held(self, now: float) -> frozenset[str]:
        """The keys that count as down at `now`."""
        held = frozenset(key for key, until in self._until.items() if now < until)
        return held | self._carried if self._newest in held else held

    def _forget(self, key: str) -> None:
        self._until.pop(key, None)
        self._repeating.discard(key)
        self._carried -= {key}
