"""The memory plan: what is told before loading is what is taken after."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file

from millstream import Frame
from millstream.models.tiny_vae import TinyVideoDecoder
from millstream.models.transformer import CausalTransformer3DModel
from millstream.pipelines.memory import memory_plan, plan_for, weight_bytes
from millstream.pipelines.recipes import RECIPES
from millstream.pipelines.video import VideoPipeline


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("tiny", [False, True])
def test_the_plan_is_what_a_stream_takes(name, tiny, make, seeded, tmp_path):
    pipe = make(name, decoder=TinyVideoDecoder(4, 1, (12, 10, 8, 6)).eval() if tiny else None)
    pipe.save_pretrained(tmp_path)
    empty, plan = plan_for(tmp_path)
    assert empty.transformer.device.type == "meta", "nothing is loaded"
    with pipe.stream("a corgi surfs", generator=seeded()) as session:
        session.step()
        cache = pipe.arena.cache
        assert plan.kv == cache.bytes
        kept = session.state.decoding.bytes
        if pipe.recipe.overlap:  # whose memory begins anew from a picture
            while pipe._still is None:
                session.step()
            kept += pipe._still.bytes + pipe.encoder._scratch.nbytes
        assert plan.codec == kept
        assert plan.prompts == sum(part.nbytes for layer in pipe.arena.text for part in layer)
        assert plan.weights == {
            part: weight_bytes(getattr(pipe, part))
            for part in ("transformer", "vae", "text_encoder", *(["decoder"] if tiny else []))
        }
    assert plan == memory_plan(pipe), "and a loaded pipeline tells the same"
    assert plan.without_text_encoder == plan.total - plan.weights["text_encoder"]


def test_a_plan_finds_what_loading_would_refuse(make, tmp_path):
    pipe = make("longlive")
    pipe.save_pretrained(tmp_path)
    weights = pipe.transformer.state_dict()
    del weights["proj_out.bias"]
    save_file(weights, tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match=r"do not fit this model: 1 missing: proj_out\.bias"):
        plan_for(tmp_path, checkpoint=tmp_path / "mine.safetensors")


def test_half_precision_is_planned_as_such(make, tmp_path):
    make("longlive").save_pretrained(tmp_path)
    _, whole = plan_for(tmp_path)
    _, half = plan_for(tmp_path, torch_dtype=torch.bfloat16)
    assert half.kv == whole.kv // 2
    assert half.weights["vae"] == whole.weights["vae"] // 2


def test_wan_1_3b_at_full_size_takes_what_was_published():
    """Keys and values: 287.5 MB per latent frame in bfloat16 at 480 x 832. Decoder state: 944,286,720 elements."""
    with torch.device("meta"):
        transformer = CausalTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30).bfloat16()
        vae = AutoencoderKLWan().bfloat16()
    for name, frames in (("self_forcing", 21), ("longlive", 12)):
        plan = memory_plan(VideoPipeline(transformer, vae, None, None, recipe=name))
        assert plan.kv == frames * 287_539_200
        assert plan.codec == 2 * 944_286_720
        assert plan.prompts == 2 * 30 * 512 * 1536 * 2
        assert plan.weights["transformer"] == pytest.approx(2 * 1_418_996_800, rel=0.01)


@pytest.mark.parametrize("name", ["longlive", "krea", "streamdiffusion_v2", "rolling_forcing"])
def test_pictures_that_come_in_take_what_was_planned(name, make, seeded):
    pipe, picture = make(name), torch.rand(3, 16, 32)
    inputs = memory_plan(pipe).inputs
    with pipe.stream("a corgi surfs", image=picture, strength=0.8, generator=seeded()) as session:
        session.step()
        begun = pipe._still.bytes + pipe.encoder._scratch.nbytes
        if name == "rolling_forcing":
            assert inputs == {"image": begun}, "it redraws no video"
            return
        for _ in range(2):
            session.step(Frame(picture, 0.0))
        video = session.state.encoding.bytes
    if name == "krea":
        assert inputs == {"image": 0, "video": video}, "a picture is encoded anew at every chunk anyway"
        assert memory_plan(pipe).codec == session.pipeline.codec.memory(16, 32)[0] + begun
    else:
        assert inputs == {"image": begun, "video": video + pipe.encoder._scratch.nbytes}
    plan = memory_plan(pipe)
    assert plan.with_inputs == plan.total + max(inputs.values())
    assert memory_plan(pipe, streams=3).inputs["video"] == inputs["video"] + 2 * video


@pytest.mark.parametrize("name", ["longlive", "streamdiffusion_v2"])
def test_rows_double_as_streams_are_opened_and_so_does_the_plan(name, make, seeded):
    pipe, sessions = make(name), []
    for streams in (1, 2, 3):
        sessions.append(pipe.stream("a corgi surfs", generator=seeded()))
        sessions[-1].step()
        plan = memory_plan(pipe, streams)
        assert plan.kv == pipe.arena.cache.bytes
        assert plan.prompts == sum(part.nbytes for layer in pipe.arena.text for part in layer)
        assert plan.codec == sum(codec.bytes for codec in pipe.arena.codecs.values())
    rows = pipe.arena.cache.rows
    assert rows == 4 * pipe.recipe.rows
    saved = pipe.arena.cache.snapshot(0)
    row = sum(saved[name].nbytes for name in ("k", "v", "sink_k"))
    assert plan.growing == rows // 2 * (row + plan.prompts // rows) + row
    assert plan.total == sum(plan.weights.values()) + plan.kv + plan.prompts + plan.codec + max(
        plan.working, plan.growing
    )


def test_wan_1_3b_at_full_size_takes_1_6_gb_more_where_pictures_come_in():
    with torch.device("meta"):
        transformer = CausalTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30).bfloat16()
        plan = memory_plan(VideoPipeline(transformer, AutoencoderKLWan().bfloat16(), None, None))
    assert plan.inputs["image"] == plan.inputs["video"] == pytest.approx(1.59e9, rel=0.01)


def test_a_plan_reads_well(make):
    plan = memory_plan(make("longlive"))
    told = plan.as_text()
    assert told.splitlines()[0].startswith("transformer ")
    assert "after drop_text_encoder()" in told
    assert "more with image=" in told
    assert json.loads(json.dumps(plan.as_json()))["total"] == plan.total
