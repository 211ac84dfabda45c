"""What Generate does: words, an image or a video become an mp4. The pipeline's own stream, drained under a progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ...streaming.live import pictures_per_chunk
from ..keys import KeyScript
from ..server.protocol import MAX_STEPS
from ..world import VIDEO_SCALE, check_prompt
from .uploads import read_pictures

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """A clip as asked for.

    Attributes:
        prompt: the scene in words.
        num_frames: frames to draw; after an upload it may be 0.
        seed: same seed, keys and upload, same clip; from 0 to 2**63 - 1.
        num_inference_steps: sampler steps per frame, at most 50; None for the model's own.
        guidance_scale: above 1 follows the prompt harder at twice the cost.
        keys: a key script such as "KeyW*40 ArrowLeft*20", for worlds.
        upload: an image or a video that the clip begins with.
        strength: how far the upload is redrawn, from 0 (only shown) to 1 (ignored).
    """

    prompt: str
    num_frames: int
    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float = 1.0
    keys: str = ""
    upload: Path | None = None
    strength: float = 0.0


def make_clip(
    pipe: Any, request: ClipRequest, output: Path, *, most: int, progress: Callable[[int, int], object]
) -> tuple[int, float]:
    """Draw `request` with `pipe` into the mp4 at `output`.

    The clip begins with the upload and goes on from it. Shown as it is, only the end of a video that the model can
    remember is taken; redrawn, all of it.

    Args:
        pipe: has `stream`, `rate`, `size` and, for a world, `key_map`.
        most: frames that may be drawn.
        progress: called with (frames done, frames in all) after each.

    Returns:
        Frames in the clip, and seconds it took to draw them.

    Raises:
        ValueError, TypeError: something in `request` is out of range; says what, and the range.
    """
    from ...streaming import Frame, Recorder
    from .video_clips import make_video

    least = 1 if request.upload is None else 0
    if not least <= request.num_frames <= most:
        raise ValueError(f"frames must be from {least} to {most}, got {request.num_frames}")
    if not 0 <= request.seed <= MAX_SEED:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, got {request.seed}")
    if (request.num_inference_steps or 0) > MAX_STEPS:
        raise ValueError(f"steps per frame must be at most {MAX_STEPS}, got {request.num_inference_steps}")
    prompt = check_prompt(request.prompt)
    if pictures_per_chunk(pipe) > 1:
        return make_video(pipe, request, prompt, output, most=most, progress=progress)
    held = _keys(pipe, request.keys)
    shown = []
    if request.upload is not None:
        kept = most if request.strength else pipe.window.frames
        shown = read_pictures(request.upload, size=pipe.size, rate=pipe.rate, most=kept)
    total = len(shown) + request.num_frames
    generator = torch.Generator().manual_seed(request.seed)
    start = time.monotonic()
    with (
        pipe.stream(
            prompt,
            generator=generator,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
        ) as session,
        Recorder(output, rate=pipe.rate, scale=VIDEO_SCALE) as recorder,
    ):
        if shown and request.strength:
            session.steer(strength=request.strength)
        for picture in shown:
            for chunk in session.step(Frame(picture, time.monotonic())):
                recorder.write(chunk)
            progress(recorder.frames, total)
        while recorder.frames < total:
            if held is not None:
                session.steer(keys=next(held))
            for chunk in session.step():
                recorder.write(chunk)
            progress(recorder.frames, total)
    return recorder.frames, time.monotonic() - start


def _keys(pipe: Any, script: str) -> Iterator[frozenset[str]] | None:
    """The keys held in each frame; None where the model has none."""
    key_map = getattr(pipe, "key_map", None)
    if key_map is None:
        if script.strip():
            raise ValueError("this model has no keys; leave the key script empty")
        return None
    return iter(KeyScript.parse(script, key_map))


def remove_old(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` clips of `folder`."""
    clips = sorted(folder.glob("*.mp4"), key=lambda path: path.stat().st_mtime, reverse=True)
    for clip in islice(clips, keep, None):
        with suppress(FileNotFoundError):
            clip.unlink()
