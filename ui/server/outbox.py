"""What is on its way to one client. Words and sound keep their order; of pictures only the newest is kept.

Used on the event loop only. Pictures are encoded just before they are sent, so none is encoded in vain, on a thread of
a small pool, so the loop never waits.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress

from .contract import Picture
from .pacing import Flow
from .pictures import encode
from .protocol import Broken, Close, pack_video

MOST_WAITING = 512  # messages; a client that is further behind has stopped reading
SOON = 0.001  # seconds: a picture due so soon is due


class Outbox:
    """Sends until it is cancelled.

    Args:
        send: sends one message, text or bytes.
        pool: encodes.
        formats: what the client can show, best first.
        rate: frames per second of the stream.

    Attributes:
        dropped: pictures that a newer one replaced before they were sent.
    """

    def __init__(
        self, send: Callable[[str | bytes], Awaitable[None]], pool: Executor, formats: tuple[str, ...], rate: float
    ) -> None:
        self.flow = Flow(rate)
        self.dropped = 0
        self.sent = 0
        self.formats = formats
        self._send, self._pool = send, pool
        self._ordered: deque[str | bytes] = deque()
        self._picture: Picture | None = None
        self._newest = -1
        self._timers: deque[asyncio.TimerHandle] = deque()
        self._news = asyncio.Event()

    def say(self, message: str | bytes) -> None:
        """Words or sound: in order, and none is lost.

        Raises:
            Broken: the client has stopped reading.
        """
        if len(self._ordered) >= MOST_WAITING:
            raise Broken(Close.TOO_MANY, "this client has stopped reading")
        self._ordered.append(message)
        self._news.set()

    def show(self, pictures: Sequence[tuple[float, Picture]]) -> None:
        """Let each picture become the newest at its monotonic second."""
        loop, now = asyncio.get_running_loop(), time.monotonic()
        while self._timers and (self._timers[0].cancelled() or self._timers[0].when() <= loop.time()):
            self._timers.popleft()
        for due, picture in pictures:
            if due <= now + SOON:
                self._put(picture)
            else:
                self._timers.append(loop.call_later(due - now, self._put, picture))

    def forget(self) -> None:
        """Drop the pictures that aren't due yet."""
        while self._timers:
            self._timers.popleft().cancel()

    def _put(self, picture: Picture) -> None:
        if picture.frame <= self._newest:  # a timer that fired late must not turn time back
            self.dropped += 1
            return
        self.dropped += self._picture is not None
        self._picture, self._newest = picture, picture.frame
        self._news.set()

    def shown(self, frame: int) -> None:
        """The client has shown this frame."""
        self.flow.shown(frame)
        self._news.set()

    async def run(self) -> None:
        """Send for ever."""
        while True:
            wait = self.flow.wait() if self._picture is not None else None
            if not self._ordered and wait != 0:
                await self._rest(wait)
                continue
            while self._ordered:
                await self._send(self._ordered.popleft())
            if wait == 0:
                await self._send_picture()

    async def _rest(self, seconds: float | None) -> None:
        self._news.clear()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._news.wait(), seconds)

    async def _send_picture(self) -> None:
        picture, self._picture = self._picture, None
        assert picture is not None
        loop = asyncio.get_running_loop()
        format, image = await loop.run_in_executor(self._pool, encode, picture.data, self.formats, self.flow.quality)
        self.flow.sent(picture.frame)
        self.sent += 1
        await self._send(pack_video(format, picture.version, picture.frame, picture.time, image))
