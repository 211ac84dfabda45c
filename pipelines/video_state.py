"""What one stream of video is, and how a saved one is read back.

C latent channels, h x w latent size, S x D a prompt's tokens. Latents are float32: they are what a stream is made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.stream_codec import CodecState
from ..streaming.types import Leaves

CODECS = ("decoding", "encoding")


class Finished(NamedTuple):
    """A chunk [C, F, h, w], and the version of the control it was begun under."""

    latents: Tensor
    version: int


@dataclass
class VideoState:
    """One stream: its rows of memory, the seed of its noise, its codecs, and how far it is."""

    rows: list[int]
    seed: int
    decoding: CodecState
    history: Tensor  # [C, n, h, w], a ring of the last finished frames
    frame: int = 0  # finished frames, since ever
    shot: int = 0  # and since the last cut
    pictures: int = 0  # given out
    step: int = 0  # of the plan, since it began (anew)
    encoding: CodecState | None = None  # of an input, once there is one
    prompt: str | None = None
    heard: int = -1  # version of the last control that was obeyed
    pending: str | None = None  # a switch that a step has read which drew nothing
    text: Tensor | None = None  # [S, D], what the prompt is now
    origin: Tensor | None = None  # [S, D], the prompt that is being left
    target: Tensor | None = None  # [S, D], the prompt that is being reached
    blend: int = 0  # chunks on the way from one to the other
    flying: Tensor | None = None  # [C, n, h, w], frames under way, the oldest first
    versions: Tensor | None = None  # int64, the control that each chunk under way was begun under
    waiting: Tensor | None = None  # [C, n, h, w], encoded input that does not fill a chunk yet
    still: Tensor | None = None  # [C, 1, h, w], the picture that a stream starts from, until it is decoded
    ahead: Tensor | None = None  # [C, n, h, w], drawn and not decoded yet, and
    ahead_version: int = 0  # the control it was begun under, and
    ahead_time: float = 0.0  # when
    corner: Tensor | None = None  # [3, H, W], what the first frame of a memory that begins anew is encoded from
    scene: Tensor | None = None  # [C, n, h, w], the picture that a played world begins with, and grey
    pressed: Tensor | None = None  # [2, buttons + 2], keys and camera of the last chunk and of this one
    seen: Tensor | None = None  # [3, H, W], the last picture of an input
    fastest: float = 0.0  # movement in it since the last chunk
    motion: float = 0.0  # how fast it moves, smoothed
    finished: list[Tensor] = field(default_factory=list)  # [C, n, h, w] of the last step; not saved
    drawn: Any = None  # the CUDA event after which `ahead` is there; not saved

    def join(self, fresh: Tensor, version: int) -> None:
        """One more chunk [C, F, h, w] is under way."""
        mark = torch.tensor([version])
        self.flying = fresh if self.flying is None else torch.cat([self.flying, fresh], dim=1)
        self.versions = mark if self.versions is None else torch.cat([self.versions, mark])

    def leave(self, chunk: int) -> Finished:
        """The oldest `chunk` frames are finished, and under way no longer."""
        assert self.flying is not None
        assert self.versions is not None
        done = Finished(self.flying[:, :chunk], int(self.versions[0]))
        rest = self.flying.shape[1] > chunk
        self.flying, self.versions = (self.flying[:, chunk:], self.versions[1:]) if rest else (None, None)
        self.note(done.latents)
        return done

    def recall(self, count: int) -> Tensor:
        """The last `count` finished frames [C, count, h, w], the oldest first."""
        last = torch.arange(self.frame - count, self.frame, device=self.history.device)
        return self.history[:, last % self.history.shape[1]]

    def note(self, latents: Tensor) -> None:
        """`latents` [C, n, h, w] are finished."""
        count, room = latents.shape[1], self.history.shape[1]
        kept = min(count, room)
        places = torch.arange(self.frame + count - kept, self.frame + count, device=latents.device) % room
        self.history[:, places] = latents[:, count - kept :]
        self.frame += count
        self.shot += count
        self.finished.append(latents)


PLAIN = {each.name: each for each in fields(VideoState) if each.name not in ("rows", "finished", "drawn", *CODECS)}
KINDS = {"int": (int,), "float": (int, float), "str | None": (str,), "Tensor": (Tensor,), "Tensor | None": (Tensor,)}
LATER = {"ahead_version", "ahead_time", "heard"}  # which older snapshots lack
NEEDED = {name for name, each in PLAIN.items() if "None" not in str(each.type)} - LATER


def to_leaves(state: VideoState, memory: list[dict[str, Tensor | int]]) -> Leaves:
    """A stream and its rows of memory, ready for a file."""
    leaves: Leaves = {"rows": len(memory)}
    for name in PLAIN:
        value = getattr(state, name)
        if value is not None:
            leaves[name] = value.clone() if isinstance(value, Tensor) else value
    for number, row in enumerate(memory):
        leaves |= {f"memory.{number}.{name}": value for name, value in row.items()}
    for codec in CODECS:
        running: CodecState | None = getattr(state, codec)
        if running is not None:
            leaves |= {f"{codec}.{name}": value for name, value in running.snapshot().items()}
    return leaves


def from_leaves(
    leaves: Mapping[str, Tensor | int | float | str], rows: int | None
) -> dict[str, Tensor | int | float | str]:
    """The state's own fields. ValueError if these are not the leaves of a stream of video with so many rows."""
    plain = {name: value for name, value in leaves.items() if name in PLAIN}
    strange = sorted(
        name
        for name in leaves.keys() - plain.keys() - {"rows", "made"}
        if name.partition(".")[0] not in ("memory", *CODECS)
    )
    if strange or not plain.keys() >= NEEDED:
        raise ValueError(f"this is not the snapshot of a video stream: it holds {', '.join(sorted(leaves)[:8])}")
    if rows is not None and leaves.get("rows") != rows:
        raise ValueError(f"the snapshot has {leaves.get('rows')} rows of memory, this pipeline's recipe has {rows}")
    wrong = [name for name, value in plain.items() if not isinstance(value, KINDS[str(PLAIN[name].type)])]
    if wrong:
        raise ValueError(f"the snapshot is damaged: {wrong[0]} is a {type(plain[wrong[0]]).__name__}")
    return plain


def part(leaves: Mapping[str, Tensor | int | float | str], prefix: str) -> dict[str, Tensor | int | float | str]:
    """The leaves under `prefix.`, without it."""
    return {name.removeprefix(prefix + "."): value for name, value in leaves.items() if name.startswith(prefix + ".")}
