"""Generate with a video model, whose recipe says how it draws: from words, from a picture, or over another video."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..video import write_up_to
from ..world import scale_of
from .uploads import read_pictures

if TYPE_CHECKING:
    from .clips import ClipRequest


def make_video(
    pipe: Any, request: ClipRequest, prompt: str, output: Path, *, most: int, progress: Callable[[int, int], object]
) -> tuple[int, float]:
    """Draw `request` with a video model into the mp4 at `output`; as `clips.make_clip`.

    With a strength, the upload is redrawn, all of it and no more; without one, the clip begins with its last picture,
    which counts as one of the frames.

    Raises:
        ValueError: keys, steps or guidance, which a recipe does not leave open.
    """
    from ...streaming import Recorder

    if request.keys.strip():
        raise ValueError("this model has no keys; leave the key script empty")
    if request.num_inference_steps is not None or request.guidance_scale != 1:
        raise ValueError("steps and guidance are fixed by this model's recipe; leave them at 0 and 1")
    redrawn = request.upload is not None and request.strength > 0
    shown = []
    if request.upload is not None:
        shown = read_pictures(request.upload, size=pipe.size, rate=pipe.rate, most=most if redrawn else 1)
    total = len(shown) if redrawn else max(1, request.num_frames)
    given = {"strength": request.strength} if redrawn else {"image": shown[0] if shown else None}
    generator = torch.Generator().manual_seed(request.seed)
    start = time.monotonic()
    with (
        pipe.stream(prompt, generator=generator, **given) as session,
        Recorder(output, rate=pipe.rate, scale=scale_of(pipe.size)) as recorder,
    ):
        media = chain(shown, repeat(shown[-1])) if redrawn else None  # the last chunk wants to be full
        for chunks in pipe.drain(session, total, media):
            for chunk in chunks:
                write_up_to(recorder, chunk, total)
            progress(recorder.frames, total)
    return recorder.frames, time.monotonic() - start
