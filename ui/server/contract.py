"""What the parts of the server owe each other: the pipeline, the viewer, and what travels between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ...streaming import Chunk, Session, Snapshot, Streamable
from .protocol import Close

Mode = Literal["play", "camera"]


class Servable(Streamable[Any, Any], Protocol):
    """A pipeline that can be served. It may also have `worlds`, `key_map` and `nearest_world`.

    Attributes:
        size: (height, width) of a frame; camera pictures are brought to it.
    """

    size: tuple[int, int]

    def stream(self, prompt: str, *, generator: torch.Generator | None = None) -> Session[Any, Any]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A frame on its way to a viewer: `data` [3, H, W], the serial number `frame`, and `time` in milliseconds."""

    data: Tensor
    version: int
    frame: int
    time: float


class Viewer(Protocol):
    """The far end of a seat: a socket. `show`, `hear` and `forget` are called on the engine's thread and never wait."""

    def show(self, pictures: Sequence[tuple[float, Picture]]) -> None:
        """Pictures and the monotonic second at which each is due."""
        ...

    def hear(self, chunk: Chunk) -> None: ...

    def forget(self) -> None:
        """What was shown but isn't due yet belongs to a past that is gone."""
        ...

    def queued(self, position: int) -> None:
        """So many stand in the queue up to this viewer, who counts too."""
        ...

    def end(self, code: Close, message: str) -> None:
        """Say goodbye and close."""
        ...


@dataclass(frozen=True, slots=True)
class Saved:
    """All that a seat is, apart from its socket and its files: another server can go on from it."""

    snapshot: Snapshot
    secret: str
    mode: Mode
    seed: int
    running: bool
    frame: int
    timeline: tuple[dict[str, Any], ...]
