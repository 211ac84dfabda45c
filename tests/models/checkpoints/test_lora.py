"""Adapters: merged they are W + scale alpha / r B A, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch

from millstream.models.checkpoints import load_transformer, merge_lora, open_checkpoint

LAYERS = [f"blocks.{n}.{attn}.{p}" for n in range(2) for attn in ("self_attn", "cross_attn") for p in "qkvo"]
OURS = {"self_attn": "attn1", "cross_attn": "attn2", "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}


def adapter(rank=4):
    torch.manual_seed(5)
    return {layer: (torch.randn(rank, 256) / 16, torch.randn(256, rank) / 4) for layer in LAYERS}


def longlive(pairs):
    """As LongLive's training saves it."""
    flat = {}
    for layer, (down, up) in pairs.items():
        flat[f"base_model.model.{layer}.lora_A.weight"] = down
        flat[f"base_model.model.{layer}.lora_B.weight"] = up
    return {"generator_lora": flat}


def kohya(pairs, alpha):
    flat = {}
    for layer, (down, up) in pairs.items():
        flat[f"diffusion_model.{layer}.lora_down.weight"] = down
        flat[f"diffusion_model.{layer}.lora_up.weight"] = up
        flat[f"diffusion_model.{layer}.alpha"] = torch.tensor(alpha)
    return flat


def expected(transformer, pairs, scale):
    model = copy.deepcopy(transformer)
    for layer, (down, up) in pairs.items():
        blocks, number, attention, part = layer.split(".")
        module = model.get_submodule(f"{blocks}.{number}.{OURS[attention]}.{OURS[part]}")
        module.weight.data += scale * up @ down
    return model


@pytest.mark.parametrize("form", ["longlive", "bare", "kohya", "default adapter"])
def test_an_adapter_of_every_form_is_merged(form, transformer, original, draw, tmp_path):
    pairs, scale = adapter(), 1.0
    stored = longlive(pairs)
    if form == "bare":
        stored = stored["generator_lora"]
    if form == "kohya":
        stored, scale = kohya(pairs, 2.0), 2.0 / 4
    if form == "default adapter":
        stored = {name.replace("lora_A.", "lora_A.default."): x for name, x in stored["generator_lora"].items()}
    torch.save(stored, tmp_path / "lora.pt")
    torch.save({"generator": original(transformer.state_dict())}, tmp_path / "base.pt")
    assert open_checkpoint(tmp_path / "lora.pt").dialect == "lora"
    loaded = load_transformer(tmp_path / "base.pt", lora=tmp_path / "lora.pt", lora_scale=0.5)
    reference = expected(transformer, pairs, 0.5 * scale)
    torch.testing.assert_close(draw(loaded), draw(reference), atol=1e-5, rtol=1e-5)
    assert (draw(loaded) - draw(transformer)).abs().max() > 0.01


def test_an_adapter_of_another_model_changes_nothing(transformer):
    model = copy.deepcopy(transformer)
    weights = {
        "blocks.0.attn1.to_q.lora_A.weight": torch.ones(1, 256),
        "blocks.0.attn1.to_q.lora_B.weight": torch.ones(256, 1),
        "blocks.9.attn1.to_q.lora_A.weight": torch.ones(1, 256),
        "blocks.9.attn1.to_q.lora_B.weight": torch.ones(256, 1),
    }
    with pytest.raises(ValueError, match=r"1 of its 2 layers are missing here .*: blocks.9.attn1.to_q \(256 x 256\)"):
        merge_lora(model, weights)
    assert torch.equal(model.blocks[0].attn1.to_q.weight, transformer.blocks[0].attn1.to_q.weight)


def test_half_a_pair_is_refused(tmp_path):
    torch.save({"blocks.0.self_attn.q.lora_A.weight": torch.ones(1, 256)}, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=r"1 layers with half a pair \(blocks.0.attn1.to_q\)"):
        open_checkpoint(tmp_path / "lora.pt")


def test_model_and_adapter_cannot_change_places(transformer, tmp_path):
    torch.save(longlive(adapter()), tmp_path / "lora.pt")
    torch.save(transformer.state_dict(), tmp_path / "base.pt")
    with pytest.raises(ValueError, match="is an adapter, not a model; give it as lora="):
        load_transformer(tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=r"is a whole model \(diffusers\), no adapter"):
        load_transformer(tmp_path / "base.pt", lora=tmp_path / "base.pt")
