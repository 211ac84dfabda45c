"""The model under the same keys as the true game: clips that begin with true frames and go on in the model's mind."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..pipelines.world import WorldPipeline
from ..streaming import Frame, step_together
from .dataset import Episodes
from .measures import images
from .prompts import world_named

CONTEXT = 8
"""True frames that the model sees before it draws."""


@dataclass(frozen=True, slots=True)
class Clips:
    """Pieces of true episodes, one per row.

    Attributes:
        frames: uint8 [N, L, H, W, 3].
        actions: uint8 [N, L, A]; `actions[:, i]` led to frame `i`.
        world: int64 [N], index into `names`.
        starts: int64 [N], where each begins in the data.
    """

    frames: Tensor
    actions: Tensor
    world: Tensor
    starts: Tensor
    names: tuple[str, ...]
    buttons: tuple[str, ...]

    def by_world(self, values: Tensor) -> dict[str, float]:
        """Mean of one value per clip [N], for each world."""
        return {name: float(values[self.world == index].mean()) for index, name in enumerate(self.names)}


def candidates(episodes: Episodes, length: int, split: Literal["held_out", "all"]) -> Tensor:
    """Starts of whole windows of `length` frames: in the held-out part, or anywhere in data of another seed."""
    held_out = episodes.windows(length, "held_out")
    if split == "held_out":
        return held_out
    return torch.cat([episodes.windows(length, "train"), held_out]).sort().values


def choose(
    episodes: Episodes, per_world: int, length: int, split: Literal["held_out", "all"], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Starts and worlds, int64 [worlds * per_world]: spread over each world's data, and random within that.

    Raises:
        ValueError: a world has too few windows.
    """
    starts = candidates(episodes, length, split)
    chosen = []
    for index, name in enumerate(episodes.names):
        mine = starts[episodes.world[starts] == index]
        if len(mine) < per_world:
            raise ValueError(
                f"{name} has {len(mine)} windows of {length} frames in split {split!r}, but {per_world} are wanted; "
                "collect longer shards, or ask for fewer starts or a shorter horizon"
            )
        part = (torch.arange(per_world) + torch.rand(per_world, generator=generator)) / per_world
        chosen.append(mine[(part * len(mine)).long()])
    return torch.cat(chosen), torch.arange(len(episodes.names)).repeat_interleave(per_world)


def cut(episodes: Episodes, starts: Tensor, world: Tensor, length: int) -> Clips:
    """The true clips of `length` frames that begin at `starts`."""
    where = starts[:, None] + torch.arange(length)
    return Clips(episodes.take(where), episodes.actions[where], world, starts, episodes.names, episodes.buttons)


def keys_of(pipe: WorldPipeline, buttons: Sequence[str]) -> list[str]:
    """For each button one key that presses it."""
    key_of = {button: key for key, button in reversed(pipe.key_map.items())}
    missing = [button for button in buttons if button not in key_of]
    if missing:
        raise ValueError(f"no key of the model presses {', '.join(missing)}; it knows {', '.join(key_of)}")
    return [key_of[button] for button in buttons]


def draw(
    pipe: WorldPipeline,
    prompts: Sequence[str],
    context: Tensor,
    actions: Tensor,
    keys: Sequence[str],
    *,
    steps: int | None,
    seed: int,
    title: str | None,
) -> Iterator[Tensor]:
    """Streams that are shown `context` and then draw on, all together.

    Args:
        prompts: one per stream.
        context: uint8 [N, C, H, W, 3].
        actions: [N, L, A], the first C of them led to the context.
        keys: one key code per button, see `keys_of`.
        steps: sampler steps; None takes the model's own.
        seed: stream `i` draws its noise from `seed + i`.
        title: of the progress bar; None shows none.

    Yields:
        L - C times the next frame of every stream, uint8 [N, H, W, 3] on the CPU.
    """
    shown = images(context)
    pressed = [[{key for key, down in zip(keys, row) if down} for row in clip] for clip in (actions != 0).tolist()]
    with ExitStack() as stack:
        sessions = [
            stack.enter_context(
                pipe.stream(prompt, generator=torch.Generator().manual_seed(seed + row), num_inference_steps=steps)
            )
            for row, prompt in enumerate(prompts)
        ]
        for number in tqdm(range(actions.shape[1]), desc=title, unit="frame", disable=title is None, mininterval=2):
            for session, script in zip(sessions, pressed):
                session.steer(keys=script[number])
            told = number < context.shape[1]
            media = [Frame(clip[number], time.monotonic()) for clip in shown] if told else None
            drawn = step_together(sessions, media)
            if not told:
                pictures = torch.stack([chunks[0].data[0] for chunks in drawn])
                yield (pictures * 255).round().to(torch.uint8).movedim(1, -1).cpu()


def continue_clips(
    pipe: WorldPipeline,
    clips: Clips,
    *,
    horizons: Sequence[int],
    steps: int | None,
    seed: int,
    batch_size: int,
    title: str | None,
) -> Tensor:
    """What the model draws after the first `CONTEXT` frames of each clip, under the clip's own actions.

    Args:
        horizons: which drawn frames to return, ascending, counted from 1: `h` compares with `truth(clips, [h])`.
        batch_size: streams that step together. Their noise depends on `seed` and the clip's place alone.

    Returns:
        uint8 [N, len(horizons), H, W, 3].
    """
    keys, prompts = keys_of(pipe, clips.buttons), [world_named(name).caption for name in clips.names]
    kept, parts = set(horizons), []
    for rows in torch.arange(len(clips.world)).split(batch_size):
        drawing = draw(
            pipe,
            [prompts[index] for index in clips.world[rows].tolist()],
            clips.frames[rows, :CONTEXT],
            clips.actions[rows, : CONTEXT + max(horizons)],
            keys,
            steps=steps,
            seed=seed + int(rows[0]),
            title=None if title is None else f"{title} {int(rows[-1]) + 1}/{len(clips.world)}",
        )
        parts.append(torch.stack([frame for number, frame in enumerate(drawing, 1) if number in kept], dim=1))
    return torch.cat(parts)


def truth(clips: Clips, horizons: Sequence[int]) -> Tensor:
    """The true frames at `horizons`, uint8 [N, len(horizons), H, W, 3]."""
    return clips.frames[:, [CONTEXT + horizon - 1 for horizon in horizons]]


@torch.no_grad()
def reconstruct(pipe: WorldPipeline, frames: Tensor, batch_size: int = 32) -> Tensor:
    """True frames through the codec and back: uint8 [..., H, W, 3] like `frames`."""
    flat = frames.flatten(0, -4)
    parts = []
    for part in flat.split(batch_size):
        latents = pipe.codec.encode(images(part)[:, None].to(pipe.device, pipe.codec.dtype))
        pictures = pipe.codec.decode(latents)[:, 0].float()
        parts.append((pictures * 255).round().to(torch.uint8).movedim(1, -1).cpu())
    return torch.cat(parts).reshape(frames.shape)
