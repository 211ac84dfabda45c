"""Weights of models that are played say what they are: Matrix-Game 2's, flat under `model.`."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from millstream.models.checkpoints import load_transformer
from millstream.models.transformer import CausalTransformer3DModel

MODULES = {
    "blocks": [0],
    "enable_keyboard": True,
    "hidden_size": 12,
    "keyboard_hidden_dim": 32,
    "windows_size": 3,
    "heads_num": 2,
    "rope_dim_list": [8, 4, 4],
}


@pytest.mark.parametrize("buttons", [4, 7])
def test_published_weights_say_what_they_are(buttons, original, tmp_path):
    mouse = {"enable_mouse": True, "mouse_hidden_dim": 32} if buttons == 4 else {"enable_mouse": False}
    modules = MODULES | mouse | {"keyboard_dim_in": buttons}
    config = {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 32, "freq_dim": 16, "num_layers": 2}
    shape = {"in_channels": 12, "out_channels": 4, "text_dim": None, "image_dim": 16}
    torch.manual_seed(0)
    model = CausalTransformer3DModel(**config, **shape, action_modules=modules)
    weights = {f"model.{name}": value.contiguous() for name, value in original(model.state_dict()).items()}
    assert "model.blocks.0.action_model.keyboard_attn_kv.weight" in weights
    save_file(weights, tmp_path / "distilled.safetensors")
    loaded = load_transformer(tmp_path / "distilled.safetensors")
    assert loaded.config["action_modules"] == modules
    assert loaded.config["text_dim"] is None
    assert loaded.config["added_kv_proj_dim"] is None
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
