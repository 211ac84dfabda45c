"""What one stream of a world is, and how a saved one is read back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from ..streaming.types import Leaves

CACHE = "cache."


@dataclass
class WorldState:
    """One stream: its row of the arena, the seed of its noise, and how far it is."""

    row: int
    seed: int
    frame: int = 0
    prompt: str = ""
    turn: float = 0.0  # mouse movement that no turn has used up yet, pixels
    latents: Tensor | None = None  # of the last frame, [C, h, w]


def to_leaves(state: WorldState, cache: dict[str, Any]) -> Leaves:
    """A stream and its row of the cache, ready for a file."""
    leaves: Leaves = {CACHE + name: value for name, value in cache.items()}
    return leaves | {name: value for name, value in asdict(state).items() if name != "row" and value is not None}


def from_leaves(leaves: Leaves) -> tuple[dict[str, Any], dict[str, Any]]:
    """The cache's part and the state's fields, without its row.

    Raises:
        ValueError: these are not the leaves of a world, or they contradict each other.
    """
    cache = {name.removeprefix(CACHE): value for name, value in leaves.items() if name.startswith(CACHE)}
    known = {field.name for field in fields(WorldState)} - {"row"}
    plain = {name: value for name, value in leaves.items() if not name.startswith(CACHE)}
    if (
        not {"k", "v", "sink_k", "count"} <= set(cache)
        or not {"seed", "frame", "prompt", "turn"} <= set(plain) <= known
    ):
        raise ValueError(f"this is not the snapshot of a world: it holds {', '.join(sorted(leaves)[:8])}")
    kinds = {"seed": int, "frame": int, "prompt": str, "turn": float, "latents": Tensor}
    wrong = [name for name, value in plain.items() if not isinstance(value, kinds[name])]
    if wrong:
        raise ValueError(f"the snapshot is damaged: {wrong[0]} is a {type(plain[wrong[0]]).__name__}")
    if cache["count"] != plain["frame"]:
        raise ValueError(f"the snapshot is damaged: {cache['count']} frames in memory, {plain['frame']} drawn")
    return cache, plain
