"""Autoencoders and text encoders: published files load to the same numbers, and never without their statistics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from millstream.models.checkpoints import load_text_encoder, load_vae
from millstream.models.checkpoints.load import check_names
from millstream.models.checkpoints.names import vae_name

LISTED = json.loads((Path(__file__).parent / "data" / "wanvae_keys.json").read_text())


def test_the_full_autoencoder_has_exactly_the_published_tensors():
    with torch.device("meta"):
        weights = {vae_name(name): torch.empty(shape) for name, shape in LISTED.items()}
        vae = AutoencoderKLWan()
    check_names({name: tuple(value.shape) for name, value in vae.state_dict().items()}, weights, "the list")
    assert len(weights) == 194
    assert sum(value.numel() for value in weights.values()) == 126_892_531


def test_names_are_those_of_diffusers_own_converter():
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    assert {vae_name(name): name for name in LISTED} == convert_wan_vae_to_diffusers({name: name for name in LISTED})


@torch.no_grad()
def test_the_original_file_decodes_the_same(vae, original_vae, tmp_path):
    torch.save(original_vae(vae), tmp_path / "Wan2.1_VAE.pth")
    loaded = load_vae(tmp_path / "Wan2.1_VAE.pth")
    latents = torch.randn(1, 16, 2, 3, 4)
    assert torch.equal(loaded.decode(latents).sample, vae.decode(latents).sample)
    assert loaded.config.latents_mean == vae.config.latents_mean


@torch.no_grad()
def test_diffusers_folder_decodes_the_same(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    latents = torch.randn(1, 16, 2, 3, 4)
    assert torch.equal(load_vae(tmp_path).decode(latents).sample, vae.decode(latents).sample)


@pytest.mark.parametrize("drop", ["latents_mean", "latents_std", "config.json"])
def test_without_statistics_it_is_refused(drop, vae, tmp_path):
    vae.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    if drop == "config.json":
        path.unlink()
    else:
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != drop}))
    with pytest.raises(ValueError, match=r"no config.json with latents_mean and latents_std, without which it"):
        load_vae(tmp_path)


def test_a_missing_tensor_and_a_foreign_file_are_refused(vae, original_vae, transformer, tmp_path):
    names = original_vae(vae)
    del names["decoder.head.0.gamma"]
    torch.save(names, tmp_path / "vae.pth")
    with pytest.raises(ValueError, match=r"1 missing: decoder.norm_out.gamma"):
        load_vae(tmp_path / "vae.pth")
    torch.save(transformer.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="holds no Wan autoencoder, but"):
        load_vae(tmp_path / "model.pt")


@pytest.mark.parametrize("form", ["original", "folder"])
@torch.no_grad()
def test_text_encoders_read_the_same(form, text_encoder, original_text, tmp_path):
    if form == "original":
        torch.save(original_text(text_encoder), tmp_path / "umt5.pth")
        loaded = load_text_encoder(tmp_path / "umt5.pth")
    else:
        text_encoder.save_pretrained(tmp_path)
        loaded = load_text_encoder(tmp_path)
    words = torch.tensor([[3, 5, 8, 1]])
    torch.testing.assert_close(loaded(words).last_hidden_state, text_encoder(words).last_hidden_state)


def test_the_config_of_another_model_beside_is_not_believed(vae, text_encoder, original_vae, original_text, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t2v", "dim": 256, "num_heads": 2}))
    torch.save(original_vae(vae), tmp_path / "vae.pth")
    torch.save(original_text(text_encoder), tmp_path / "umt5.pth")
    assert load_vae(tmp_path / "vae.pth").config["base_dim"] == 4
    assert load_text_encoder(tmp_path / "umt5.pth").config.d_model == 24


@pytest.mark.parametrize("load", [load_vae, load_text_encoder])
def test_names_that_are_no_text_are_refused(load, tmp_path):
    torch.save({0: torch.zeros(1)}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model.pth is no checkpoint: 0 is not the name of a tensor"):
        load(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("token_embedding.weight", torch.zeros(3), r"shared.weight \(3,\) is not of 2 dimensions"),
        ("blocks.0.ffn.gate.0.weight", None, r"DenseReluDense.wi_0.weight is missing"),
    ],
)
def test_a_text_encoder_of_strange_tensors_is_refused(name, value, message, text_encoder, original_text, tmp_path):
    names = original_text(text_encoder) | {name: value}
    torch.save({name: value for name, value in names.items() if value is not None}, tmp_path / "umt5.pth")
    with pytest.raises(ValueError, match=message):
        load_text_encoder(tmp_path / "umt5.pth")


def test_an_autoencoder_of_strange_tensors_or_settings_is_refused(vae, original_vae, tmp_path):
    torch.save(original_vae(vae) | {"decoder.conv1.weight": torch.tensor(1.0)}, tmp_path / "vae.pth")
    with pytest.raises(ValueError, match=r"decoder.conv1.weight \(\) is not of 5 dimensions"):
        load_vae(tmp_path / "vae.pth")
    vae.save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"z_dim": None}))
    with pytest.raises(ValueError, match=r"the config of .* makes no model"):
        load_vae(tmp_path / "vae")


def test_a_text_encoder_with_a_hole_is_refused(text_encoder, original_text, tmp_path):
    names = original_text(text_encoder)
    del names["blocks.1.ffn.fc1.weight"]
    torch.save(names, tmp_path / "umt5.pth")
    with pytest.raises(ValueError, match=r"1 missing: encoder.block.1.layer.1.DenseReluDense.wi_1.weight"):
        load_text_encoder(tmp_path / "umt5.pth")
