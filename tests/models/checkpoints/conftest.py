"""A small transformer, autoencoder and text encoder, and what they are called where they were published."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from millstream.models.checkpoints.names import vae_name
from millstream.models.transformer import CausalTransformer3DModel

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 40,
    "num_layers": 2,
}

# The table of names, written anew from diffusers to original: whole beginnings, most special first.
ORIGINAL = [
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"^scale_shift_table", "head.modulation"),
    (r"proj_out", "head.head"),
    (r"scale_shift_table", "modulation"),
    (r"attn1", "self_attn"),
    (r"attn2", "cross_attn"),
    (r"to_out\.0", "o"),
    (r"to_([qkv])", r"\1"),
    (r"add_([kv])_proj", r"\1_img"),
    (r"norm_added_k", "norm_k_img"),
    (r"(blocks\.\d+\.)norm2", r"\1norm3"),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
]


def original_names(state):
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in ORIGINAL:
            changed = re.sub(pattern, replacement, name)
            if changed != name and pattern == r"^scale_shift_table":
                name = changed
                break
            name = changed
        renamed[name] = value
    return renamed


def original_vae_names(vae):
    """The published names of a small autoencoder: same structure, so the same names in the same places."""
    listed = json.loads((Path(__file__).parent / "data" / "wanvae_keys.json").read_text())
    ours = {vae_name(name): name for name in listed}
    return {ours[name]: value for name, value in vae.state_dict().items()}


def original_text_names(encoder):
    """The names of `models_t5_umt5-xxl-enc-bf16.pth`."""
    table = [
        (r"encoder\.block\.", "blocks."),
        (r"encoder\.final_layer_norm", "norm"),
        (r"layer\.0\.layer_norm", "norm1"),
        (r"layer\.1\.layer_norm", "norm2"),
        (r"layer\.0\.SelfAttention\.relative_attention_bias", "pos_embedding.embedding"),
        (r"layer\.0\.SelfAttention", "attn"),
        (r"layer\.1\.DenseReluDense\.wi_0", "ffn.gate.0"),
        (r"layer\.1\.DenseReluDense\.wi_1", "ffn.fc1"),
        (r"layer\.1\.DenseReluDense\.wo", "ffn.fc2"),
        (r"shared", "token_embedding"),
    ]
    names = {}
    for name, value in encoder.state_dict().items():
        if name != "encoder.embed_tokens.weight":
            for pattern, replacement in table:
                name = re.sub(pattern, replacement, name)
            names[name] = value
    return names


@pytest.fixture(scope="package")
def transformer():
    torch.manual_seed(0)
    return CausalTransformer3DModel(**CONFIG).eval()


@pytest.fixture(scope="package")
def image_transformer():
    torch.manual_seed(1)
    return CausalTransformer3DModel(**CONFIG | {"in_channels": 36}, image_dim=20, added_kv_proj_dim=256).eval()


@pytest.fixture
def original():
    return original_names


@pytest.fixture
def original_vae():
    return original_vae_names


@pytest.fixture
def original_text():
    return original_text_names


@pytest.fixture(scope="package")
def draw():
    """What a transformer makes of fixed inputs."""

    @torch.no_grad()
    def drawn(model):
        generator = torch.Generator().manual_seed(3)
        latents = torch.randn(1, model.config.in_channels, 2, 4, 4, generator=generator)
        text = torch.randn(1, 5, model.config.text_dim, generator=generator)
        image = torch.randn(1, 257, 20, generator=generator) if model.config.image_dim else None
        return model(latents, torch.tensor([500.0]), text, image, return_dict=False)[0]

    return drawn


@pytest.fixture(scope="package")
def vae():
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.data.uniform_(0.5, 1.5)
    return vae.eval()


@pytest.fixture(scope="package")
def text_encoder():
    torch.manual_seed(0)
    return UMT5EncoderModel(UMT5Config(vocab_size=50, d_model=24, d_kv=4, d_ff=32, num_layers=2, num_heads=4)).eval()
