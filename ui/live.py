"""The parts of `millstream live`: a window and a terminal that steer, and a video translated without hurry."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .window import Window
from .world import scale_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipelines.live_image import LiveImagePipeline
    from ..pipelines.video import VideoPipeline
    from ..pipelines.world import WorldPipeline
    from ..streaming import Chunk, Frame, Session, VideoFile

NUDGE = 0.05  # what one press of an arrow key adds to the strength


class SteeringWindow(Window):
    """A window whose digits choose a world and whose up and down arrows change the strength."""

    def __init__(self) -> None:
        super().__init__("millstream")
        self._session: Session | None = None
        self._worlds: Sequence[str] = ()

    def steers(self, session: Session, worlds: Sequence[str]) -> None:
        """From now on keys steer `session`; digits stand for `worlds`."""
        self._session, self._worlds = session, worlds

    def write(self, chunk: Chunk) -> None:
        assert self._session is not None, "the window was told whom it steers"
        control = self._session.control
        strength = "true frames" if control.strength is None else f"strength {control.strength:.2f}"
        self.caption = f"{strength}   {control.prompt}"
        single = len(chunk.data) == 1  # is shown at once: the camera sets the pace
        super().write(replace(chunk, rate=math.inf) if single else chunk)
        for key in self.presses():
            self._obey(self._session, key)

    def _obey(self, session: Session, key: str) -> None:
        if key.startswith("Digit") and 0 < int(key[-1]) <= len(self._worlds):
            session.steer(prompt=self._worlds[int(key[-1]) - 1])
        elif key in ("ArrowUp", "ArrowDown"):
            nudge = NUDGE if key == "ArrowUp" else -NUDGE
            strength = (session.control.strength or 0.0) + nudge
            try:
                session.steer(strength=round(min(1.0, max(0.0, strength)), 2))
            except ValueError as error:  # of an image pipeline: less than one of its steps
                print(error, file=sys.stderr)


def hear(lines: Iterable[str], session: Session) -> None:
    """Steer `session` by lines: a number is a strength, anything else a prompt; a bad one is told and dropped."""
    for line in lines:
        words = line.strip()
        try:
            if words:
                session.steer(**_asked(words))
        except (ValueError, TypeError) as error:
            print(error, file=sys.stderr)


def _asked(words: str) -> dict[str, Any]:
    try:
        return {"strength": float(words)}
    except ValueError:
        return {"prompt": words}


def translate(
    pipe: WorldPipeline | VideoPipeline | LiveImagePipeline,
    video: VideoFile,
    session: Session,
    path: Path,
    *,
    seconds: float | None = None,
) -> None:
    """Redraw `video` into the mp4 at `path`, as fast as the machine can, and say how it went.

    Nothing is dropped for being late: the video is read at the pipeline's rate, so the same seed gives the same file.
    Interrupted, the file holds what was drawn until then.

    Args:
        session: of `pipe`, opened with a strength.
        seconds: of the video; all of it by default.
    """
    from tqdm import tqdm

    from ..streaming import Frame, Recorder, Steady, fit
    from ..streaming.live import pictures_per_chunk

    rate = pipe.rate
    end = None if seconds is None else round(seconds * rate)
    scale = scale_of(pipe.size)
    with Recorder(path, rate=rate, scale=scale) as recorder, tqdm(total=end, unit="frame") as progress:
        together, start = pictures_per_chunk(pipe), time.monotonic()
        # who answers several pictures at once gives one for each, without a time of its own
        sink = recorder if together > 1 else Steady(recorder, rate=rate)
        read = islice(at_rate(video, video.rate, rate), end)
        frames = (Frame(fit(picture, pipe.size), number / rate) for number, picture in enumerate(read))
        try:
            for chunks in redrawn(session, frames, together):
                for chunk in chunks:
                    sink.write(chunk)
                    progress.update(len(chunk.data))
        finally:
            took = time.monotonic() - start
            video.close()
            progress.close()
            recorder.close()
            if recorder.frames:
                length = f"{recorder.frames} frames ({recorder.frames / rate:.1f} s at {rate:g} frames/s)"
                print(f"{path}: {length}, drawn at {recorder.frames / took:.1f} frames/s")


def redrawn(session: Session, frames: Iterable[Frame], together: int) -> Iterator[Sequence[Chunk]]:
    """What `session` makes of `frames`; of a model that answers several `together`, one frame for each.

    The last lot is filled up with its last picture, and what that makes is cut off again.
    """
    last, missing = None, 0
    for last in frames:
        missing += 1
        chunks = session.step(last)
        missing -= sum(len(chunk.data) for chunk in chunks)
        yield chunks
    if last is None or together == 1:
        yield session.flush()
        return
    fillers = [lambda: session.step(last)] * together
    for draw in [*fillers, session.flush]:
        for chunk in draw() if missing > 0 else ():
            kept = chunk.data[: max(0, missing)]
            missing -= len(kept)
            if len(kept):
                yield [replace(chunk, data=kept)]


def at_rate(pictures: Iterable[Tensor], rate: float, wanted: float) -> Iterator[Tensor]:
    """Pictures that come at `rate`, at the rate `wanted`: some are left out, or shown more than once."""
    given = 0
    for number, picture in enumerate(pictures):
        while given * rate <= number * wanted:
            yield picture
            given += 1
