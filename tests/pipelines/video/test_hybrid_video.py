"""A video model with linear layers streams as any other; only its config says so."""

from __future__ import annotations

import pytest
import torch

from millstream.models.transformer import CausalTransformer3DModel
from millstream.pipelines.video import VideoPipeline
from millstream.streaming.linear_state import HybridCache


@pytest.fixture
def hybrid(parts):
    made = parts()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = made["transformer"].config
        made["transformer"] = CausalTransformer3DModel.from_config(config, mixer="hybrid(sana, every=2)").eval()
    pipe = VideoPipeline(**made, recipe="self_forcing", size=(16, 32), text_length=8)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_clip_is_the_stream_drained(hybrid):
    def seeded():
        return torch.Generator().manual_seed(0)

    clip = hybrid("a corgi surfs", num_frames=21, generator=seeded(), output_type="pt").frames
    assert isinstance(hybrid.arena.cache, HybridCache)
    with hybrid.stream("a corgi surfs", generator=seeded()) as session:
        frames = [frame for _, frame in zip(range(21), session)]
    torch.testing.assert_close(clip.reshape(-1, *clip.shape[-3:])[:21], torch.stack(frames), atol=0, rtol=0)
