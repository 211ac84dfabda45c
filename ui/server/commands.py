"""What a viewer may ask of its seat, message by message. Quick things are done at once, slow ones between two steps."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from .pacing import Bucket
from .protocol import Broken, Close, Message, Refused
from .recordings import Recording
from .seat import Seat
from .sessions import Sessions

log = logging.getLogger(__name__)
MOST_AT_WORK = 16  # slow commands of one client that may wait at once
COSTLY_PER_SECOND, COSTLY_AT_ONCE = 5, 40  # commands that take the model's time, or another's
COSTLY_CHANGES = frozenset({"prompt", "switch", "text", "voice"})  # of a control: each is encoded anew
PATIENCE = 200  # refusals of them; who goes on asking is no person


class Commands:
    """Obeys the messages of one client, and answers those that carry an id.

    Args:
        seat: theirs.
        sessions: for the engine and the recordings.
        say: sends an answer.
    """

    def __init__(self, seat: Seat, sessions: Sessions, say: Callable[[dict[str, Any]], None]) -> None:
        self.seat, self.sessions, self._say = seat, sessions, say
        self._at_work: set[asyncio.Task] = set()
        self._costly = Bucket(COSTLY_PER_SECOND, COSTLY_AT_ONCE)
        self._patience = Bucket(COSTLY_PER_SECOND, PATIENCE)
        self._quick: dict[str, Callable[..., dict[str, Any]]] = {
            "steer": self._steer,
            "start": self._start,
            "pause": self._pause,
            "step": self._step,
            "timeline": self._timeline,
        }
        self._slow: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
            "reset": self._reset,
            "back": self._back,
            "branch": self._branch,
            "switch": self._switch,
            "record": self._record,
        }

    def obey(self, message: Message) -> None:
        """Do it.

        Raises:
            Refused: it can't be done.
            Broken: too much was asked for, again and again.
        """
        self._ration(message)
        self.seat.touched = time.monotonic()
        if message.type in self._quick:
            try:
                answer = self._quick[message.type](**message.fields)
            except (ValueError, TypeError) as error:
                raise Refused(str(error), message.id) from None
            self._done(message, answer)
            self.sessions.engine.wake()
            return
        if len(self._at_work) >= MOST_AT_WORK:
            raise Refused("still busy with what was asked before", message.id)
        task = asyncio.create_task(self._obey_slowly(message))
        self._at_work.add(task)
        task.add_done_callback(self._at_work.discard)

    def _ration(self, message: Message) -> None:
        """Nobody gets more of what is costly than a person can want."""
        changes = COSTLY_CHANGES & message.fields.keys() if message.type == "steer" else ()
        if not (changes or message.type in self._slow or message.type == "timeline") or self._costly.take():
            return
        what = ", ".join(sorted(changes)) or message.type
        if not self._patience.take():
            raise Broken(Close.TOO_MANY, f"more than {COSTLY_PER_SECOND} commands such as {what} a second for too long")
        raise Refused(f"{what}: more than {COSTLY_PER_SECOND} a second; wait a moment", message.id)

    async def _obey_slowly(self, message: Message) -> None:
        try:
            answer = await self._slow[message.type](**message.fields)
        except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: the session has just been closed
            self._say({"type": "refused", "id": message.id, "message": str(error)})
        except Exception:  # whatever it is, who asks gets an answer
            log.exception("%s has failed", message.type)
            self._say(
                {"type": "refused", "id": message.id, "message": "the server has failed at this; its log says how"}
            )
        else:
            self._done(message, answer)

    def _done(self, message: Message, answer: dict[str, Any]) -> None:
        if message.id is not None:
            self._say({"type": "done", "id": message.id, **answer})

    async def close(self) -> None:
        """The client is gone: nobody waits for these answers."""
        for task in list(self._at_work):
            task.cancel()
        await asyncio.gather(*self._at_work, return_exceptions=True)

    # Quick.

    def _steer(self, **changes: Any) -> dict[str, Any]:
        if not changes:
            raise ValueError("steer needs something to change, such as keys or prompt")
        if "text" in changes:
            self.seat.check_room(changes["text"])
        version = self.seat.session.steer(**changes)
        if "prompt" in changes:
            self.sessions.engine.call(self.seat.find_nearest, self.seat)
        return {"version": version}

    def _start(self) -> dict[str, Any]:
        self.seat.start()
        return {}

    def _pause(self) -> dict[str, Any]:
        self.seat.pause()
        return {}

    def _step(self) -> dict[str, Any]:
        self.seat.single_step()
        return {}

    def _timeline(self, entries: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
        self.seat.plan(entries)
        return {"entries": len(entries)}

    # Slow.

    async def _engine(self, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return await asyncio.wrap_future(self.sessions.engine.call(function, self.seat))

    async def _reset(self, seed: int | None = None) -> dict[str, Any]:
        return await self._engine(lambda: self.seat.reset(seed))

    async def _back(self, seconds: float = 5.0) -> dict[str, Any]:
        return await self._engine(lambda: self.seat.back(seconds))

    async def _branch(self) -> dict[str, Any]:
        return await self._engine(self.seat.branch)

    async def _switch(self, resume: str = "") -> dict[str, Any]:
        return await self._engine(lambda: self.seat.switch(resume))

    async def _record(self, on: bool = True) -> dict[str, Any]:
        seat = self.seat
        if on:
            if not seat.pipe.size:
                raise ValueError("only pictures are recorded; the page keeps the sound")
            if seat.recording is not None:
                raise ValueError("a recording runs already")
            live = seat.mode == "camera"
            seat.recording = self.sessions.recordings.begin(seat.name, seat.secret, rate=seat.pipe.rate, live=live)
            return {"recording": seat.recording.id}
        recording, seat.recording = seat.recording, None
        if recording is None:
            raise ValueError("nothing is being recorded")
        return await finished(recording)


async def finished(recording: Recording) -> dict[str, Any]:
    """Close a recording, off the loop; what a client is told about it.

    Raises:
        ValueError: there is no file.
    """
    await asyncio.to_thread(recording.finish)
    if not recording.frames:
        raise ValueError(f"nothing was recorded: {recording.stopped or 'no frame was drawn'}")
    if not recording.bytes:
        raise ValueError(f"the recording is lost: {recording.stopped or 'its file was removed from the server'}")
    answer = {"recording": recording.id, "url": f"/recordings/{recording.id}.mp4"}
    answer |= {"seconds": recording.seconds, "bytes": recording.bytes}
    return answer | ({"stopped": recording.stopped} if recording.stopped else {})
