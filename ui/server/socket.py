"""One client's WebSocket: its hello, its place, its commands, its camera, and the way out.

Whatever a client sends, the worst that happens is that this socket closes with a code and a sentence.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from ...streaming import Chunk
from .commands import Commands
from .contract import Picture, Saved
from .eye import Eye
from .outbox import Outbox
from .pacing import Bucket
from .protocol import PROTOCOL, Broken, Close, Message, Refused, pack_audio, parse, unpack_camera
from .seat import Seat
from .security import same
from .sessions import Sessions, Wish
from .status import status, welcome

MESSAGES_PER_SECOND, MESSAGES_AT_ONCE = 300, 900
TEXT_PER_SECOND, TEXT_AT_ONCE = 2**18, 2**20  # bytes
PICTURES_PER_SECOND, PICTURES_AT_ONCE = 2**24, 2**26  # bytes
log = logging.getLogger(__name__)
AGE_SECONDS = 2.0


class Connection:
    """A viewer (see `Viewer`) whose far end is a browser.

    Args:
        websocket: accepted already.
        sessions: where seats are.
        pool: encodes and decodes pictures.
        trusted: the request itself carried the token, so that hello need not.
    """

    def __init__(self, websocket: WebSocket, sessions: Sessions, pool: Executor, *, trusted: bool) -> None:
        self.websocket, self.sessions, self.pool, self.trusted = websocket, sessions, pool, trusted
        self.settings = sessions.settings
        self.seat: Seat | None = None
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._outbox = Outbox(self._send, pool, ("jpeg",), sessions.pipe.rate)
        self._commands: Commands | None = None
        self._messages = {kind: Bucket(MESSAGES_PER_SECOND, MESSAGES_AT_ONCE) for kind in (str, bytes)}
        self._bytes = {
            str: Bucket(TEXT_PER_SECOND, TEXT_AT_ONCE),
            bytes: Bucket(PICTURES_PER_SECOND, PICTURES_AT_ONCE),
        }
        self._eye: Eye | None = None
        self._ages: deque[tuple[float, float]] = deque(maxlen=256)
        self._leaving = False
        self._underruns = 0

    async def run(self) -> None:
        """Serve this client to its end."""
        tasks: list[asyncio.Task] = []
        self.sessions.viewers.add(self)
        try:
            hello = await self._hello()
            for part in (self._read(), self._outbox.run(), self._take_place(hello)):
                tasks.append(asyncio.create_task(self._guarded(part)))
            await self._over
        except Broken as reason:
            await self._say_goodbye(reason)
        except WebSocketDisconnect:
            pass
        finally:
            await self._leave(tasks)
            self.sessions.viewers.discard(self)

    async def _guarded(self, part: Any) -> None:
        """Whatever ends one part of the connection ends it all."""
        try:
            await part
        except (Broken, WebSocketDisconnect) as error:
            self._finish(error)
        except Exception as error:
            # Starlette and uvicorn raise a RuntimeError when the other side goes while we are sending
            if not isinstance(error, RuntimeError) or self.websocket.client_state is WebSocketState.CONNECTED:
                log.exception("a socket has failed")
            self._finish(Broken(Close.FAILED, "the server has made a mistake; its log says which"))

    def _finish(self, error: Exception) -> None:
        if not self._over.done():
            self._over.set_exception(error)

    async def _leave(self, tasks: Sequence[asyncio.Task]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._eye is not None:
            await self._eye.close()
        if self._commands is not None:
            await self._commands.close()
        self._outbox.forget()
        if self.seat is not None:
            self.sessions.detach(self.seat, self)
            if self._leaving and self.seat.viewer is None:
                self.sessions.close_seat(self.seat)

    # Coming in.

    async def _hello(self) -> Message:
        try:
            text = await asyncio.wait_for(self._receive(), self.settings.hello_seconds)
        except asyncio.TimeoutError:
            raise Broken(Close.IDLE, f"no hello within {self.settings.hello_seconds:g} seconds") from None
        try:
            hello = parse(text) if isinstance(text, str) else None
        except Refused as error:
            raise Broken(Close.BAD_MESSAGE, str(error)) from None
        if hello is None or hello.type != "hello":
            raise Broken(Close.BAD_MESSAGE, "the first message must be hello")
        token = self.settings.token
        if token is not None and not self.trusted and not same(token, hello.fields.get("token")):
            raise Broken(Close.TOKEN, "wrong or missing token; it was printed when the server started")
        if hello.fields.get("protocol") != PROTOCOL:
            raise Broken(Close.BAD_MESSAGE, f"this server speaks protocol {PROTOCOL}; reload the page")
        self._outbox.formats = hello.fields.get("formats", ("jpeg",))
        return hello

    async def _take_place(self, hello: Message) -> None:
        """Come back to a seat, wait for a new one, or go on from what another server has saved."""
        resume = hello.fields.get("resume")
        seat, resumed = self.sessions.find(resume), True
        if seat is None:
            saved = await self.sessions.saved(resume)
            seat, resumed = await self._wait_for_seat(hello, saved), saved is not None
            if saved is not None:
                seat = await self._revive(seat, saved)
        self.seat = seat
        self._commands = Commands(seat, self.sessions, self._say)
        if seat.mode == "camera":
            self._eye = Eye(seat, self.sessions.engine, self.pool, self._say, self._finish)
        self._say(welcome(seat, self.sessions.settings, resumed=resumed, formats=self._outbox.formats))
        self.sessions.attach(seat, self)
        await self._report_for_ever(seat)

    async def _revive(self, seat: Seat, saved: Saved) -> Seat:
        before = self.sessions.find(saved.secret)
        if before is not None:  # another window has brought it back while this one waited
            self.sessions.close_seat(seat)
            return before
        try:
            await self.sessions.revive(seat, saved)
        except ValueError as error:
            self.sessions.close_seat(seat)
            raise Broken(Close.FAILED, str(error)) from None
        return seat

    async def _wait_for_seat(self, hello: Message, saved: Saved | None) -> Seat:
        fields = hello.fields
        wish = Wish(fields.get("mode", "play"), fields.get("prompt"), fields.get("seed"))
        if saved is not None:
            wish = Wish(saved.mode, saved.snapshot.control["prompt"], saved.seed)
        ticket = self.sessions.enter(self, wish)
        try:
            return await ticket.seat
        except (ValueError, TypeError) as error:
            raise Broken(Close.BAD_MESSAGE, str(error)) from None
        except asyncio.CancelledError:
            self.sessions.leave_queue(ticket)
            raise

    async def _report_for_ever(self, seat: Seat) -> None:
        while True:
            await asyncio.sleep(1)
            self._say(status(seat, self.sessions, self._outbox, self._eye, self.age_ms))

    # What the client says.

    async def _receive(self) -> str | bytes:
        message = await self.websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        text = message.get("text")
        return message.get("bytes") or b"" if text is None else text

    async def _read(self) -> None:
        while True:
            try:
                message = await asyncio.wait_for(self._receive(), self.settings.silence_seconds)
            except asyncio.TimeoutError:
                raise Broken(Close.IDLE, f"nothing heard for {self.settings.silence_seconds:g} seconds") from None
            kind = type(message)
            if not self._messages[kind].take():
                raise Broken(Close.TOO_MANY, f"more than {MESSAGES_PER_SECOND} messages a second")
            if not self._bytes[kind].take(len(message)):
                raise Broken(Close.TOO_MANY, "more bytes a second than a live stream has")
            if isinstance(message, bytes):
                captured, image = unpack_camera(message)
                if self._eye is not None:
                    self._eye.see(captured, image)
            else:
                self._hear(message)

    def _hear(self, text: str) -> None:
        try:
            message = parse(text)
            if message.type == "ping":
                self._say({"type": "pong", "t": message.fields.get("t"), "server": time.monotonic() * 1000})
            elif message.type == "leave":
                self._leaving = True
                raise Broken(Close.GOING_AWAY, "goodbye")
            elif message.type == "hello":
                raise Refused("hello was said already", message.id)
            elif self._commands is None:
                raise Refused("there is no place yet; wait for welcome", message.id)
            elif message.type == "shown":
                self._shown(message.fields)
            elif message.type == "heard":
                self._heard(message.fields.get("underruns", 0))
            else:
                self._commands.obey(message)
        except Refused as refusal:
            self._say({"type": "refused", "id": refusal.id, "message": str(refusal)})

    def _shown(self, fields: dict[str, Any]) -> None:
        self._outbox.shown(fields.get("frame", 0))
        age = fields.get("age")
        if age is not None and math.isfinite(age):
            self._ages.append((time.monotonic(), age))

    def _heard(self, underruns: int) -> None:
        """The client has heard so many gaps since it said hello."""
        assert self.seat is not None
        self.seat.underruns += max(0, underruns - self._underruns)
        self._underruns = underruns

    @property
    def age_ms(self) -> float | None:
        """Median age of the frames that the client has shown lately, None before any."""
        since = time.monotonic() - AGE_SECONDS
        ages = [age for when, age in self._ages if when >= since]
        return round(statistics.median(ages), 1) if ages else None

    # What it is shown and told (`Viewer`).

    def show(self, pictures: Sequence[tuple[float, Picture]]) -> None:
        self._soon(self._outbox.show, pictures)

    def hear(self, chunk: Chunk) -> None:
        self._soon(self._play, chunk)

    def said(self) -> None:
        assert self.seat is not None
        factor = self.seat.session.metrics.real_time_factor
        self._soon(self._say, {"type": "said", "real_time_factor": None if factor is None else round(factor, 3)})

    def forget(self) -> None:
        self._soon(self._outbox.forget)

    def _soon(self, function: Any, *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended, and every viewer with it
            self._loop.call_soon_threadsafe(function, *arguments)

    def _play(self, chunk: Chunk) -> None:
        samples = chunk.data.detach().clamp(-1, 1).mul(32767).round().short().T.contiguous().cpu().numpy().tobytes()
        channels, rate = chunk.data.shape[0], round(chunk.rate)
        try:
            self._outbox.say(pack_audio(channels, chunk.version, chunk.start, chunk.time * 1000, rate, samples))
        except Broken as error:
            self._finish(error)

    def queued(self, position: int) -> None:
        self._say({"type": "queued", "position": position})

    def end(self, code: Close, message: str) -> None:
        self._finish(Broken(code, message))

    def _say(self, message: dict[str, Any]) -> None:
        try:
            self._outbox.say(json.dumps(message, allow_nan=False))
        except Broken as error:
            self._finish(error)

    async def _send(self, message: str | bytes) -> None:
        if isinstance(message, str):
            await self.websocket.send_text(message)
        else:
            await self.websocket.send_bytes(message)

    async def _say_goodbye(self, reason: Broken) -> None:
        if self.websocket.client_state is not WebSocketState.CONNECTED:
            return
        bye = {"type": "bye", "reason": reason.code.name.lower(), "message": str(reason)}
        with suppress(RuntimeError, WebSocketDisconnect, asyncio.TimeoutError):  # nobody may be listening any more
            await asyncio.wait_for(self._farewell(json.dumps(bye), reason.code), timeout=2)

    async def _farewell(self, text: str, code: Close) -> None:
        await self.websocket.send_text(text)
        await self.websocket.close(int(code))
