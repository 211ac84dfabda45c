"""The camera of one client: pictures come in as they like, and the newest is decoded for the next step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from .engine import Engine
from .pacing import Bucket
from .pictures import decode
from .protocol import Broken, Close, Refused
from .seat import Seat

PICTURES_PER_SECOND, PICTURES_AT_ONCE = 60, 60
REFUSALS = 50  # in a row; a client that sends nothing else is broken


class Eye:
    """Decodes one picture at a time off the loop; those that come meanwhile replace one another.

    Args:
        seat: gets the pictures.
        engine: is woken.
        pool: decodes.
        say, finish: tell the client, and end its connection.

    Attributes:
        dropped: pictures that were never decoded.
    """

    def __init__(
        self,
        seat: Seat,
        engine: Engine,
        pool: Executor,
        say: Callable[[dict[str, Any]], None],
        finish: Callable[[Exception], None],
    ) -> None:
        self.dropped = 0
        self._seat, self._engine, self._pool, self._say, self._finish = seat, engine, pool, say, finish
        self._limit = Bucket(PICTURES_PER_SECOND, PICTURES_AT_ONCE)
        self._waiting: tuple[float, bytes] | None = None
        self._refused = 0
        self._task: asyncio.Task | None = None

    def see(self, captured: float, image: bytes) -> None:
        """A picture taken at `captured` (client ms). While the session is paused nobody needs it."""
        if not self._limit.take():
            self.dropped += 1
            return
        self._seat.touched = time.monotonic()
        if not self._seat.wanted:
            return
        self.dropped += self._waiting is not None
        self._waiting = (captured, image)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._decode_all())

    async def _decode_all(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting is not None:
            (captured, image), self._waiting = self._waiting, None
            try:
                picture = await loop.run_in_executor(self._pool, decode, image, self._seat.pipe.size)
            except Refused as refusal:
                self._refuse(refusal)
                continue
            self._refused = 0
            self._seat.give(picture, captured)
            self._engine.wake()

    def _refuse(self, refusal: Refused) -> None:
        self._refused += 1
        if self._refused >= REFUSALS:
            self._finish(Broken(Close.BAD_MESSAGE, str(refusal)))
        else:
            self._say({"type": "refused", "id": None, "message": str(refusal)})

    async def close(self) -> None:
        """Stop decoding."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
