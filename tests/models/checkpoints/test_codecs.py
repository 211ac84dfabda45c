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


def test_a_text_encoder_with_a_hole_is_refused(text_encoder, original_text, tmp_path):
    names = original_text(text_encoder)
    del names["blocks.1.ffn.fc1.weight"]
    torch.save(names, tmp_path / "umt5.pth")
    with pytest.raises(ValueError, match=r"1 missing: encoder.block.1.layer.1.DenseReluDense.wi_1.weight"):
        load_text_encoder(tmp_path / "umt5.pth")
