"""Shards as one long stream of frames that a trainer can index on any device.

A million 96x128 frames are 37 GB: they fit a large GPU, not every laptop. So shards stay memory-mapped files, and only
the small columns (actions, episodes, worlds) are joined in memory; `frames` joins the pictures when asked.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

HELD_OUT = 0.06
"""The last part of every shard is never trained on."""

Split = Literal["train", "held_out"]


@dataclass(frozen=True, slots=True, eq=False)
class Episodes:
    """Frames and what led to them, all shards one after another.

    Attributes:
        shards: one uint8 [n, H, W, 3] tensor per shard, memory-mapped.
        actions: uint8 [N, A]; `actions[i]` led to frame `i`, zeros where an episode begins.
        episodes: int64 [N]; frames of one episode share a number that no other episode has.
        world: int64 [N]; index into `names`.
        held_out: bool [N]; the last 6 % of every shard.
        names: world names.
        buttons: one name per action column.
    """

    shards: tuple[Tensor, ...]
    actions: Tensor
    episodes: Tensor
    world: Tensor
    held_out: Tensor
    names: tuple[str, ...]
    buttons: tuple[str, ...]

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Episodes:
        """Open every `*.safetensors` of `directory`, in the order of their names.

        Raises:
            FileNotFoundError: there are none.
            ValueError: shards whose frame size or buttons differ.
        """
        paths = sorted(Path(directory).glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"no shards (*.safetensors) in {directory}; collect some first")
        frames, actions, episodes, held_out, worlds, described = [], [], [], [], [], []
        begun = 0
        for path in paths:
            with safe_open(path, "pt") as shard:
                pictures, metadata = shard.get_tensor("frames"), shard.metadata()
                actions.append(shard.get_tensor("actions"))
                episodes.append(shard.get_tensor("episodes").long() + begun)
            count = len(pictures)
            frames.append(pictures)
            begun = int(episodes[-1][-1]) + 1
            held_out.append(torch.arange(count) >= count - round(HELD_OUT * count))
            worlds.append((int(metadata["world_index"]), metadata["world"], count))
            described.append((tuple(pictures.shape[1:]), metadata["buttons"]))
            if described[-1] != described[0]:
                raise ValueError(f"{path} holds {described[-1]}, but {paths[0]} holds {described[0]}; keep them apart")
        named = dict(sorted((index, name) for index, name, _ in worlds))
        position = {index: place for place, index in enumerate(named)}
        return cls(
            shards=tuple(frames),
            actions=torch.cat(actions),
            episodes=torch.cat(episodes),
            world=torch.cat([torch.full((count,), position[index]) for index, _, count in worlds]),
            held_out=torch.cat(held_out),
            names=tuple(named.values()),
            buttons=tuple(json.loads(described[0][1])),
        )

    def __len__(self) -> int:
        return len(self.actions)

    def share(self, index: int, count: int) -> Episodes:
        """The shards of process `index` of `count`: neighbouring ones, so that each share holds every world."""
        first, last = len(self.shards) * index // count, len(self.shards) * (index + 1) // count
        if first == last:
            raise ValueError(f"{len(self.shards)} shards cannot be shared by {count} processes; collect more shards")
        begin = sum(len(shard) for shard in self.shards[:first])
        rows = slice(begin, begin + sum(len(shard) for shard in self.shards[first:last]))
        columns = {name: getattr(self, name)[rows] for name in ("actions", "episodes", "world", "held_out")}
        return replace(self, shards=self.shards[first:last], **columns)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a frame."""
        return self.shards[0].shape[1], self.shards[0].shape[2]

    def frames(self, device: torch.device | str = "cpu") -> Tensor:
        """All frames, uint8 [N, H, W, 3], joined on `device` (37 GB per million frames of 96x128)."""
        joined = torch.empty(len(self), *self.shards[0].shape[1:], dtype=torch.uint8, device=device)
        at = 0
        for shard in self.shards:
            joined[at : at + len(shard)].copy_(shard)
            at += len(shard)
        return joined

    def take(self, indices: Tensor) -> Tensor:
        """Frames at `indices` (any shape), uint8 [..., H, W, 3], read from the files without joining them."""
        flat = indices.reshape(-1).cpu()
        ends = torch.tensor([len(shard) for shard in self.shards]).cumsum(0)
        which = torch.searchsorted(ends, flat, right=True)
        out = torch.empty(len(flat), *self.shards[0].shape[1:], dtype=torch.uint8)
        for number in which.unique().tolist():
            here = which == number
            out[here] = self.shards[number][flat[here] - (int(ends[number]) - len(self.shards[number]))]
        return out.reshape(*indices.shape, *out.shape[1:])

    def windows(self, length: int, split: Split = "train") -> Tensor:
        """Starts `i`, int64, ascending, such that frames `i .. i + length - 1` lie in one episode and in `split`.

        Raises:
            ValueError: `length` below 1, or an unknown split.
        """
        if length < 1:
            raise ValueError(f"a window needs at least 1 frame, got length {length}")
        if split not in ("train", "held_out"):
            raise ValueError(f"split must be 'train' or 'held_out', got {split!r}")
        # Episodes are numbered upwards and splits are runs, so a window is whole exactly when its two ends agree.
        first, last = slice(0, max(0, len(self) - length + 1)), slice(length - 1, None)
        same_episode = self.episodes[first] == self.episodes[last]
        wanted = torch.full_like(self.held_out, split == "held_out")
        right_split = (self.held_out[first] == wanted[first]) & (self.held_out[last] == wanted[last])
        return (same_episode & right_split).nonzero()[:, 0]
