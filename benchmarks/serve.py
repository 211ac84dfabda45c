"""How quick and how steady the live server is, as JSON.

    python benchmarks/serve.py --loopback               camera to canvas and back, with a model that does nothing
    python benchmarks/serve.py --load                   20 sockets for 60 seconds: lost controls, memory, frame age
    python benchmarks/serve.py --load --seconds 5       the same, shorter

benchmarks/serve_worlds.py does the same with a real model.

The server runs in a process of its own, as `millstream serve` does; a Python client stands in for the browser.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

CAMERA = (480, 640)
CAMERA_HEADER, VIDEO_HEADER = struct.Struct("<Bd"), struct.Struct("<BBHIQd")
KINDS = 16  # controls follow one another, so that a frame says by its colour which one it was drawn under


class Mirror:
    """The least a pipeline can do: give a camera picture back, or a colour that says which keys are held."""

    worlds = ("nothing",)
    key_map = {f"Key{number}": str(number) for number in range(KINDS)}  # noqa: RUF012

    def __init__(self, rate: float, size: tuple[int, int]) -> None:
        self.rate, self.size = rate, size

    def stream(self, prompt: str, *, generator: Any = None) -> Any:
        from millstream.streaming import Session, WorldControl

        return Session(self, WorldControl(prompt=prompt), generator=generator)

    def check(self, control: Any) -> None: ...

    def begin(self, control: Any, *, generator: Any = None) -> list[int]:
        return [0]

    def advance(self, states: Any, controls: Any, media: Any) -> list[list[Any]]:
        return [[self._draw(*row)] for row in zip(states, controls, media)]

    def _draw(self, state: list[int], control: Any, picture: Any) -> Any:
        import torch

        from millstream.streaming import Chunk

        state[0] += 1
        if picture is None:
            held = int(min(control.keys, default="Key0")[3:])
            data = torch.full((1, 3, *self.size), (held + 0.5) / KINDS)
        else:
            data = picture.data[None]
        when = time.monotonic() if picture is None else picture.time
        return Chunk("video", data, state[0] - 1, self.rate, control.version, when)

    def flush(self, state: Any) -> list[Any]:
        return []

    def save(self, state: list[int]) -> dict[str, int]:
        return {"frame": state[0]}

    def load(self, leaves: dict[str, int]) -> list[int]:
        return [leaves["frame"]]

    def end(self, state: Any) -> None: ...


def serve(ready: Connection, rate: float, size: tuple[int, int], max_sessions: int, model: str | None) -> None:
    """The server's process: tells its port, then serves until it is terminated."""
    import torch

    from millstream.ui.commands.serve import listen, make_server
    from millstream.ui.server.app import create_app
    from millstream.ui.server.settings import Settings
    from millstream.ui.world import load_world

    if model is None:
        torch.set_num_threads(1)
    pipe = Mirror(rate, size) if model is None else load_world(model)
    app = create_app(pipe, Settings(max_sessions=max_sessions, idle_seconds=3600))
    listener = listen("127.0.0.1", 0)
    ready.send(listener.getsockname()[1])
    make_server(app, None).run(sockets=[listener])


@contextmanager
def served(rate: float, size: tuple[int, int], max_sessions: int, model: str | None = None) -> Iterator[str]:
    """A server in a process of its own; gives the address of its socket."""
    import httpx

    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(there, rate, size, max_sessions, model), daemon=True)
    server.start()
    try:
        place = f"127.0.0.1:{here.recv()}"
        with httpx.Client(trust_env=False, transport=httpx.HTTPTransport(retries=8)) as browser:
            browser.get(f"http://{place}/health").raise_for_status()
        yield f"ws://{place}/live"
    finally:
        server.terminate()
        server.join()


class Client:
    """One socket."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket
        self.status: dict[str, Any] = {}

    async def say(self, type: str, **fields: Any) -> None:
        await self.socket.send(json.dumps({"type": type, **fields}))

    async def hello(self, **fields: Any) -> None:
        await self.say("hello", protocol=1, formats=["jpeg"], **fields)
        while json.loads(await self.socket.recv())["type"] != "welcome":
            pass
        await self.say("start")


def now() -> float:
    return time.monotonic() * 1000  # both processes read one clock, so that ages need no handshake


async def loopback(address: str, seconds: float, rate: float) -> dict[str, Any]:
    """Send camera pictures at `rate`, decode what comes back, and take its age when it could be on a canvas."""
    import cv2
    import numpy as np
    from websockets.asyncio.client import connect

    noise = np.random.default_rng(0).integers(0, 255, (CAMERA[0] // 8, CAMERA[1] // 8, 3), np.uint8)
    picture = cv2.imencode(".jpg", cv2.resize(noise, CAMERA[::-1]), [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
    ages: list[float] = []
    sent = 0

    async with connect(address, max_size=None, compression=None, proxy=None) as socket:
        client = Client(socket)
        await client.hello(mode="camera")

        async def film() -> None:
            nonlocal sent
            start = time.monotonic()
            while time.monotonic() - start < seconds:
                await socket.send(CAMERA_HEADER.pack(1, now()) + picture)
                sent += 1
                await asyncio.sleep(max(0.0, start + sent / rate - time.monotonic()))

        filming = asyncio.create_task(film())
        first = last = 0.0
        while True:
            try:
                message = await asyncio.wait_for(socket.recv(), 1.0)
            except asyncio.TimeoutError:
                break
            if isinstance(message, str):
                client.status = {**client.status, **json.loads(message)}
                if filming.done() and json.loads(message)["type"] == "status":
                    break
                continue
            *_, frame, captured = VIDEO_HEADER.unpack_from(message)
            cv2.imdecode(np.frombuffer(message, np.uint8, offset=VIDEO_HEADER.size), cv2.IMREAD_COLOR)
            last = now()
            first = first or last
            ages.append(last - captured)
            await client.say("shown", frame=frame, age=ages[-1])
        await filming
    rate_seen = (len(ages) - 1) / (last - first) * 1000
    return {
        "camera": {"size": CAMERA, "rate": rate, "bytes": len(picture)},
        "sent": sent,
        "shown": len(ages),
        "fps": round(rate_seen, 2),
        "age_ms": percentiles(ages[len(ages) // 20 :]),
        "dropped": client.status.get("dropped"),
        "quality": client.status.get("quality"),
        "bar": {"fps": rate_seen >= 0.98 * rate, "p95_age_under_50_ms": percentile(ages, 95) < 50},
    }


async def load(address: str, seconds: float, sockets: int) -> dict[str, Any]:
    """Every socket steers again as soon as it has seen its last control drawn."""
    players = [asyncio.create_task(play(address, seconds, number)) for number in range(sockets)]
    memory: list[tuple[float, float]] = []
    start = time.monotonic()
    while not all(player.done() for player in players):
        await asyncio.sleep(1)
        memory.append((time.monotonic() - start, await memory_of(address)))
    results = [await player for player in players]
    settled = [held for when, held in memory if when > min(10.0, seconds / 3)]
    return {
        "sockets": sockets,
        "seconds": seconds,
        "controls": sum(result["controls"] for result in results),
        "lost_controls": sum(result["lost"] for result in results),
        "fps": {"least": min(result["fps"] for result in results), "most": max(result["fps"] for result in results)},
        "age_ms": percentiles([age for result in results for age in result["ages"]]),
        "control_to_frame_ms": percentiles([wait for result in results for wait in result["waits"]]),
        "memory_mb": {"settled": settled[0], "end": settled[-1], "growth": round(settled[-1] - settled[0], 1)},
    }


async def play(address: str, seconds: float, number: int) -> dict[str, Any]:
    """One player. A control is lost if a frame under its version, or a later one, shows another's colour."""
    import cv2
    import numpy as np
    from websockets.asyncio.client import connect

    ages, waits, frames, lost, version, held = [], [], 0, 0, 0, 0
    steered = 0.0
    async with connect(address, max_size=None, compression=None, proxy=None) as socket:
        client = Client(socket)
        await client.hello(seed=number)
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            if not steered:
                version, held, steered = version + 1, (held + 1) % KINDS, now()
                await client.say("steer", keys=[f"Key{held}"])
            message = await socket.recv()
            if isinstance(message, str):
                continue
            _, _, _, drawn, frame, when = VIDEO_HEADER.unpack_from(message)
            pixels = cv2.imdecode(np.frombuffer(message, np.uint8, offset=VIDEO_HEADER.size), cv2.IMREAD_COLOR)
            frames += 1
            ages.append(now() - when)
            await client.say("shown", frame=frame, age=ages[-1])
            if drawn == version and steered:
                waits.append(now() - steered)
                steered = 0.0
                # a key that was let go since the last step still counts, and `min` picks either of the two
                shown = int(pixels.mean() / 255 * KINDS)
                lost += shown not in (held, (held - 1) % KINDS)
        lasted = time.monotonic() - start
        await client.say("leave")
    return {"controls": version, "lost": lost + (drawn < version - 1), "fps": round(frames / lasted, 2)} | {
        "ages": ages,
        "waits": waits,
    }


async def memory_of(address: str) -> float:
    import httpx

    async with httpx.AsyncClient(trust_env=False) as browser:
        reply = await browser.get(address.replace("ws://", "http://").replace("/live", "/metrics"))
        return reply.json()["memory_mb"]


def percentile(values: list[float], percent: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def percentiles(values: list[float]) -> dict[str, float]:
    named = {f"p{percent}": round(percentile(values, percent), 2) for percent in (50, 95, 99)}
    return {"mean": round(statistics.fmean(values), 2), **named, "worst": round(max(values), 2)}


def main() -> None:
    from millstream.ui.machine import machine, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--loopback", action="store_true", help="one camera")
    what.add_argument("--load", action="store_true", help="many players")
    parser.add_argument("--seconds", type=float, help="default: 20 for --loopback, 60 for --load")
    parser.add_argument("--sockets", type=int, default=20, help="players of --load (default: 20)")
    parser.add_argument("--rate", type=float, help="frames/s (default: 30 for --loopback, 17.5 for --load)")
    arguments = parser.parse_args()
    rate = arguments.rate or (30.0 if arguments.loopback else 17.5)
    size = CAMERA if arguments.loopback else (96, 128)

    with served(rate, size, arguments.sockets) as address:
        if arguments.loopback:
            result = asyncio.run(loopback(address, arguments.seconds or 20.0, rate))
        else:
            result = asyncio.run(load(address, arguments.seconds or 60.0, arguments.sockets))
    json.dump({"machine": machine(), "versions": versions(), "result": result}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
