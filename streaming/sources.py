"""Sources of pictures: a camera, and a video file that plays like one. Frames are RGB [3, H, W] in [0, 1]."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .types import EndOfStream, Frame

SILENCE_SECONDS = 2.0  # many webcams give nothing while they warm up; longer than this, the plug is out


class Camera:
    """A webcam. `read` waits for the camera's next frame, so call it from a thread of its own, as `live` does.

    Args:
        index: 0 is the first camera.

    Raises:
        OSError: there is no such camera, or another program holds it.
    """

    def __init__(self, index: int = 0) -> None:
        cv2 = opencv()
        self.index = index
        with Quiet(cv2):
            self._capture = cv2.VideoCapture(index)
        if not self._capture.isOpened():
            raise OSError(f"camera {index} cannot be opened: is it plugged in, allowed, and free of other programs?")
        self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # a driver's queue is age that nobody asked for
        self._last = time.monotonic()

    def read(self) -> Frame | None:
        """The newest frame, None if the camera skipped one.

        Raises:
            OSError: the camera has been silent for `SILENCE_SECONDS`.
        """
        ok, image = self._capture.read()
        now = time.monotonic()
        if ok:
            self._last = now
            return Frame(rgb(image), now)
        if now - self._last > SILENCE_SECONDS:
            raise OSError(f"camera {self.index} gives no frames any more: was it unplugged?")
        return None

    def close(self) -> None:
        self._capture.release()


class Playback:
    """When the frames of a file are due: at its own rate, counted from the first look at the clock.

    A reader that is slower than the file plays it slower: frames never grow old in here.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._start: float | None = None
        self._index = 0

    def due(self, now: float) -> float | None:
        """When the next frame was due, which counts it as read; None before."""
        self._start = now if self._start is None else self._start
        due = self._start + self._index / self.rate
        if now < due:
            return None
        if now - due > 1 / self.rate:
            self._start, due = self._start + now - due, now
        self._index += 1
        return due


class VideoFile:
    """A video file. `read` plays it at its own rate, as if it were a camera; iterating gives every frame at once.

    Args:
        loop: begin again at the end, for ever.

    Attributes:
        rate: frames per second.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: OpenCV finds no video in it.
    """

    def __init__(self, path: str | os.PathLike[str], *, loop: bool = False) -> None:
        cv2 = opencv()
        self.path, self.loop = Path(path), loop
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no video file {self.path}")
        self._open()
        self.rate: float = self._capture.get(cv2.CAP_PROP_FPS) or 30.0  # some containers do not say
        self._playback = Playback(self.rate)

    def _open(self) -> None:
        cv2 = opencv()
        with Quiet(cv2):
            self._capture = cv2.VideoCapture(str(self.path))
        if not self._capture.isOpened() or not self._capture.grab():
            raise ValueError(f"{self.path} is not a video that OpenCV can read; convert it to mp4 (H.264)")
        self._grabbed = True

    def read(self) -> Frame | None:
        """The next frame once it is due, None before; its time is when it was due. The first read starts the clock.

        Raises:
            EndOfStream: the file is over.
        """
        due = self._playback.due(time.monotonic())
        return None if due is None else Frame(self._next(), due)

    def __iter__(self) -> Iterator[Tensor]:
        """The frames that are left, as fast as they can be decoded."""
        while True:
            try:
                yield self._next()
            except EndOfStream:
                return

    def _next(self) -> Tensor:
        if not self._grabbed and not self._capture.grab():
            if not self.loop:
                raise EndOfStream(f"{self.path} is over")
            self._capture.release()
            self._open()
        self._grabbed = False
        return rgb(self._capture.retrieve()[1])

    def close(self) -> None:
        self._capture.release()


def rgb(image_HWC) -> Tensor:
    """OpenCV's picture, bytes [H, W, 3] in blue, green, red, as [3, H, W] in [0, 1]."""
    cv2 = opencv()
    pixels = torch.from_numpy(cv2.cvtColor(image_HWC, cv2.COLOR_BGR2RGB))
    return pixels.permute(2, 0, 1).contiguous().float().div_(255)


class Quiet:
    """OpenCV prints several lines of its own about a missing camera; our one sentence says it."""

    def __init__(self, cv2) -> None:
        self._logging = cv2.utils.logging

    def __enter__(self) -> None:
        self._level = self._logging.getLogLevel()
        self._logging.setLogLevel(self._logging.LOG_LEVEL_SILENT)

    def __exit__(self, *error: object) -> None:
        self._logging.setLogLevel(self._level)


def opencv():
    """OpenCV, whose decoders then keep their complaints to themselves unless the user has asked to see them."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError:
        raise ImportError("cameras and video files need OpenCV: pip install opencv-python") from None
    return cv2
