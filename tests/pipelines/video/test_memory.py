"""The memory plan: what is told before loading is what is taken after."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file

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
        assert plan.codec == session.state.decoding.bytes
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


def test_a_plan_reads_well(make):
    plan = memory_plan(make("longlive"))
    told = plan.as_text()
    assert told.splitlines()[0].startswith("transformer ")
    assert "after drop_text_encoder()" in told
    assert json.loads(json.dumps(plan.as_json()))["total"] == plan.total
