"""A preset does to a world what it does to a video model, however its steps are run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from millstream import WorldPipeline
from millstream.models.quantized import QuantizedLinear
from millstream.pipelines.presets import PRESETS, Preset
from millstream.samplers import FlowSampler
from millstream.streaming import step_together
from millstream.streaming.graphs import Recordings
from millstream.streaming.kv_cache import EightBits

sys.path.append(str(Path(__file__).parent))
from test_graphs import Tape

FAST = replace(PRESETS["fast"], least_window=0)  # from which on it would keep attention
REUSE = Preset("reuse", reuse=1)


def with_preset(pipe, preset):
    made = WorldPipeline(
        **pipe.components,
        worlds=list(pipe.worlds),
        buttons=pipe.buttons,
        key_map=pipe.key_map,
        size=list(pipe.size),
        window=pipe.window.frames,
        preset=preset,
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("preset", [FAST, "small", REUSE], ids=["fast", "small", "reuse"])
def test_a_world_under_a_preset_is_near_exact_and_is_not_exact(make, seeded, draw, preset):
    exact = draw(make().stream("a cave", generator=seeded()), 3)
    near = draw(with_preset(make(), preset).stream("a cave", generator=seeded()), 3)
    error = (exact - near).square().mean().sqrt() / exact.std()
    assert 1e-5 < error < 0.15


def test_reuse_is_exact_where_a_frame_has_one_step(make, seeded, draw):
    exact, reuse = make(sampler=FlowSampler(1)), with_preset(make(sampler=FlowSampler(1)), REUSE)
    one, other = (draw(pipe.stream("a cave", generator=seeded()), 9) for pipe in (exact, reuse))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_small_holds_a_world_in_less_memory(make):
    exact, small = make(), with_preset(make(), "small")
    assert any(isinstance(part, QuantizedLinear) for part in small.transformer.modules())
    assert isinstance(small.arena.cache.storage, EightBits)
    assert small.arena.cache.bytes < 0.4 * exact.arena.cache.bytes


@pytest.mark.parametrize(("scale", "apart"), [(1.0, 1), (2.0, 1), (1.0, 2)])
def test_recorded_steps_keep_attention_as_plain_ones_do(make, seeded, monkeypatch, scale, apart):
    """The plain stream knows where a chunk lies and leaves it out; the recorded one masks it. Both with two rows, which
    are neighbours or not."""
    from millstream.kernels import noise

    monkeypatch.setattr(noise, "_check", lambda seed, frame, step, shape, dtype: torch.Size(shape).numel())  # CPU only

    def played(patience, record):
        pipe = with_preset(make(), REUSE)
        pipe.arena.recordings = Recordings(torch.device("cpu"), patience=patience, record=record)
        sessions = [
            pipe.stream(p, generator=seeded(n), guidance_scale=scale)
            for n, p in enumerate(("a cave", "a wood", "a sea"))
        ][::apart][:2]
        frames = [sessions[0].step()[0].data]  # so that rows are filled to different lengths
        for _ in range(7):
            frames += [chunk.data for (chunk,) in step_together(sessions)]
        return torch.cat(frames), pipe

    (plain, _), (recorded, pipe) = played(1, None), played(1, Tape)
    assert len(pipe.arena.recordings) > 2
    torch.testing.assert_close(recorded, plain, atol=1e-4, rtol=0)


def test_a_world_with_narrow_weights_is_not_saved(make, tmp_path):
    with pytest.raises(ValueError, match="preset 'small' are in 8 bits"):
        with_preset(make(), "small").save_pretrained(tmp_path)
    with pytest.raises(AttributeError, match="preset is what the weights"):
        make().preset = "fast"
