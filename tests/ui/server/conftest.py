"""A server on a free port with a pipeline quick enough to test it, and a client that speaks the socket's protocol."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import uvicorn
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from millstream.streaming import Chunk, Session, VideoControl, WorldControl
from millstream.ui.server.app import create_app
from millstream.ui.server.protocol import AUDIO, VIDEO_HEADER
from millstream.ui.server.settings import Settings


@dataclass
class FakeState:
    seed: int
    frame: int = 0
    trail: torch.Tensor = field(default_factory=lambda: torch.zeros(4))


class FakePipeline:
    """Red counts frames, green says that KeyW is down, blue is a camera picture's brightness. Keeps no state itself."""

    worlds = ("a brick corridor", "a slime arena")
    key_map: ClassVar = {"KeyW": "MOVE_FORWARD", "ArrowLeft": "TURN_LEFT"}
    size = (24, 32)
    control = WorldControl

    def __init__(self, *, rate: float = 50.0, delay: float = 0.0, frames: int = 1) -> None:
        self.rate, self.delay, self.frames = rate, delay, frames
        self.states = 0
        self.batches: list[int] = []
        self.read: list[tuple[int, object]] = []
        self.threads: set[str] = set()

    def stream(self, prompt, *, generator=None):
        return Session(self, self.control(prompt=prompt), generator=generator)

    def check(self, control):
        if not control.prompt.strip():
            raise ValueError("the prompt is empty; describe a world")

    def nearest_world(self, prompt):
        return self.worlds[0], 0.25

    def begin(self, control, *, generator=None):
        self.states += 1
        return FakeState(int(torch.randint(2**31, (), generator=generator)))

    def advance(self, states, controls, media):
        self.threads.add(threading.current_thread().name)
        time.sleep(self.delay)
        for control in controls:
            if "explode" in control.prompt:
                raise RuntimeError("the reactor has exploded")
        self.batches.append(len(states))
        return [[self._draw(*row)] for row in zip(states, controls, media)]

    def _draw(self, state, control, picture):
        self.read.append((state.seed, control))
        green = float("KeyW" in getattr(control, "keys", ()))
        blue = 0.0 if picture is None else float(picture.data.mean())
        colour = torch.tensor([state.frame % 64 / 64, green, blue])
        data = colour.view(1, 3, 1, 1).expand(self.frames, 3, *self.size).clone()
        when = time.monotonic() if picture is None else picture.time
        state.frame += self.frames
        return Chunk("video", data, state.frame - self.frames, self.rate, control.version, when)

    def flush(self, state):
        return []

    def save(self, state):
        return {"seed": state.seed, "frame": state.frame, "trail": state.trail.clone()}

    def load(self, leaves):
        self.states += 1
        return FakeState(leaves["seed"], leaves["frame"], leaves["trail"].clone())

    def end(self, state):
        self.states -= 1


class FakeVideoPipeline(FakePipeline):
    control = VideoControl


class FakeTalkie(FakePipeline):
    """Draws a frame and speaks the sound that belongs to it, two channels at 8 kHz."""

    def advance(self, states, controls, media):
        spoken = []
        for (picture,) in super().advance(states, controls, media):
            count = int(8000 / self.rate)
            sound = torch.stack([torch.full((count,), 0.5), torch.full((count,), -2.0)])
            spoken.append(
                [picture, Chunk("audio", sound, picture.start * count, 8000.0, picture.version, picture.time)]
            )
        return spoken


@dataclass
class Running:
    """A server in a thread of this process."""

    pipe: FakePipeline
    app: object
    port: int
    server: uvicorn.Server

    @property
    def sessions(self):
        return self.app.state.sessions

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass(frozen=True)
class Shot:
    """A video frame as it came over the wire."""

    format: int
    version: int
    frame: int
    time: float
    image: bytes

    @property
    def rgb(self) -> tuple[float, float, float]:
        import cv2
        import numpy as np

        blue, green, red = cv2.imdecode(np.frombuffer(self.image, np.uint8), cv2.IMREAD_COLOR).mean((0, 1)) / 255
        return float(red), float(green), float(blue)


class Client:
    """Speaks the protocol, one socket. Acknowledges what it reads unless `acks` is off."""

    def __init__(self, port: int, path: str = "/live", acks: bool = True, **options) -> None:
        options = {"max_size": None, "compression": None, "proxy": None, **options}
        self._open = ExitStack()
        self.socket = self._open.enter_context(connect(f"ws://127.0.0.1:{port}{path}", **options))
        self.acks = acks
        self.ids = 0
        self.heard: list[dict] = []
        self.shots: list[Shot] = []
        self.sounds: list[bytes] = []

    def say(self, type: str, **fields) -> None:
        self.socket.send(json.dumps({"type": type, **fields}))

    def hello(self, **fields) -> dict:
        """Say hello and wait for the welcome."""
        self.say("hello", **{"protocol": 1, "mode": "play", "formats": ["jpeg"], **fields})
        return self.until("welcome")

    def ask(self, type: str, **fields) -> dict:
        """Say something with an id and wait for the answer."""
        self.ids += 1
        self.say(type, id=self.ids, **fields)
        return self.find(lambda message: message.get("id") == self.ids)

    def read(self, timeout: float = 5.0) -> dict | Shot | bytes:
        raw = self.socket.recv(timeout)
        if isinstance(raw, str):
            self.heard.append(json.loads(raw))
            return self.heard[-1]
        if raw[0] == AUDIO:
            self.sounds.append(raw)
            return self.sounds[-1]
        _, format, _, version, frame, when = VIDEO_HEADER.unpack_from(raw)
        shot = Shot(format, version, frame, when, raw[VIDEO_HEADER.size :])
        self.shots.append(shot)
        if self.acks:
            self.say("shown", frame=frame, age=1.0)
        return shot

    def find(self, wanted: Callable[[dict], bool], timeout: float = 5.0) -> dict:
        """The first message from here on that is wanted."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            message = self.read(max(0.01, end - time.monotonic()))
            if isinstance(message, dict) and wanted(message):
                return message
        raise TimeoutError("no such message")

    def until(self, type: str, timeout: float = 5.0) -> dict:
        return self.find(lambda message: message["type"] == type, timeout)

    def shot(self, wanted: Callable[[Shot], bool] = lambda shot: True, timeout: float = 5.0) -> Shot:
        """The first frame from here on that is wanted."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            shot = self.read(max(0.01, end - time.monotonic()))
            if isinstance(shot, Shot) and wanted(shot):
                return shot
        raise TimeoutError("no such frame")

    def picture(self, image: bytes, captured: float = 0.0) -> None:
        self.socket.send(struct.pack("<Bd", 1, captured) + image)

    def farewell(self, timeout: float = 5.0) -> tuple[int, dict | None]:
        """Read to the end: the close code, and the bye before it."""
        try:
            while True:
                self.read(timeout)
        except ConnectionClosed as closed:
            byes = [message for message in self.heard if message["type"] == "bye"]
            return closed.rcvd.code if closed.rcvd else 1006, byes[-1] if byes else None

    def drop(self) -> None:
        """Vanish without a word, as a phone in a tunnel does."""
        self.socket.socket.close()

    def close(self) -> None:
        self._open.close()


@pytest.fixture
def fake() -> type[FakePipeline]:
    return FakePipeline


@pytest.fixture
def fake_video() -> type[FakeVideoPipeline]:
    return FakeVideoPipeline


@pytest.fixture
def fake_talkie() -> type[FakeTalkie]:
    return FakeTalkie


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    """Start a server: `serve(pipe, max_sessions=2, ...)`."""
    started: list[tuple[Running, threading.Thread]] = []

    def start(pipe: FakePipeline | None = None, vault=None, speech=None, **settings) -> Running:
        pipe = FakePipeline() if pipe is None else pipe
        app = create_app(pipe, Settings(**settings), vault=vault, speech=speech)
        config = uvicorn.Config(
            app, port=0, log_level="warning", ws_per_message_deflate=False, timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        started.append((Running(pipe, app, port, server), thread))
        return started[-1][0]

    yield start
    for running, thread in started:
        running.server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server did not end"
        assert running.pipe.states == 0, "a session has kept its state"


@pytest.fixture(scope="module")
def on_ray() -> Iterator[Callable[..., SimpleNamespace]]:
    """Start replicas of the fake pipeline on Ray Serve behind one port: `on_ray((2, 2), max_sessions=4)`."""
    from millstream.ui.server import ray_serve

    def load(path=__file__):
        import importlib.util
        import sys

        spec = importlib.util.spec_from_file_location("fake_pipeline", path)  # replicas can't import the tests
        module = sys.modules["fake_pipeline"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.FakePipeline(rate=25)

    def start(replicas: tuple[int, int], **settings) -> SimpleNamespace:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ray_serve.start(load, Settings(**settings), port=port, replicas=replicas, cpus=0.01, with_page=False)
        return SimpleNamespace(port=port, http=f"http://127.0.0.1:{port}")

    yield start
    ray_serve.stop()


@pytest.fixture
def client() -> Iterator[Callable[..., Client]]:
    """Open a socket to a running server."""
    opened: list[Client] = []

    def open_client(running: Running, path: str = "/live", **options) -> Client:
        opened.append(Client(running.port, path, **options))
        return opened[-1]

    yield open_client
    for each in opened:
        each.close()


def wait_until(condition: Callable[[], bool], timeout: float = 5.0) -> None:
    """Wait for `condition` to hold."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it didn't happen in time"
        time.sleep(0.005)


@pytest.fixture
def eventually() -> Callable[..., None]:
    return wait_until
