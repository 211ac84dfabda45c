"""A pipeline small enough to check by hand: its frames say which seed, step, keys, mouse and input they answer."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import torch

from millstream.streaming import Chunk, WorldControl


@dataclass
class ToyState:
    memory: torch.Tensor
    seed: int
    index: int = 0


class ToyPipeline:
    rate = 20.0

    def __init__(self, *, delay: float = 0.0, chunk: int = 2) -> None:
        self.delay, self.chunk = delay, chunk
        self.live_states = 0
        self.advances: list[int] = []
        self.read: list[WorldControl] = []
        self.answered: list[float] = []

    def check(self, control):
        if "forbidden" in control.prompt:
            raise ValueError("this toy draws nothing forbidden")

    def begin(self, control, *, generator=None):
        self.live_states += 1
        seed = int(torch.randint(2**31, (), generator=generator))
        return ToyState(torch.zeros(4), seed)

    def advance(self, states, controls, media):
        time.sleep(self.delay)
        self.advances.append(len(states))
        return [[self._draw(*row)] for row in zip(states, controls, media)]

    def _draw(self, state, control, frame):
        self.read.append(control)
        felt = torch.tensor([len(control.keys), *control.mouse, len(control.prompt)]) / 100
        state.memory = (0.5 * state.memory + felt + 0.25 * torch.rand(4, generator=self._noise(state))).clamp(0, 1)
        if frame is not None:
            self.answered.append(float(frame.data.mean()))
        data = state.memory.mean().expand(self.chunk, 3, 8, 10).clone()
        when = time.monotonic() if frame is None else frame.time
        state.index += self.chunk
        return Chunk("video", data, state.index - self.chunk, self.rate, control.version, when)

    def _noise(self, state):
        return torch.Generator().manual_seed(state.seed + state.index)

    def flush(self, state):
        return [Chunk("video", torch.ones(1, 3, 8, 10), state.index, self.rate, 0, time.monotonic())]

    def save(self, state):
        return {"memory": state.memory.clone(), "seed": state.seed, "index": state.index}

    def load(self, leaves):
        if set(leaves) != {"memory", "seed", "index"}:
            raise ValueError(f"these are not the leaves of a toy: {sorted(leaves)}")
        self.live_states += 1
        return ToyState(leaves["memory"].clone(), leaves["seed"], leaves["index"])

    def end(self, state):
        self.live_states -= 1


@pytest.fixture
def toy():
    return ToyPipeline


@pytest.fixture
def seeded():
    return lambda seed=0: torch.Generator().manual_seed(seed)
