"""A camera or a stream on the network: rtsp, http (motion JPEG, HLS, a file) and https, through OpenCV's FFmpeg."""

from __future__ import annotations

import time
from urllib.parse import urlsplit, urlunsplit

from .sources import Playback, Quiet, opencv, rgb
from .types import EndOfStream, Frame

SCHEMES = ("rtsp", "http", "https")
RETRY_SECONDS = 1.0


class NetworkCamera:
    """Frames from an address. A camera that falls silent is called again until it answers; a file ends.

    `read` waits for the network, so call it from a thread of its own, as `live` does.

    Args:
        url: rtsp://, http:// or https://; it may hold user:password@, which no message repeats.
        timeout: seconds to wait for a connection, and for a frame.
        patience: seconds without a frame after which a camera is given up.

    Raises:
        ValueError: another scheme, or no host.
        OSError: nobody answers there, or what answers is no video.
    """

    def __init__(self, url: str, *, timeout: float = 5.0, patience: float = 30.0) -> None:
        cv2 = opencv()
        self.name = checked(url)
        self._url, self._timeout, self._patience = url, timeout, patience
        start = time.monotonic()
        self._connect()
        if not self._capture.isOpened():
            waited = f" within {timeout:g} s" if time.monotonic() - start >= timeout else ""
            raise OSError(f"no video came from {self.name}{waited}: is the address right, and the camera on?")
        frames = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        rate = self._capture.get(cv2.CAP_PROP_FPS) or 30.0
        self._file = Playback(rate) if 0 < frames < 1e9 else None  # a stream without end has no such number
        self._last: float | None = None  # patience begins with the first read: a model may be loaded before it
        self._tried = time.monotonic()

    def _connect(self) -> None:
        cv2, milliseconds = opencv(), int(1000 * self._timeout)
        settings = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, milliseconds, cv2.CAP_PROP_READ_TIMEOUT_MSEC, milliseconds]
        with Quiet(cv2):
            self._capture = cv2.VideoCapture(self._url, cv2.CAP_FFMPEG, settings)

    def read(self) -> Frame | None:
        """The next frame; None while a file's is not due, and while a camera is called again.

        Raises:
            EndOfStream: it was a file, and it is over.
            OSError: the camera has given no frame for `patience` seconds.
        """
        now = time.monotonic()
        self._last = now if self._last is None else self._last
        due = now if self._file is None else self._file.due(now)
        if due is None:
            return None
        if self._capture.isOpened():
            with Quiet(opencv()):
                ok, image = self._capture.read()
            if ok:
                self._last = time.monotonic()
                return Frame(rgb(image), self._last if self._file is None else due)
        if self._file is not None:
            raise EndOfStream(f"{self.name} is over")
        self._call_again()
        return None

    def _call_again(self) -> None:
        now = time.monotonic()
        if self._last is not None and now - self._last > self._patience:
            raise OSError(
                f"{self.name} has given no frame for {self._patience:g} s: is the camera on, is it reachable?"
            )
        if now - self._tried >= RETRY_SECONDS:
            self._capture.release()
            self._connect()
            self._tried = time.monotonic()

    def close(self) -> None:
        self._capture.release()


def checked(url: str) -> str:
    """The address without user and password, for messages; ValueError for one that is not called."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"this is no address ({error}); give one such as rtsp://192.168.1.20:554/stream") from None
    if parts.scheme.lower() not in SCHEMES:
        scheme = f"{parts.scheme}://" if parts.scheme else "none"
        raise ValueError(
            f"an address must begin with rtsp://, http:// or https://, got {scheme}; a file is given with --video, or "
            "as a VideoFile"
        )
    if not host:
        raise ValueError(f"an address must name a host, such as {parts.scheme}://192.168.1.20/stream")
    return urlunsplit((parts.scheme, host if port is None else f"{host}:{port}", parts.path, "", ""))
