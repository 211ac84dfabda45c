"""The parts of `millstream live`: a window and a terminal that steer, and a video translated without hurry."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .window import Window
from .world import VIDEO_SCALE

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipelines.live_image import LiveImagePipeline
    from ..pipelines.world import WorldPipeline
    from ..streaming import Chunk, Session, VideoFile

SMALL = 256  # pixels high: what is smaller is enlarged in recordings
NUDGE = 0.05  # what one press of an arrow key adds to the strength


def enlargement(size: tuple[int, int]) -> int:
    """By how much to enlarge recordings of pictures of this size (height, width)."""
    return VIDEO_SCALE if size[0] < SMALL else 1


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
        super().write(replace(chunk, rate=math.inf))  # at once: the camera sets the pace
        for key in self.presses():
            self._obey(self._session, key)

    def _obey(self, session: Session, key: str) -> None:
        if key.startswith("Digit") and 0 < int(key[-1]) <= len(self._worlds):
            session.steer(prompt=self._worlds[int(key[-1]) - 1])
        elif key in ("ArrowUp", "ArrowDown"):
            nudge = NUDGE if key == "ArrowUp" else -NUDGE
            strength = (session.control.strength or 0.0) + nudge
            session.steer(strength=round(min(1.0, max(0.0, strength)), 2))


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
    pipe: WorldPipeline | LiveImagePipeline,
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

    rate = pipe.rate
    end = None if seconds is None else round(seconds * rate)
    with Recorder(path, rate=rate, scale=enlargement(pipe.size)) as recorder, tqdm(total=end, unit="frame") as progress:
        steady, start = Steady(recorder, rate=rate), time.monotonic()

        def write(chunks: Sequence[Chunk]) -> None:
            for chunk in chunks:
                steady.write(chunk)
                progress.update(len(chunk.data))

        try:
            for number, picture in enumerate(at_rate(video, video.rate, rate)):
                if number == end:
                    break
                write(session.step(Frame(fit(picture, pipe.size), number / rate)))
            write(session.flush())
        finally:
            took = time.monotonic() - start
            video.close()
            progress.close()
            recorder.close()
            if recorder.frames:
                length = f"{recorder.frames} frames ({recorder.frames / rate:.1f} s at {rate:g} frames/s)"
                print(f"{path}: {length}, drawn at {recorder.frames / took:.1f} frames/s")


def at_rate(pictures: Iterable[Tensor], rate: float, wanted: float) -> Iterator[Tensor]:
    """Pictures that come at `rate`, at the rate `wanted`: some are left out, or shown more than once."""
    given = 0
    for number, picture in enumerate(pictures):
        while given * rate <= number * wanted:
            yield picture
            given += 1
