"""What one stream of a world is, and how a saved one is read back."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..streaming.types import Leaves

CACHE, LEVEL, FRAME = "cache.", "level", "flight"


@dataclass
class FlyingFrame:
    """A frame between two noise levels, with everything it was asked for under: it stays what it began as."""

    latents: Tensor  # [C, 1, h, w]
    sigmas: list[float]  # the levels it goes through
    number: int  # among the drawn frames of its stream
    action: list[float]
    prompt: str
    guidance_scale: float
    version: int
    time: float
    step: int = 0  # levels behind it


@dataclass
class Flight:
    """The frames of a stream batch. `rows` has the memory of each level, the noisiest first; the last is the stream's.

    `prompts` says what each of these rows reads; `frames` are oldest first, one per level at most.
    """

    rows: list[int]
    prompts: list[str]
    frames: list[FlyingFrame] = field(default_factory=list)


@dataclass
class WorldState:
    """One stream: its row of the arena, the seed of its noise, and how far it is."""

    row: int
    seed: int
    frame: int = 0  # frames drawn
    prompt: str = ""
    turn: float = 0.0  # mouse movement that no turn has used up yet, pixels
    latents: Tensor | None = None  # of the last frame, [C, h, w]
    given: int = 0  # frames handed out: those drawn and those given again
    inputs: int = 0  # pictures that the similarity filter has looked at
    skipped: int = 0  # and how many it has left out in a row
    motion: float = 0.0  # of the input, smoothed, from 0 to 1
    wish: str = ""  # the control that the last picture was drawn under
    seen: Tensor | None = None  # that picture [3, H, W], if the next is compared with it
    picture: Tensor | None = None  # the last frame [3, H, W], if it may be given again
    shown_version: int = 0  # what that one was drawn under
    shown_time: float = field(default_factory=time.monotonic)  # and its time, which another process does not know
    flight: Flight | None = None


KINDS: dict[str, type] = {
    **dict.fromkeys(("seed", "frame", "given", "inputs", "skipped", "shown_version"), int),
    **dict.fromkeys(("turn", "motion"), float),
    **dict.fromkeys(("prompt", "wish"), str),
    **dict.fromkeys(("latents", "seen", "picture"), Tensor),
}
NEEDED = {"seed", "frame", "prompt", "turn"}  # what the first snapshots had; the rest has a beginning to fall back on
FLYING: dict[str, type] = {
    **dict.fromkeys(("latents", "sigmas", "action"), Tensor),
    **dict.fromkeys(("number", "version", "step"), int),
    "prompt": str,
    "guidance_scale": float,
}


def to_leaves(state: WorldState, caches: Sequence[Mapping[str, Any]]) -> Leaves:
    """A stream and its rows of the cache, its own one last, ready for a file."""
    leaves: Leaves = {CACHE + name: value for name, value in caches[-1].items()}
    for level, cache in enumerate(caches[:-1]):
        leaves |= {f"{LEVEL}{level}.{name}": value for name, value in cache.items()}
    for index, frame in enumerate(state.flight.frames if state.flight else ()):
        values = asdict(frame)
        values |= {name: torch.tensor(values[name], dtype=torch.float64) for name in ("sigmas", "action")}
        leaves |= {f"{FRAME}{index}.{name}": values[name] for name in FLYING}
    plain = {name: getattr(state, name) for name in KINDS}
    return leaves | {name: value for name, value in plain.items() if value is not None}


def from_leaves(leaves: Leaves) -> tuple[list[dict[str, Any]], list[FlyingFrame], dict[str, Any]]:
    """Each row's part of the cache (the stream's own one last), the frames under way, and the state's plain fields.

    Raises:
        ValueError: these are not the leaves of a world, or they contradict each other.
    """
    parts: dict[str, dict[str, Any]] = {}
    for name, value in leaves.items():
        group, dot, rest = name.partition(".")
        parts.setdefault(group if dot else "", {})[rest if dot else name] = value
    plain, own = parts.pop("", {}), parts.pop(CACHE[:-1], {})
    levels, flying = _numbered(parts, LEVEL), _numbered(parts, FRAME)
    caches = [*levels, own]
    if (
        parts
        or any(not {"k", "v", "sink_k", "count"} <= set(cache) for cache in caches)
        or not set(plain) >= NEEDED
        or not set(plain) <= set(KINDS)
        or any(set(frame) != set(FLYING) for frame in flying)
    ):
        raise ValueError(f"this is not the snapshot of a world: it holds {', '.join(sorted(leaves)[:8])}")
    for values, kinds in ((plain, KINDS), *((frame, FLYING) for frame in flying)):
        for name, value in values.items():
            if not isinstance(value, kinds[name]):
                raise ValueError(f"the snapshot is damaged: {name} is a {type(value).__name__}")
    for level, cache in enumerate(caches):
        drawn = plain["frame"] + sum(frame["step"] > level for frame in flying)
        if cache["count"] != drawn:
            raise ValueError(f"the snapshot is damaged: {cache['count']} frames in memory, {drawn} drawn")
    plain.setdefault("given", plain["frame"])
    return caches, [_flying(frame, len(caches)) for frame in flying], plain


def _numbered(parts: dict[str, dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Takes `name`0, `name`1, ... out of `parts`."""
    found = []
    while f"{name}{len(found)}" in parts:
        found.append(parts.pop(f"{name}{len(found)}"))
    return found


def _flying(values: dict[str, Any], levels: int) -> FlyingFrame:
    sigmas, action = values["sigmas"].tolist(), values["action"].tolist()
    if len(sigmas) != levels + 1 or not 0 <= values["step"] < levels:
        raise ValueError(f"the snapshot is damaged: a frame under way has {len(sigmas)} levels, its memory {levels}")
    # The clock of another process says nothing here: a frame that was under way counts as captured now.
    return FlyingFrame(**values | {"sigmas": sigmas, "action": action, "time": time.monotonic()})
