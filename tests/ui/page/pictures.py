"""A pipeline whose pictures a test can read: what is held, and what was asked, stands in their colours.

The lower half: red is the prompt, green whether KeyW is down, blue whether ArrowLeft is down. The upper half: stripes
that wander with every frame, or the camera's picture turned negative.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from millstream.streaming import Chunk, Frame, Leaves, Session, WorldControl
from millstream.streaming.kv_cache import Window

HEIGHT, WIDTH = 48, 64
WORLDS = ["a brick corridor with soldiers", "a green slime arena with medkits", "a dark maze with red walls"]
KEYS = {
    "KeyW": "MOVE_FORWARD",
    "KeyS": "MOVE_BACKWARD",
    "KeyA": "MOVE_LEFT",
    "KeyD": "MOVE_RIGHT",
    "ArrowUp": "MOVE_FORWARD",
    "ArrowLeft": "TURN_LEFT",
    "ArrowRight": "TURN_RIGHT",
    "Space": "ATTACK",
}


@dataclass
class Count:
    frame: int


@dataclass(frozen=True, slots=True)
class PictureControl(WorldControl):
    strength: float = 1.0


class Pictures:
    """Keeps the contract of a world pipeline; its codec and its network are a few lines of arithmetic."""

    rate = 25.0
    size = (HEIGHT, WIDTH)
    device = torch.device("cpu")
    key_map = KEYS
    worlds = WORLDS
    window = Window(8)

    def __init__(self) -> None:
        self.controls: list[PictureControl] = []
        self.slow = 0.0

    def stream(self, prompt: str, *, generator=None, num_inference_steps=None, guidance_scale=1.0):
        control = PictureControl(prompt=prompt, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        return Session(self, control, generator=generator)

    def nearest_world(self, prompt: str) -> tuple[str, float]:
        return (prompt, 1.0) if prompt in WORLDS else (WORLDS[0], 0.42)

    def check(self, control: PictureControl) -> None:
        unknown = sorted(control.keys - KEYS.keys())
        if unknown:
            raise ValueError(f"unknown key {', '.join(unknown)}")
        if not control.prompt.strip():
            raise ValueError("the prompt is empty; describe a world")

    def begin(self, control: PictureControl, *, generator=None) -> Count:
        return Count(0)

    def advance(
        self, states: Sequence[Count], controls: Sequence[PictureControl], media: Sequence[Frame | None]
    ) -> list[list[Chunk]]:
        if self.slow:
            time.sleep(self.slow)
        return [[self.draw(*job)] for job in zip(states, controls, media, strict=True)]

    def draw(self, state: Count, control: PictureControl, shown: Frame | None) -> Chunk:
        self.controls.append(control)
        x = torch.arange(WIDTH)
        stripes = ((x + 2 * state.frame) % 16 < 8).float() * 0.5 + 0.25
        picture = stripes.expand(3, HEIGHT, WIDTH).clone()
        if shown is not None:
            picture = 1 - shown.data
        told = (WORLDS.index(control.prompt) / 2 if control.prompt in WORLDS else 0.2, "KeyW", "ArrowLeft")
        lower = [held if isinstance(held, float) else float(held in control.keys) for held in told]
        picture[:, HEIGHT // 2 :] = torch.tensor(lower).view(3, 1, 1)
        when = time.monotonic() if shown is None else shown.time
        chunk = Chunk("video", picture[None], state.frame, self.rate, control.version, when)
        state.frame += 1
        return chunk

    def flush(self, state: Count) -> list[Chunk]:
        return []

    def save(self, state: Count) -> Leaves:
        return {"frame": state.frame}

    def load(self, leaves: Leaves) -> Count:
        return Count(int(leaves["frame"]))

    def end(self, state: Count) -> None:
        pass
