"""Presets change how exactly a stream is drawn, not what it is; each is near `exact`, and none is it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from millstream.models.quantized import QuantizedLinear
from millstream.models.tiny_vae import TinyVideoDecoder
from millstream.pipelines import presets
from millstream.pipelines.memory import memory_plan, plan_for
from millstream.pipelines.presets import PRESETS, Preset, add_preset, find_preset
from millstream.pipelines.recipes import RECIPES
from millstream.pipelines.video import VideoPipeline
from millstream.streaming.kv_cache import Float8

FAST = replace(PRESETS["fast"], least_window=0)  # from which on it would keep attention


def clip(pipe, seeded, steps=6):
    with pipe.stream("a corgi surfs", generator=seeded()) as session:
        return torch.cat([chunk.data for _ in range(steps) for chunk in session.step()])


@pytest.mark.parametrize("recipe", ["longlive", "longlive_unbounded", "causvid"])
@pytest.mark.parametrize(
    "preset",
    [FAST, "small", Preset("reuse", reuse=1), Preset("fp8 keys", kv="fp8")],
    ids=lambda p: getattr(p, "name", p),
)
def test_a_preset_is_near_exact_and_is_not_exact(make, seeded, recipe, preset):
    exact, near = (clip(make(recipe, preset=each), seeded, steps=2) for each in ("exact", preset))
    error = (exact - near).square().mean().sqrt() / exact.std()
    assert 1e-5 < error < 0.12  # and grows from chunk to chunk: random weights forgive nothing


@pytest.mark.parametrize("recipe", ["longlive", "longlive_unbounded", "causvid"])
def test_attention_in_float8_is_done_where_the_device_has_it(make, seeded, monkeypatch, recipe):
    preset = Preset("attention in FP8", attention="fp8", reuse=3)
    assert not isinstance(make(recipe, preset=preset).arena.cache.storage, Float8)
    monkeypatch.setattr(presets, "float8_serves", lambda device, dim: True)
    pipe = make(recipe, preset=preset)
    assert isinstance(pipe.arena.cache.storage, Float8)
    exact, near = (clip(each, seeded, steps=2) for each in (make(recipe), pipe))
    error = (exact - near).square().mean().sqrt() / exact.std()
    assert 1e-5 < error < 0.15
    # Spare frames are always hidden, and the kernel has no mask.
    assert not isinstance(make("rolling_forcing", preset=preset).arena.cache.storage, Float8)
    large = replace(preset, least_window=4096)  # than which this window is smaller, and gains nothing
    assert not isinstance(make(recipe, preset=large).arena.cache.storage, Float8)


@pytest.mark.parametrize("position", ["absolute", "sink"])
def test_reuse_is_exact_where_a_chunk_has_one_step(make, seeded, position):
    """Then nothing is kept for later: attention in two parts, merged, is attention, wherever the ring stands."""
    recipe = replace(RECIPES["longlive"], name="once", timesteps=(1000,), position=position)
    exact, reuse = (clip(make(recipe, preset=each), seeded, 9) for each in ("exact", Preset("reuse", reuse=1)))
    torch.testing.assert_close(exact, reuse, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("reuse", "steps", "saved"),
    [
        (0, 4, []),
        (3, 4, [3]),
        (1, 3, [1, 2]),
        (-1, 4, [3]),
        (-1, 3, [2]),
        (-1, 2, []),
        (-2, 4, [2, 3]),
        (-9, 4, [2, 3]),
    ],
)
def test_reuse_says_which_steps_take_what_the_one_before_left(reuse, steps, saved):
    chunk, preset = SimpleNamespace(), Preset("mine", reuse=reuse)
    kept = object() if reuse else None
    taken, firsts = [], []
    for step in range(steps):
        presets.attend_at(step, steps, preset, chunk, kept)
        if chunk.reuse is not None:
            (firsts if chunk.first else taken).append(step)
    assert taken == saved
    assert firsts == [step - 1 for step in saved[:1]]


def test_reuse_is_exact_while_nothing_lies_outside_and_remembers_exactly(make, seeded):
    exact, reuse = make("longlive"), make("longlive", preset=Preset("reuse", reuse=1))
    sessions = [pipe.stream("a corgi surfs", generator=seeded()) for pipe in (exact, reuse)]
    one, other = (session.step()[0].data for session in sessions)
    torch.testing.assert_close(one, other, atol=2e-6, rtol=0)
    torch.testing.assert_close(exact.arena.cache.k[:, :, :6], reuse.arena.cache.k[:, :, :6], atol=1e-5, rtol=0)


def test_products_of_many_rows_are_narrowed_by_fast_and_all_by_small(make):
    for preset, count in (("fast", 8), ("small", 10), (Preset("wide alone", linears="fp8", narrowest=33), 0)):
        pipe = make(preset=preset)
        block = pipe.transformer.blocks[0]
        assert sum(isinstance(part, QuantizedLinear) for part in block.modules()) == count
        assert type(pipe.transformer.proj_out) is torch.nn.Linear


def test_a_presets_plan_of_memory_is_what_it_takes(make, seeded, tmp_path):
    make("longlive", decoder=TinyVideoDecoder(4, 1, (12, 10, 8, 6)).eval()).save_pretrained(tmp_path)
    plans = {}
    for preset in ("exact", "small"):
        _, plans[preset] = plan_for(tmp_path, preset=preset)
        pipe = VideoPipeline.from_pretrained(tmp_path, preset=preset)
        assert memory_plan(pipe) == plans[preset]
        with pipe.stream("a corgi surfs", generator=seeded()) as session:
            session.step()
            assert plans[preset].kv == pipe.arena.cache.bytes
    assert plans["small"].kv < 0.4 * plans["exact"].kv  # float32 here
    assert plans["small"].weights["transformer"] < 0.6 * plans["exact"].weights["transformer"]
    assert plans["small"].host["text_encoder"] < plans["exact"].weights["text_encoder"]
    assert "text_encoder" not in plans["small"].weights
    assert "text_encoder, on the host" in plans["small"].as_text()


def test_the_text_encoder_of_small_stays_where_it_is_and_goes_on_reading(make, seeded):
    pipe = make(preset="small").to("meta", torch.bfloat16)
    assert pipe.text_encoder.device.type == "cpu"
    assert pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.transformer.device.type == "meta"
    assert pipe.encode_prompt("a corgi surfs").isfinite().all()


def test_a_pipeline_with_narrow_weights_is_not_saved(make, tmp_path):
    with pytest.raises(ValueError, match="preset 'small' are in 8 bits"):
        make(preset="small").save_pretrained(tmp_path)


def test_presets_are_found_by_name_and_can_be_added():
    assert find_preset("exact") == Preset("exact")
    with pytest.raises(ValueError, match="there is no preset 'fats'; there are exact, fast, small"):
        find_preset("fats")
    with pytest.raises(ValueError, match="there is a preset 'fast' already"):
        add_preset(Preset("fast"))
    with pytest.raises(ValueError, match="attention must be None or 'fp8', got 'int8'"):
        Preset("mine", attention="int8")
    with pytest.raises(ValueError, match="leave out kv='int8'"):
        Preset("mine", attention="fp8", kv="int8")
    with pytest.raises(ValueError, match="linears must be None, 'fp8' or 'int8', got 'fp4'"):
        Preset("mine", linears="fp4")
    try:
        assert find_preset(add_preset(Preset("mine", kv="fp8")).name).kv == "fp8"
    finally:
        PRESETS.pop("mine")
