"""What a stream notices about its input: is this picture worth drawing, and how fast does the view move?

Both compare pictures [3, H, W], in [0, 1] or in bytes, with the last one that was drawn. They read a value on the host,
so pictures are best left on the CPU, where cameras put them; there it costs no waiting for a GPU. And what is shown
where nothing new is ready.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels import philox_uniform
from ..streaming import Chunk, Control, WorldControl
from ..streaming.snapshot import control_fields
from .world_state import WorldState

MOST_SKIPPED = 10  # pictures in a row: a picture that changes very slowly must not be taken for a still one for ever
SKIP_NOISE = 1 << 21  # the noise step of the similarity filter; the sampler's steps count from 0
FULL_MOTION = 0.1  # root mean square of the difference; StreamDiffusionV2's 0.2 is for pictures in [-1, 1]
NEW_MOTION = 0.9  # weight of the newest motion against what was remembered


class Watching(Protocol):
    """What a stream keeps for the similarity filter; see `WorldState`."""

    seed: int
    inputs: int
    skipped: int
    wish: str
    seen: Tensor | None
    picture: Tensor | None
    shown_version: int
    shown_time: float


class Skipping(Protocol):
    """A control that has the filter's threshold."""

    @property
    def skip_similar(self) -> float | None: ...


def unit(picture: Tensor) -> Tensor:
    """A picture in floats from 0 to 1; bytes are divided."""
    return picture.float() / 255 if picture.dtype == torch.uint8 else picture.float()


def likeness(picture: Tensor, last: Tensor) -> float:
    """Cosine between two pictures as vectors of values in [-1, 1]; 1 for equal ones."""
    one, other = (2 * unit(each).flatten() - 1 for each in (picture, last.to(picture.device)))
    return float(F.cosine_similarity(one, other, dim=0))


def skip_probability(alike: float, threshold: float) -> float:
    """How likely a picture is to be left out: 0 up to `threshold`, 1 for a picture like the last.

    Source: stochastic similarity filter, Kodaira et al. 2023, StreamDiffusion (arXiv 2312.12491).
    """
    return 0.0 if threshold >= 1 else min(1.0, max(0.0, (alike - threshold) / (1 - threshold)))


def motion(picture: Tensor, last: Tensor, remembered: float) -> float:
    """Motion from 0 (still) to 1 (fast): the difference between two pictures, mixed with what is `remembered`.

    Source: motion-aware noise scheduler, Feng et al. 2025, StreamDiffusionV2 (arXiv 2511.07399), section 4.1; here the
    motion is smoothed instead of the noise rate, so that a strength that is steered counts at once.
    """
    difference = float((unit(picture) - unit(last.to(picture.device))).square().mean().sqrt())
    return NEW_MOTION * min(1.0, difference / FULL_MOTION) + (1 - NEW_MOTION) * remembered


def leaves_out(state: Watching, control: Skipping, picture: Tensor) -> bool:
    """Whether the similarity filter skips this picture: by chance, but by the stream's own seed.

    Never when the control has changed, nor more than `MOST_SKIPPED` times in a row.
    """
    if control.skip_similar is None or state.seen is None or state.picture is None:
        return False
    state.inputs += 1
    seed, count = torch.tensor([state.seed]), torch.tensor([state.inputs])
    chance = float(philox_uniform(seed, count, SKIP_NOISE, (1,)))
    left_out = (
        state.skipped < MOST_SKIPPED
        and state.wish == wish(control)
        and chance < skip_probability(likeness(picture, state.seen), control.skip_similar)
    )
    state.skipped = state.skipped + 1 if left_out else 0
    return left_out


def keep_shown(state: Watching, control: Skipping, chunks: Sequence[Chunk]) -> None:
    """Keep the last picture of a step, with its version and time, if the filter is on.

    Where a later step makes none it is shown once more. With a stream batch that is so when a still scene begins to
    move: its frames are under way while the still ones were left out.
    """
    if control.skip_similar is None:
        state.picture = None
    elif chunks:
        state.picture = chunks[-1].data.clone()
        state.shown_version, state.shown_time = chunks[-1].version, chunks[-1].time


def strength_for(state: WorldState, control: WorldControl, picture: Tensor) -> float:
    """How far to redraw this picture: the control's strength, less where it moves. The picture is remembered."""
    assert control.strength is not None
    if control.follow_motion and state.seen is not None:
        state.motion = motion(picture, state.seen, state.motion)
    else:
        state.motion = 0.0
    look_at(state, control, picture, always=control.follow_motion > 0)
    return control.strength * (1 - control.follow_motion * state.motion)


def look_at(state: Watching, control: Skipping, picture: Tensor, *, always: bool = False) -> None:
    """Remember the picture that is drawn, and what was asked for, if the next is to be compared with it."""
    compared = always or control.skip_similar is not None
    state.seen = picture.clone() if compared else None
    state.wish = wish(control) if control.skip_similar is not None else ""


def wish(control: Skipping) -> str:
    """What a control asks for, without its version and the movement that one step uses up."""
    assert isinstance(control, Control), "what is steered is a control"
    asked = control_fields(control)
    return json.dumps({name: asked[name] for name in asked.keys() - {"version", "mouse"}}, sort_keys=True)
