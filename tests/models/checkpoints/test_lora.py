"""Adapters: merged they are W + scale alpha / r B A, and nothing else changes."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors.torch import save_file

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


PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def save_peft(form, pairs, settings, folder):
    """As PEFT, or diffusers' `save_lora_weights`, writes an adapter of some settings."""
    folder.mkdir(exist_ok=True)
    if form == "peft":
        save_file(longlive(pairs)["generator_lora"], folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        return
    flat = {
        name.replace("base_model.model.", "transformer."): x for name, x in longlive(pairs)["generator_lora"].items()
    }
    told = json.dumps({f"transformer.{name}": value for name, value in settings.items()})
    save_file(flat, folder / "pytorch_lora_weights.safetensors", metadata={"lora_adapter_metadata": told})


@pytest.mark.parametrize("form", ["peft", "diffusers"])
@pytest.mark.parametrize(("changes", "strength"), [({}, 2.0), ({"use_rslora": True}, 4.0), ({"lora_alpha": 4}, 1.0)])
def test_the_strength_that_peft_wrote_down_is_taken(form, changes, strength, transformer, draw, tmp_path):
    pairs = adapter()
    save_peft(form, pairs, PEFT | changes, tmp_path / "lora")
    torch.save(transformer.state_dict(), tmp_path / "base.pt")
    reference = draw(expected(transformer, pairs, 0.5 * strength))
    loaded = load_transformer(tmp_path / "base.pt", lora=tmp_path / "lora", lora_scale=0.5)
    torch.testing.assert_close(draw(loaded), reference, atol=1e-5, rtol=1e-5)
    load_transformer(tmp_path / "base.pt", lora=tmp_path / "lora", headers_only=True)


def test_patterns_of_layers_are_honoured(tmp_path):
    pairs = adapter()
    down, up = pairs["blocks.0.self_attn.q"]
    pairs["blocks.0.self_attn.q"] = (down[:2], up[:, :2].contiguous())
    settings = PEFT | {"rank_pattern": {"^blocks.0.self_attn.q": 2}, "alpha_pattern": {"self_attn.k": 16}}
    save_peft("peft", pairs, settings, tmp_path / "lora")
    weights = open_checkpoint(tmp_path / "lora").weights
    alphas = {name: float(weights[f"blocks.1.attn1.{name}.alpha"]) for name in ("to_q", "to_k")}
    assert alphas == {"to_q": 8, "to_k": 16}
    assert float(weights["blocks.0.attn1.to_q.alpha"]) == 8
    assert float(weights["blocks.0.attn2.to_k.alpha"]) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, r"say rank 8 for blocks.0.cross_attn.k, and its weights have 4"),
        ({"rank_pattern": {"self_attn.q": 2}}, r"say rank 2 for blocks.0.self_attn.q, and its weights have 4"),
        ({"alpha_pattern": {".*attn.*": 2}}, r"alpha_pattern has the key '\.\*attn\.\*', and only names of layers"),
        ({"rank_pattern": [3]}, r"rank_pattern must be numbers by names of layers, got a list"),
        ({"lora_alpha": math.nan}, r"lora_alpha must be a number, got nan"),
        ({"lora_alpha": "8"}, r"lora_alpha must be a number, got '8'"),
        ({"use_dora": True}, r"settings say DoRA"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(changes, message, tmp_path):
    save_peft("peft", adapter(), PEFT | changes, tmp_path / "lora")
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "lora")


def test_damaged_settings_are_refused(tmp_path):
    pairs = longlive(adapter())["generator_lora"]
    save_file(pairs, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": "[" * 200_000})
    with pytest.raises(ValueError, match=r"lora.safetensors is damaged: the lora_adapter_metadata in its header"):
        open_checkpoint(tmp_path / "lora.safetensors")
    (tmp_path / "adapter_config.json").write_text("{broken")
    save_file(pairs, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"adapter_config.json is damaged"):
        open_checkpoint(tmp_path / "lora.safetensors")


def test_the_alpha_of_the_file_goes_before_that_of_the_settings(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT | {"r": 99}))
    torch.save(kohya(adapter(), 2.0), tmp_path / "lora.pt")
    assert float(open_checkpoint(tmp_path / "lora.pt").weights["blocks.0.attn1.to_q.alpha"]) == 2


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("lora_B.weight", torch.ones(256, 3), r"needs matrices \(r, in\) and \(out, r\), and has \(4, 256\) and"),
        ("lora_A.weight", torch.ones(4), r"needs matrices"),
        ("lora_A.weight", torch.full((4, 256), math.inf), r"blocks.1.attn2.to_v are not all finite numbers"),
        ("alpha", torch.tensor(math.nan), r"the alpha of blocks.1.attn2.to_v must be one finite number"),
        ("alpha", torch.ones(3), r"the alpha of blocks.1.attn2.to_v must be one finite number"),
        (None, math.nan, r"strength of an adapter must be a finite number, got nan"),
        (None, "x", r"strength of an adapter must be a finite number, got 'x'"),
    ],
)
def test_a_damaged_adapter_changes_nothing(part, value, message, transformer, tmp_path):
    model = copy.deepcopy(transformer)
    torch.save(longlive(adapter()), tmp_path / "lora.pt")
    weights = dict(open_checkpoint(tmp_path / "lora.pt").weights)
    if part is not None:
        weights[f"blocks.1.attn2.to_v.{part}"] = value
    with pytest.raises(ValueError, match=message):
        merge_lora(model, weights, scale=value if part is None else 1.0)
    state = transformer.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_layer_named_twice_is_refused(tmp_path):
    pairs = adapter()
    torch.save(kohya(pairs, 1.0) | longlive(pairs)["generator_lora"], tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=r"the adapter has 16 layers twice \(blocks.0.attn1.to_k, "):
        open_checkpoint(tmp_path / "lora.pt")


def test_an_alpha_without_its_pair_is_refused(tmp_path):
    stored = longlive(adapter())["generator_lora"] | {"blocks.7.self_attn.q.alpha": torch.tensor(1.0)}
    torch.save(stored, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=r"1 layers with half a pair \(blocks.7.attn1.to_q\)"):
        open_checkpoint(tmp_path / "lora.pt")
