"""Shards of two small worlds, made on the fly: no game is played here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from millstream.training.dataset import Episodes

WORLDS = {"basic": 0, "take_cover": 7}
LENGTHS = (50, 40)  # of the episodes of each shard


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A folder of two shards of 90 frames, 32x32: a square on a slope, bright in one world and dark in the other."""
    folder = tmp_path_factory.mktemp("shards")
    generator = torch.Generator().manual_seed(0)
    for name, index in WORLDS.items():
        count = sum(LENGTHS)
        slope = torch.linspace(0, 60, 32)[None, :, None, None]
        frames = (slope + 160 * (index > 0)).expand(count, 32, 32, 3).clone()
        for number, column in enumerate(torch.randint(24, (count,), generator=generator).tolist()):
            frames[number, 8:16, column : column + 8, 0] = 110
        tensors = {
            "frames": frames.to(torch.uint8).contiguous(),
            "actions": torch.randint(2, (count, 3), generator=generator, dtype=torch.uint8),
            "episodes": torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)),
        }
        metadata = {"world": name, "world_index": str(index), "buttons": json.dumps(["LEFT", "RIGHT", "ATTACK"])}
        save_file(tensors, folder / f"shard-{index:04d}.safetensors", metadata)
    return folder


@pytest.fixture(scope="session")
def episodes(shards) -> Episodes:
    return Episodes.open(shards)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """An `Accelerator` made in the test runs on the CPU, whatever earlier ones did."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
