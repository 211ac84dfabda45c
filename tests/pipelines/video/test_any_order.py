"""Whatever order things happen in, no chunk is lost, and what is saved goes on as if nothing had been."""

from __future__ import annotations

import random

import pytest
import torch

from millstream import Frame
from millstream.pipelines.recipes import RECIPES

PROMPTS = ["a corgi surfs", "the red fox", "in the snow", "the sea"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", RECIPES)
def test_any_order_of_steps_prompts_and_snapshots(name, seed, make, seeded):
    pipe, chance = make(name), random.Random(seed)
    script = [chance.choice(["step", "step", "prompt", "snapshot"]) for _ in range(22)]

    def play(saving):
        choose, chunks, begun = random.Random(seed + 100), [], []
        session = pipe.stream("a corgi", generator=seeded(seed))
        for action in script:
            if action == "prompt":
                switch = choose.choice(["keep", "recache", "lerp", "cut"])
                session.steer(prompt=choose.choice(PROMPTS), switch=switch)
            elif action == "snapshot" and saving:
                saved = session.snapshot()
                session.close()
                session = pipe.stream("the sea", generator=seeded(99))
                session.restore(saved)
            else:
                chunks += session.step()
                begun.append(session.control.prompt)
        chunks += session.flush()
        session.close()
        return chunks, begun

    plain = [action for action in script if action != "snapshot"]
    saved, _ = play(saving=True)
    assert len(saved) == plain.count("step")
    assert [chunk.start for chunk in saved[1:]] == [chunk.start + len(chunk.data) for chunk in saved[:-1]]
    assert all(chunk.data.isfinite().all() for chunk in saved)
    script = plain
    unsaved, _ = play(saving=False)
    for one, two in zip(saved, unsaved, strict=True):
        assert torch.equal(one.data, two.data)
    assert pipe.arena.in_use == 0


@pytest.mark.parametrize("name", ["longlive", "krea", "streamdiffusion_v2"])
def test_pictures_and_prompts_may_take_turns(name, make, seeded):
    """An input that begins, pauses and goes on: chunks from noise stand between those that are redrawn."""
    pipe = make(name)
    pictures = torch.rand(40, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    chunks = []
    with pipe.stream("a corgi surfs", strength=0.8, generator=seeded()) as session:
        for number, picture in enumerate(pictures):
            chunks += session.step(Frame(picture, 0.0))
            if number % 15 == 14:
                chunks += session.step()
            if number == 20:
                session.steer(prompt="the red fox", switch="cut")
        chunks += session.flush()
    assert [chunk.start for chunk in chunks[1:]] == [chunk.start + len(chunk.data) for chunk in chunks[:-1]]
    assert all(chunk.data.isfinite().all() for chunk in chunks)
