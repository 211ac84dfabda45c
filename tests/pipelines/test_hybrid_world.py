"""A world whose transformer has linear layers is a world like any other: only its config says so."""

from __future__ import annotations

import pytest
import torch

from millstream import WorldPipeline
from millstream.models.transformer import CausalTransformer3DModel
from millstream.streaming import Snapshot, step_together
from millstream.streaming.linear_state import HybridCache

SCRIPT = ["KeyW", "KeyW", None, "ArrowLeft", "Space", "KeyW", None, "KeyD"]


@pytest.fixture(params=["linear(gated)", "hybrid(sana, every=2)"])
def hybrid(request, make):
    pipe = make()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        transformer = CausalTransformer3DModel.from_config(pipe.transformer.config, mixer=request.param).eval()
    transformer.action_embedder.weight.data *= 5.0
    transformer.proj_out.weight.data *= 2.0
    pipe.register_modules(transformer=transformer)
    return pipe


def clip(pipe, seeded, **settings):
    return pipe("a cave", num_frames=10, keys=SCRIPT, generator=seeded(), output_type="pt", **settings).frames


def test_the_clip_is_the_stream_drained(hybrid, seeded, draw):
    first = clip(hybrid, seeded)
    assert isinstance(hybrid.arena.cache, HybridCache)
    with hybrid.stream("a cave", generator=seeded()) as session:
        assert torch.equal(first, draw(session, 10, SCRIPT))
    with hybrid.stream("a cave", generator=seeded()) as session:
        assert not torch.equal(first, draw(session, 10, ["KeyS"] * 10))


def test_sessions_that_step_together_draw_what_each_draws_alone(hybrid, seeded):
    alone = []
    for seed in (0, 1):
        with hybrid.stream("a cave", generator=seeded(seed)) as session:
            alone.append(torch.stack([session.step()[0].data[0] for _ in range(6)]))
    with hybrid.stream("a cave", generator=seeded(0)) as one, hybrid.stream("a cave", generator=seeded(1)) as two:
        pairs = [step_together([one, two]) for _ in range(6)]
    for number, expected in enumerate(alone):
        together = torch.stack([pair[number][0].data[0] for pair in pairs])
        torch.testing.assert_close(together, expected, atol=1e-4, rtol=0)


def test_a_saved_stream_goes_on_in_another_pipeline(hybrid, seeded, draw, tmp_path):
    with hybrid.stream("a cave", generator=seeded()) as session:
        draw(session, 5, SCRIPT)
        path = session.snapshot().save(tmp_path / "stream.safetensors")
        expected = draw(session, 5)
    hybrid.save_pretrained(tmp_path / "world")
    loaded = WorldPipeline.from_pretrained(tmp_path / "world")
    loaded.set_progress_bar_config(disable=True)
    with loaded.stream("anything") as session:
        session.restore(Snapshot.load(path))
        torch.testing.assert_close(draw(session, 5), expected, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recorded_steps_draw_the_same(hybrid, seeded, draw):
    hybrid.to("cuda")
    with hybrid.stream("a cave", generator=seeded()) as session:
        recorded = draw(session, 24, SCRIPT * 3)
        assert len(hybrid.arena.recordings)
    hybrid._arena = None
    with hybrid.stream("a cave", generator=seeded()) as session:
        hybrid.arena.recordings.patience = 10**9
        plain = draw(session, 24, SCRIPT * 3)
        assert not len(hybrid.arena.recordings)
    torch.testing.assert_close(recorded, plain, atol=1e-3, rtol=0)
