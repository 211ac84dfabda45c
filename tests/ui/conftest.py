"""A world that needs no weights: a frame's green says whether KeyW is down, red counts, blue is the prompt.

Shown a picture, it answers with the picture's mean colour.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

from millstream.streaming import Chunk, Frame, Leaves, Session, WorldControl

KEYS = {
    "KeyW": "MOVE_FORWARD",
    "KeyS": "MOVE_BACKWARD",
    "KeyA": "MOVE_LEFT",
    "KeyD": "MOVE_RIGHT",
    "ArrowLeft": "TURN_LEFT",
    "ArrowRight": "TURN_RIGHT",
    "Space": "ATTACK",
}


@dataclass
class FakeState:
    frame: int


class FakeWorld:
    """Keeps the contract of a world pipeline, at 12x16."""

    rate = 17.5
    size = (12, 16)
    device = torch.device("cpu")
    key_map = KEYS
    worlds = ("a brick corridor", "a slime arena")

    def __init__(self) -> None:
        self.seen: list[WorldControl] = []
        self.shown: list[Frame] = []
        self.asked: dict[str, object] = {}

    def stream(
        self, prompt: str, *, generator=None, num_inference_steps=None, **settings
    ) -> Session[FakeState, WorldControl]:
        seed = None if generator is None else generator.initial_seed()
        self.asked = {"prompt": prompt, "seed": seed, "steps": num_inference_steps, **settings}
        return Session(self, WorldControl(prompt=prompt, **settings), generator=generator)

    def nearest_world(self, prompt: str) -> tuple[str, float]:
        near = [world for world in self.worlds if world in prompt]
        return (near[0], 0.95) if near else (self.worlds[0], 0.21)

    def check(self, control: WorldControl) -> None:
        pass

    def begin(self, control: WorldControl, *, generator=None) -> FakeState:
        return FakeState(0)

    def advance(
        self, states: Sequence[FakeState], controls: Sequence[WorldControl], media: Sequence[Frame | None]
    ) -> list[list[Chunk]]:
        drawn = []
        for state, control, frame in zip(states, controls, media, strict=True):
            self.seen.append(control)
            colour = (state.frame % 100 / 100, float("KeyW" in control.keys), float("slime" in control.prompt))
            if frame is not None:
                self.shown.append(frame)
                colour = frame.data.mean((1, 2)).tolist()
            data = torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 12, 16)
            when = time.monotonic() if frame is None else frame.time
            drawn.append([Chunk("video", data, state.frame, self.rate, control.version, when)])
            state.frame += 1
        return drawn

    def flush(self, state: FakeState) -> list[Chunk]:
        return []

    def save(self, state: FakeState) -> Leaves:
        return {"frame": state.frame}

    def load(self, leaves: Leaves) -> FakeState:
        return FakeState(int(leaves["frame"]))

    def end(self, state: FakeState) -> None:
        pass


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> FakeWorld:
    """The fake world, in place of whatever a command would load."""
    fake = FakeWorld()
    for command in ("run", "demo", "play", "bench", "live"):
        monkeypatch.setattr(f"millstream.ui.commands.{command}.load_world", lambda name, device, preset=None: fake)
    return fake


@pytest.fixture
def run_async():
    """`asyncio.run` on a thread of its own: Playwright keeps a loop running on the main thread once a page is open."""

    def run(coroutine):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, coroutine).result(60)

    return run
