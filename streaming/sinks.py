"""Sinks that join, pace or pass on: several at once, an even rate, a camera for other programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .pixels import as_bytes, on_host
from .types import Chunk, Sink

LONGEST_BREAK = 10.0  # seconds that an even stream fills by standing still; a longer break is cut out


class Tee:
    """One sink made of several: each chunk goes to all of them, in order. The first that ends the stream ends it."""

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = sinks
        self.paces = any(getattr(sink, "paces", False) for sink in sinks)

    def write(self, chunk: Chunk) -> None:
        for sink in self.sinks:
            sink.write(chunk)

    def close(self) -> None:
        """Close all of them, whatever happens to some; then raise what was raised first."""
        errors: list[Exception] = []
        for sink in self.sinks:
            try:
                sink.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


class Steady:
    """Passes video on at an even rate, so that a recording of a live stream plays at the speed it was lived.

    Each frame is shown at the time of its chunk: it is repeated until the next one is due, and left out if that one
    falls on the same moment. Sound passes as it is.

    Args:
        sink: gets chunks of one frame each.
        rate: frames per second.
    """

    def __init__(self, sink: Sink, *, rate: float) -> None:
        self.sink, self.rate = sink, rate
        self._start = 0.0
        self._count = 0  # frames passed on
        self._last: Chunk | None = None

    def write(self, chunk: Chunk) -> None:
        if chunk.kind != "video":
            self.sink.write(chunk)
            return
        for index, frame in enumerate(chunk.data):
            self._place(replace(chunk, data=frame[None], time=chunk.time + index / chunk.rate, rate=self.rate))

    def _place(self, chunk: Chunk) -> None:
        if self._last is None:
            self._start = chunk.time
        moment = round((chunk.time - self._start) * self.rate)
        if moment - self._count > LONGEST_BREAK * self.rate:
            self._start += (moment - self._count) / self.rate
            moment = self._count
        while self._last is not None and self._count < moment:
            self._pass_on(self._last)
        self._last = chunk
        if moment >= self._count:
            self._pass_on(chunk)

    def _pass_on(self, chunk: Chunk) -> None:
        self.sink.write(replace(chunk, start=self._count))
        self._count += 1

    def close(self) -> None:
        self.sink.close()


class VirtualCamera:
    """A camera that other programs see: video calls, recorders. Needs a driver (v4l2loopback, OBS, Unity Capture).

    Args:
        scale: whole number of times each pixel is repeated each way; many programs refuse a thumbnail.

    Attributes:
        device: what the other programs call it; empty before the first frame.

    Raises:
        ImportError: pyvirtualcam is missing. OSError (at the first frame): there is no driver.
    """

    def __init__(self, *, scale: int = 5) -> None:
        self._make = _pyvirtualcam()
        self.scale, self.device = scale, ""
        self._camera: Any = None

    def write(self, chunk: Chunk) -> None:
        if chunk.kind != "video":
            return
        pixels = as_bytes(chunk.data)
        large = pixels.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)
        for frame_HWC in on_host(large.permute(0, 2, 3, 1)).numpy():
            if self._camera is None:
                self._camera = self._open(frame_HWC.shape[0], frame_HWC.shape[1], chunk.rate)
            self._camera.send(frame_HWC)

    def _open(self, height: int, width: int, rate: float) -> Any:
        try:
            camera = self._make(width, height, rate)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise OSError(f"no virtual camera can be opened ({reason})") from None
        self.device = camera.device
        return camera

    def close(self) -> None:
        if self._camera is not None:
            self._camera.close()
            self._camera = None


def _pyvirtualcam() -> Callable[..., Any]:
    try:
        import pyvirtualcam
    except ImportError:
        raise ImportError(
            'a virtual camera needs pyvirtualcam: pip install "millstream[virtual-camera]", and its driver'
        ) from None
    return pyvirtualcam.Camera
