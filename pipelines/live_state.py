"""What one stream of live images is, and how a saved one is read back."""

from __future__ import annotations

import json
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..streaming import ImageControl
from ..streaming.snapshot import control_fields
from ..streaming.types import Leaves
from .live_lanes import Arriving
from .live_levels import Levels
from .live_networks import Told

DrawnFrom = Literal["picture", "words"]
FRAME = "flight"


@dataclass
class LiveFrame:
    """A picture between two noise levels. It stays what it was asked for when it came in."""

    latents: Tensor  # [C, h, w], in the convention of `live_levels`
    reference: Tensor  # [C, h, w]: what residual guidance takes for the clean input
    number: int
    control: ImageControl
    levels: Levels
    time: float
    told: Told
    drawn_from: DrawnFrom = "picture"
    step: int = 0
    ready: torch.cuda.Event | None = None  # after which another lane may read the latents

    @property
    def finished(self) -> bool:
        """Is there only the decoding left?"""
        return self.step >= len(self.levels.steps)


@dataclass
class LiveImageState:
    """One stream: the seed of its noise, how far it is, what is under way. Names as in `WorldState`."""

    seed: int
    frame: int = 0  # pictures that came in
    given: int = 0
    inputs: int = 0
    skipped: int = 0
    wish: str = ""
    told: tuple[Hashable, Told] | None = None  # the last prompt that was read, and so on
    seen: Tensor | None = None
    picture: Tensor | None = None
    shown_version: int = 0
    shown_time: float = field(default_factory=time.monotonic)
    flying: list[LiveFrame] = field(default_factory=list)
    arriving: list[tuple[Arriving, int, float]] = field(default_factory=list)  # drawn, on the way to the host


PLAIN = dict.fromkeys(("seed", "frame", "given", "inputs", "skipped", "shown_version"), int) | {"wish": str}
OPTIONAL = ("seen", "picture")
FLYING = {"latents": Tensor, "reference": Tensor, "number": int, "step": int, "control": str, "drawn_from": str}


def to_leaves(state: LiveImageState) -> Leaves:
    """A stream, ready for a file. Pictures on their way to the host must have arrived."""
    leaves: Leaves = {name: getattr(state, name) for name in PLAIN}
    leaves |= {name: value.clone() for name in OPTIONAL if (value := getattr(state, name)) is not None}
    for index, frame in enumerate(state.flying):
        values = {name: getattr(frame, name) for name in FLYING}
        values["control"] = json.dumps(control_fields(frame.control), sort_keys=True)
        leaves |= {
            f"{FRAME}{index}.{name}": value.clone() if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
    return leaves


def from_leaves(leaves: Leaves) -> tuple[dict[str, Any], Sequence[Mapping[str, Any]]]:
    """The state's plain fields, and those of each frame under way (with a control, without levels and time).

    Raises:
        ValueError: these are not the leaves of live images, or they are damaged.
    """
    frames: list[dict[str, Any]] = []
    while any(name.startswith(f"{FRAME}{len(frames)}.") for name in leaves):
        start = f"{FRAME}{len(frames)}."
        frames.append({name.removeprefix(start): value for name, value in leaves.items() if name.startswith(start)})
    plain = {name: value for name, value in leaves.items() if "." not in name}
    if not PLAIN.keys() <= plain.keys() <= {*PLAIN, *OPTIONAL} or any(
        frame.keys() != FLYING.keys() for frame in frames
    ):
        raise ValueError(f"this is not the snapshot of live images: it holds {', '.join(sorted(leaves)[:8])}")
    for values, kinds in ((plain, {**PLAIN, **dict.fromkeys(OPTIONAL, Tensor)}), *((each, FLYING) for each in frames)):
        for name, value in values.items():
            if not isinstance(value, kinds[name]):
                raise ValueError(f"the snapshot is damaged: {name} is a {type(value).__name__}")
    for frame in frames:
        try:
            frame["control"] = ImageControl(**json.loads(frame["control"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the snapshot is damaged: {error}") from None
        if frame["drawn_from"] not in ("picture", "words"):
            raise ValueError(f"the snapshot is damaged: a frame is drawn from {frame['drawn_from']!r}")
        # The clock of another process says nothing here.
        frame["time"] = time.monotonic()
    return plain, frames
