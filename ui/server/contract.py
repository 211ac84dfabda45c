"""What the parts of the server owe each other: the pipeline, the viewer, and what travels between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ...streaming import Chunk, Session, Snapshot, Streamable
from .protocol import Close

Mode = Literal["play", "camera"]


class Servable(Streamable[Any, Any], Protocol):
    """A pipeline that can be served. It may also have `worlds`, `key_map` and `nearest_world`."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a frame; camera pictures are brought to it."""
        ...

    def stream(self, prompt: str, *, generator: torch.Generator | None = None) -> Session[Any, Any]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A frame on its way to a viewer: `data` [3, H, W], the serial number `frame`, and `time` in milliseconds."""

    data: Tensor
    version: int
    frame: int
    time: float


class Viewer(Protocol):
    """The far end of a seat: a socket. All but `queued` and `end` are called on the engine's thread; none waits."""

    def show(self, pictures: Sequence[tuple[float, Picture]]) -> None:
        """Pictures and the monotonic second at which each is due."""
        ...

    def hear(self, chunk: Chunk) -> None: ...

    def said(self) -> None:
        """Everything that was asked for is said: the silence that follows is meant."""
        ...

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


class Vault(Protocol):
    """Keeps the last moment of every session where other servers of the same pipeline can find it."""

    def open(self, lose: Callable[[str], object]) -> None:
        """Begin. `lose` may be called from any thread, with the secret of a session that another server has taken."""
        ...

    def close(self) -> None: ...

    def put(self, saved: Saved) -> None:
        """Called on the engine's thread about once a second per session; must not wait."""
        ...

    async def find(self, secret: str) -> Saved | None:
        """Take the session over from whichever server has it."""
        ...

    def forget(self, secret: str) -> None:
        """The session has ended."""
        ...
